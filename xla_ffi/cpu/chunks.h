// The work of an exchange, cut into tasks for the cores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/exchange.h"
#include "cpu/threads.h"

namespace freeio::cpu {

// Bytes that one task moves: enough to hide what its start costs, and few enough for all cores to
// get tasks.
inline constexpr int64_t kTaskBytes = 512 << 10;

// Cuts [0, size), for every rank of this process, into chunks of about kTaskBytes. All chunks have
// one numbering.
struct Chunks {
  std::vector<int64_t> ranks;
  int64_t size;
  int64_t step;
  int64_t per_rank;
  int64_t count;
  int64_t bytes;

  Chunks(const Homes& homes, int64_t items, int64_t bytes_per_item)
      : size(items),
        step(std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, bytes_per_item))),
        per_rank((items + step - 1) / step),
        count(0),
        bytes(0) {
    for (size_t rank = 0; rank < homes.size(); ++rank) {
      if (homes[rank] == nullptr) ranks.push_back(static_cast<int64_t>(rank));
    }
    count = static_cast<int64_t>(ranks.size()) * per_rank;
    bytes = static_cast<int64_t>(ranks.size()) * items * bytes_per_item;
  }

  int64_t rank(int64_t task) const { return ranks[task / per_rank]; }
  int64_t begin(int64_t task) const { return task % per_rank * step; }
  int64_t end(int64_t task) const { return std::min(size, begin(task) + step); }
};

// Runs `first` over its chunks and `second` over its own, all of them in parallel.
template <typename First, typename Second>
void parallel_for_both(const Chunks& a, const First& first, const Chunks& b, const Second& second) {
  parallel_for(a.count + b.count, a.bytes + b.bytes, [&](int64_t task) {
    if (task < a.count) {
      first(a.rank(task), a.begin(task), a.end(task));
    } else {
      task -= a.count;
      second(b.rank(task), b.begin(task), b.end(task));
    }
  });
}

// Whether all ranks are in this process.
inline bool all_here(const Homes& homes) {
  return std::all_of(homes.begin(), homes.end(), [](auto* home) { return home == nullptr; });
}

}  // namespace freeio::cpu
