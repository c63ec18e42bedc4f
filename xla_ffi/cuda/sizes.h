// What the engine takes at most, and how much memory an exchange needs: arithmetic without CUDA, so
// that installations without the engine can tell, too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "core/layout.h"
#include "cuda/geometry.h"
#include "cuda/gpu_block.h"

namespace freeio::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts `accesses` of a row evenly into slices of whole warps, at most `most` each. The number of
// slices, and the accesses of each.
inline std::pair<int64_t, int32_t> slices_of(int64_t accesses, int64_t most) {
  constexpr int64_t kWarp = 32;
  const int64_t slices = std::max<int64_t>(1, ceil_div(accesses, most));
  const int64_t each = std::max(kWarp, round_up(ceil_div(accesses, slices), kWarp));
  return {std::max<int64_t>(1, ceil_div(accesses, each)), static_cast<int32_t>(each)};
}

// The same in whole passes, at most `most` each.
inline std::pair<int64_t, int32_t> slices_of_passes(int64_t accesses, int64_t pass, int64_t most) {
  const int64_t passes = std::max<int64_t>(1, ceil_div(accesses, pass));
  const int64_t each = ceil_div(passes, ceil_div(passes, most));
  return {ceil_div(passes, each), static_cast<int32_t>(each * pass)};
}

// Slices of a row that is sent in lines, and the accesses of each.
inline std::pair<int64_t, int32_t> sent_slices_of(int64_t accesses) {
  return {std::max<int64_t>(1, ceil_div(accesses, kSentSlice)), kSentSlice};
}

// Whether a call is small: it has few assignments, and one rank sends at most `most` slices of rows
// or partial sums to another. `of_token`: slices of each token.
inline bool is_small_call(int64_t num_ranks, int64_t num_tokens, int64_t top_k, int64_t of_token,
                          int64_t most = kMaxSentSlices) {
  const int64_t assignments = num_tokens * top_k;
  return assignments <= kMaxSmallAssignments && assignments * num_ranks <= kMaxSmallByAll &&
         num_tokens * of_token <= most;
}

// Ranks other than its own in which a token can have rows.
inline int64_t num_slots(int64_t top_k, int64_t num_ranks) {
  return std::min(top_k, num_ranks - 1);
}

// Scratch buffers that XLA gives a call, enough for any alignment of the other buffers. dispatch:
// words of `places`.
inline int64_t dispatch_scratch(const Layout& layout) {
  return layout.num_ranks * layout.num_assignments();
}

// combine: rows, of `width` elements, and words of 32 bits.
struct CombineScratch {
  int64_t partial_sums;
  int64_t flags;
};
inline CombineScratch combine_scratch(const Layout& layout, int64_t width) {
  // The narrowest accesses make the most slices.
  const int64_t slots = layout.num_tokens * num_slots(layout.top_k, layout.num_ranks);
  return {slots, slots * slices_of(width, kCombineSlice).first};
}

// Device memory that the engine owns on each of `num_gpus` GPUs that exchange rows: a GPU block for
// each lane. In a program of several processes the driver rounds it up.
inline int64_t owned_bytes(int num_gpus) { return kLanes * gpu_block_bytes(num_gpus); }

}  // namespace freeio::cuda
