#include "cpu/padding.h"

#include <atomic>
#include <cstring>

namespace freeio::cpu {
namespace {

std::atomic<bool> are_tails_poisoned{false};

// Calls f(begin, end) for each run of rows in [begin, end) without an assignment.
template <typename F>
void for_padding(const int32_t* row_source, int64_t begin, int64_t end, const F& f) {
  for (int64_t row = begin; row < end;) {
    if (row_source[row] >= 0) {
      ++row;
      continue;
    }
    const int64_t first = row;
    while (row < end && row_source[row] < 0) ++row;
    f(first, row);
  }
}

void fill(const std::vector<Leaf>& leaves, int64_t begin, int64_t end, int byte) {
  for (const Leaf& leaf : leaves) {
    std::memset(leaf.rows + begin * leaf.row_bytes, byte, (end - begin) * leaf.row_bytes);
  }
}

}  // namespace

void poison_tails(bool poison) { are_tails_poisoned = poison; }

void zero_padding(const Layout& layout, const std::vector<Leaf>& leaves, const int32_t* row_source,
                  int64_t begin, int64_t end) {
  const auto remainder = [&](int64_t row) { return row % layout.alignment; };
  for_padding(row_source, begin, end, [&](int64_t first, int64_t last) {
    // Padding of a group ends with a block of `alignment` rows. What follows in the run is the
    // tail.
    int64_t tail = first;
    if (layout.zero_tail != 0) {
      tail = last;
    } else if (pads_group(row_source, first, remainder)) {
      tail = std::min(last, round_up(first, layout.alignment));
    }
    fill(leaves, first, tail, 0);
    if (are_tails_poisoned) fill(leaves, tail, last, 0xff);
  });
}

}  // namespace freeio::cpu
