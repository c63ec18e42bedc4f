// Geometry of one exchange and all size arithmetic: the twin of freeio_jax/layout.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/host_device.h"

namespace freeio {

inline int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

struct Layout {
  int64_t num_ranks = 1;    // R
  int64_t num_tokens = 0;   // T, of one rank
  int64_t top_k = 1;        // K
  int64_t num_experts = 1;  // E, of all ranks
  int64_t capacity = 0;     // rows of one rank's packed output
  int64_t alignment = 1;    // group sizes are multiples of it
  int64_t zero_tail = 1;    // 0: packed rows past the last group are not written

  int64_t experts_per_rank() const { return num_experts / num_ranks; }
  int64_t num_assignments() const { return num_tokens * top_k; }
  bool is_expert(int64_t id) const { return id >= 0 && id < num_experts; }
  bool is_invalid(int64_t id) const { return id < -1 || id >= num_experts; }
  int64_t rank_of_expert(int64_t id) const { return id / experts_per_rank(); }

  // What row_source holds: an assignment's number among those of all ranks.
  int64_t source_of(int64_t rank, int64_t token, int64_t k) const {
    return rank * num_assignments() + token * top_k + k;
  }
  int64_t source_rank(int64_t source) const { return source / num_assignments(); }
  int64_t source_assignment(int64_t source) const { return source % num_assignments(); }
  int64_t source_token(int64_t source) const { return source_assignment(source) / top_k; }
};

// Rows of a group with `load` assignments: a multiple of `alignment`, and at most `capacity`, which
// is also a multiple of it. divide(n) is n / alignment; kernels pass a faster function than "/".
template <typename Int, typename Divide>
FREEIO_HOST_DEVICE Int aligned_rows(Int load, Int alignment, Int capacity, const Divide& divide) {
  const Int rows = load + alignment - 1;
  return divide(rows < capacity ? rows : capacity) * alignment;
}

// The first row behind a group. A group's first row and its number of rows are at most `capacity`.
// So their sum fits in Int, for any number of groups and any alignment.
template <typename Int>
FREEIO_HOST_DEVICE Int row_behind(Int start, Int rows, Int capacity) {
  const Int end = start + rows;
  return end < capacity ? end : capacity;
}

// Whether a packed row that belongs to no assignment pads a group to the alignment; else it lies
// past the last group. Groups begin at multiples of `alignment`, and their assignments come first.
// So each block of that many rows in a group begins with an assignment. remainder(n) is n %
// alignment.
template <typename Int, typename Remainder>
FREEIO_HOST_DEVICE bool pads_group(const int32_t* row_source, Int row, const Remainder& remainder) {
  return row_source[row - remainder(row)] >= 0;
}

// The groups of one rank's packed rows: the first row of each, at most capacity, and its size.
struct Groups {
  std::vector<int64_t> starts;
  std::vector<int64_t> sizes;

  template <typename Load>
  Groups(const Layout& layout, const Load* expert_load)
      : starts(layout.experts_per_rank()), sizes(layout.experts_per_rank()) {
    int64_t start = 0;
    for (size_t g = 0; g < starts.size(); ++g) {
      const int64_t rows = aligned_rows<int64_t>(expert_load[g], layout.alignment, layout.capacity,
                                                 [&](int64_t n) { return n / layout.alignment; });
      starts[g] = start;
      start = row_behind(start, rows, layout.capacity);
      sizes[g] = start - starts[g];
    }
  }
};

}  // namespace freeio
