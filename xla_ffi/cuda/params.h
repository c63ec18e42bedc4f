// The parameters of the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/geometry.h"
#include "cuda/gpu_block.h"

namespace freeio::cuda {

// What every kernel is told of its exchange.
struct Exchange {
  GpuBlock* gpu_block[kMaxRanks];  // by rank
  int32_t gpu[kMaxRanks];          // by rank
  HostBlock* host;
  const uint32_t* device;  // this device's index in the mesh, as XLA has it
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
  uint32_t signature[kSignatureWords];
  uint64_t posted[kMaxAddresses];  // this rank's buffers, as the peers are told of them
};

// How the packed rows are looked through for padding: in `count` blocks of `rows`, every
// `stride`-th.
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
  int32_t senders;  // where rows are sent: CTAs that only send; 0: all do both
};

struct CombineParams {
  Exchange exchange;
  const int32_t* dest_rank;
  const int32_t* dest_row;
  const void* expert_out;
  const void* weights;  // null: ones
  void* sums;
  void* partial_sums;  // [T, slots, width], unless sums are sent
  uint32_t* flags;     // [T, num_slices, slots], unless routes are sent
  int32_t width;
  int32_t num_slots;  // ranks other than its own in which a token can have rows
  int32_t num_slices;
  Divisor slices;
  int32_t slice_width;
  int32_t ahead;      // slices by which pushing is ahead of summing
  bool sends_routes;  // they are sent, and the arrival flags are the engine's
  // Where partial sums are sent in lines:
  int32_t senders;  // CTAs that only send; 0: all do both
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
  bool sends_routes;  // instead of showing the peers where they are
  int32_t width;
  int32_t num_slices;
  Divisor slices;
  int32_t slice_width;
  Blocks padding;
};

}  // namespace freeio::cuda
