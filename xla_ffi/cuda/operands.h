// The buffers of a call, by operation. Operands are their addresses, which differ from run to run.
// Types say what is in them, which does not.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/operand_order.h"
#include "cuda/params.h"

namespace freeio::cuda {

// One array of a token pytree.
struct LeafType {
  int64_t row_bytes;
  uint64_t row_type;  // a number for element type and shape of a row, on which ranks must agree
};
struct LeafBuffers {
  const void* tokens;
  void* rows;
};

// dispatch, and dispatch along a handle.
struct DispatchTypes {
  bool routed;  // not along a handle
  int32_t num_leaves;
  LeafType leaves[kMaxLeaves];
};
struct DispatchOperands {
  using Types = DispatchTypes;
  using Params = DispatchParams;

  const uint32_t* device;   // a buffer of XLA's with this device's index in the mesh
  const int32_t* topk_idx;  // null: along a handle, whose arrays are then read, not written
  int32_t *dest_rank, *dest_row, *row_source;
  int32_t *group_sizes, *expert_load, *num_dropped, *num_invalid;
  Word* places;  // scratch
  LeafBuffers leaves[kMaxLeaves];
};

struct CombineTypes {
  bool weighted;  // else all weights are ones
  DType dtype;    // of the rows that are summed
  int64_t width;  // elements of one row
};
struct CombineOperands {
  using Types = CombineTypes;
  using Params = CombineParams;

  const uint32_t* device;
  const int32_t *dest_rank, *dest_row, *row_source;
  const void *expert_out, *weights;
  void *sums, *partial_sums;  // partial_sums: scratch
  uint32_t* flags;            // scratch
};

struct CombineTransposeTypes {
  bool rows;     // whether there is the gradient by the rows, which needs the weights
  bool weights;  // and that by the weights, which needs expert_out
  DType dtype;
  int64_t width;
};
struct CombineTransposeOperands {
  using Types = CombineTransposeTypes;
  using Params = CombineTransposeParams;

  const uint32_t* device;
  const int32_t *dest_rank, *dest_row, *row_source;
  const void *tokens, *expert_out, *weights;
  void *rows, *weight_grads;
};

// The buffers of a call in order: operand_order.h, and the engine's scratch buffers behind them.
template <typename Visitor>
void visit_buffers(const DispatchTypes& types, DispatchOperands& operands, Visitor& visitor) {
  if (!types.routed) return visit_dispatch_along(operands, operands, visitor);
  visit_dispatch(operands, visitor);
  visitor.result("places", operands.places);
}
template <typename Visitor>
void visit_buffers(const CombineTypes& types, CombineOperands& operands, Visitor& visitor) {
  visit_combine(operands, operands, types.weighted, visitor);
  visitor.result("partial_sums", operands.partial_sums);
  visitor.result("flags", operands.flags);
}
template <typename Visitor>
void visit_buffers(const CombineTransposeTypes& types, CombineTransposeOperands& operands,
                   Visitor& visitor) {
  visit_combine_transpose(operands, operands, types.rows, types.weights, visitor);
}

}  // namespace freeio::cuda
