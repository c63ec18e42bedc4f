// The parameters of the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/geometry.h"
#include "cuda/gpu_block.h"
#include "cuda/timeline.h"

namespace freeio::cuda {

// The part of the parameters that every kernel has.
struct Exchange {
  GpuBlock* gpu_block[kMaxRanks];  // by rank, of this exchange's lane
  int32_t gpu[kMaxRanks];          // by rank
  HostBlock* host;
  const uint32_t* device;  // a buffer of XLA's with this device's index in the mesh
  uint32_t expected_device;
  int32_t rank;
  int32_t num_ranks;
  Divisor ranks;
  Divisor local_experts;  // of each rank
  int32_t num_tokens;
  int32_t top_k;
  int32_t num_experts;
  int32_t capacity;
  Divisor alignment;  // divides capacity
  bool zero_tail;     // else packed rows past the last group are not written
  uint32_t signature[kSignatureWords];
  uint64_t posted[kMaxAddresses];  // addresses of this rank's buffers, for the peers
  int32_t lane;                    // a Lane
  int64_t block_bytes;             // from the GPU block of a lane to that of the next one
#ifdef FREEIO_STAMPS
  Timeline* timelines;  // of this GPU's CTAs in the lane
#endif
};

// How warps look for padding among the packed rows: in `count` blocks of `rows` rows. The next
// block is `stride` blocks further. Without blocks there is nothing to look for.
struct Blocks {
  int32_t rows;
  int32_t count;
  int32_t stride;
};

// One array of a token pytree, cut into slices that one warp moves at a time.
struct SlicedLeaf {
  const std::byte* tokens;  // [T] rows, this rank's
  std::byte* rows;          // [capacity] rows, this rank's
  int64_t row_bytes;
  int32_t access_bytes;  // of one lane: 1, 2, 4, 8 or 16
  int32_t slice_bytes;
  int32_t num_slices;
};

struct DispatchParams {
  Exchange exchange;
  int32_t num_leaves;
  int32_t num_slices;  // of all leaves
  Divisor slices;
  Blocks padding;
  SlicedLeaf leaves[kMaxLeaves];
  const int32_t* topk_idx;  // null: along a handle, whose arrays are then read, not written
  int32_t* dest_rank;
  int32_t* dest_row;
  int32_t* row_source;
  int32_t* group_sizes;
  int32_t* expert_load;
  int32_t* num_dropped;
  int32_t* num_invalid;
  Word* places;            // scratch, [R, T, K]: places here of every rank's assignments
  bool places_in_scratch;  // else they are in the GPU blocks
  int32_t place_bits;      // of a place's number; the bits above are the expert's
  int32_t segment_ctas;    // CTAs that count together
  int32_t num_segments;
  int32_t senders;  // in small calls: CTAs that only send; 0: all CTAs send and receive
};

struct CombineParams {
  Exchange exchange;
  const int32_t* dest_rank;
  const int32_t* dest_row;
  const void* expert_out;
  const void* weights;  // null: ones
  void* sums;
  void* partial_sums;  // scratch, [T, slots, width], unless sums are sent in lines
  uint32_t* flags;     // scratch, [T, num_slices, slots], unless routes are sent
  int32_t width;
  int32_t num_slots;  // ranks other than its own in which a token can have rows
  int32_t num_slices;
  Divisor slices;
  int32_t slice_width;
  int32_t ahead;  // slices by which pushing is ahead of summing
  // Routes are sent to the GPU blocks, where the arrival flags are, too. Else routes are read from
  // the peers' handles, and `flags` is used.
  bool sends_routes;
  // Where partial sums are sent in lines:
  int32_t senders;  // CTAs that only send; 0: all CTAs send and sum
  Divisor peers;    // of each rank
};

struct CombineTransposeParams {
  Exchange exchange;
  const int32_t* dest_rank;
  const int32_t* dest_row;
  const int32_t* row_source;
  const void* tokens;
  const void* expert_out;  // null without weight_grads
  const void* weights;     // null without rows
  void* rows;
  void* weight_grads;
  bool sends_routes;  // to the GPU blocks; else they are read from the peers' handles
  int32_t width;
  int32_t num_slices;
  Divisor slices;
  int32_t slice_width;
  Blocks padding;
};

}  // namespace freeio::cuda
