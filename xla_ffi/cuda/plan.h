// From the buffers of a call to the parameters of its kernel; knows nothing of XLA.
//
// A handler puts the buffers' addresses and describe()'s exchange into the parameters. What follows
// from them, and which kernel it is, is found here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "cuda/control.h"

namespace freeio::cuda {

// A kernel and what its launch needs beside the parameters.
struct Kernel {
  const void* function = nullptr;
  size_t shared_bytes = 0;
};

// Rows that are summed: element type and elements of one row.
struct RowType {
  DType dtype = DType::kFloat32;
  int64_t width = 0;
};

// Dispatches with at most so many assignments of one rank send their ids; all calls with so many
// `routes` of one rank send these, or the places of their assignments; and those that could send
// ids, and have so many slices, send their rows or partial sums. The defaults, and the most, are
// kMaxSentAssignments, kMaxSentRoutes, and kMaxSentSlices. For tests: all ranks must have the same.
void set_most_sent(int64_t assignments, int64_t routes, int64_t slices);

// Adds one array of the token pytree; at most kMaxLeaves. Ranks must agree on `row_type`, a number
// for element type and shape of a row.
void add_leaf(const void* tokens, void* rows, int64_t row_bytes, uint64_t row_type,
              DispatchParams& params);

// Fill what is left of the parameters, the signature and what is posted included. What a call has
// (routing, weights, results) is said by flags: the address of an empty buffer may be null.
Kernel complete_dispatch(bool routed, DispatchParams& params);
Kernel complete_combine(const RowType& type, bool weighted, CombineParams& params);
Kernel complete_combine_transpose(const RowType& type, bool rows, bool weights,
                                  CombineTransposeParams& params);

}  // namespace freeio::cuda
