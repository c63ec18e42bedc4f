// Zeros the rows of packed tensors that no assignment fills.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/operands.h"

namespace freeio::cpu {

// Calls f(begin, end) for each run of padding rows in [begin, end).
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

inline void zero_padding(const std::vector<Leaf>& leaves, const int32_t* row_source, int64_t begin,
                         int64_t end) {
  for_padding(row_source, begin, end, [&](int64_t first, int64_t last) {
    for (const Leaf& leaf : leaves) {
      std::memset(leaf.rows + first * leaf.row_bytes, 0, (last - first) * leaf.row_bytes);
    }
  });
}

}  // namespace freeio::cpu
