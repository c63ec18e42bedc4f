// The kernels, as the host launches them. Each takes its parameter struct by value.
#pragma once

#include <cstddef>

#include "core/dtype.h"
#include "cuda/control.h"

namespace freeio::cuda {

// DispatchParams. `routed`: with routing; else along a handle.
const void* dispatch_function(bool routed);
size_t dispatch_shared_bytes(int num_experts);

// CombineParams, CombineTransposeParams. `wide`: 16 bytes for each access of a lane, for rows and
// buffers that allow it; else one element.
const void* combine_function(DType dtype, bool wide);
const void* combine_transpose_function(DType dtype, bool wide);

// Threads of a CTA, and elements that one lane takes at a time and in one slice.
int threads_per_cta();
int slice_accesses();

}  // namespace freeio::cuda
