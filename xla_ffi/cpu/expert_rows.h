// Expert rows as combine and its transpose read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/layout.h"
#include "cpu/exchange.h"

namespace freeio::cpu {

// The expert rows of the assignments of tokens [begin, end) of one rank. Rows of this process are
// used in place; rows of other processes are copied.
class ExpertRows {
 public:
  template <typename Op>
  ExpertRows(const Layout& layout, const std::vector<const Op*>& ranks, const Homes& homes,
             bool alone, const Routes& routes, int64_t bytes, int64_t begin, int64_t end)
      : routes_(routes), bytes_(bytes), first_(begin * layout.top_k) {
    bases_.reserve(ranks.size());
    for (const Op* op : ranks) bases_.push_back(static_cast<const std::byte*>(op->expert_out));
    if (alone) return;
    copies_.resize((end - begin) * layout.top_k);
    int64_t count = 0;
    for (int64_t a = first_; a < end * layout.top_k; ++a) {
      if (routes.dest_rank[a] >= 0 && homes[routes.dest_rank[a]] != nullptr) ++count;
    }
    memory_.resize(count * bytes);
    std::byte* next = memory_.data();
    Gather gather;
    for (int64_t a = first_; a < end * layout.top_k; ++a) {
      const int32_t peer = routes.dest_rank[a];
      if (peer < 0 || homes[peer] == nullptr) continue;
      copies_[a - first_] = next;
      gather.add(*homes[peer], in_place(a), next, static_cast<size_t>(bytes));
      next += bytes;
    }
    gather.run();
  }

  template <typename Element>
  const Element* of(int64_t assignment) const {
    const std::byte* copy = copies_.empty() ? nullptr : copies_[assignment - first_];
    return reinterpret_cast<const Element*>(copy != nullptr ? copy : in_place(assignment));
  }

 private:
  const std::byte* in_place(int64_t assignment) const {
    return bases_[routes_.dest_rank[assignment]] + routes_.dest_row[assignment] * bytes_;
  }

  const Routes& routes_;
  const int64_t bytes_;
  const int64_t first_;
  std::vector<const std::byte*> bases_;
  std::vector<const std::byte*> copies_;  // by assignment; null: in place
  std::vector<std::byte> memory_;
};

}  // namespace freeio::cpu
