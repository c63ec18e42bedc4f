// The list of kernels, for the host. Each kernel takes its parameter struct by value.
#pragma once

#include <cstddef>

#include "core/dtype.h"
#include "cuda/params.h"

namespace freeio::cuda {

struct Kernel {
  const void* function = nullptr;
  size_t shared_bytes = 0;
};

// DispatchParams. `assignments_of_all`: of all ranks together. `access_bytes`: by which the rows of
// all leaves can be accessed.
Kernel dispatch_small(int num_experts, int assignments_of_all, int access_bytes);
Kernel dispatch_large(int num_experts);
Kernel dispatch_along();

// CombineParams. `wide`: 16 bytes for each access of a lane (8 of one-byte elements), for rows and
// buffers that allow it; else one element. The small one takes wide rows; its function is null
// for dtypes that it cannot sum.
Kernel combine_small(DType dtype);
Kernel combine_large(DType dtype, bool wide);
// The large one for few CTAs. Rows and buffers are aligned for accesses of 16 bytes.
Kernel combine_few(DType dtype);
// Whether `assignments`, those of one token of each rank, fit in the large one's shared memory. (In
// the small one they always do.)
bool combine_large_fits(DType dtype, int assignments);

// CombineTransposeParams.
Kernel combine_transpose(DType dtype, bool wide);
// Whether `assignments`, those of one token of each rank, fit in its shared memory.
bool combine_transpose_fits(size_t accumulator_bytes, int num_slices, int assignments);

int threads_per_cta();

template <typename Params>
struct ParamsTag {
  using Type = Params;
};

// Calls f(kernel, tag of its parameters) for every kernel, with the most shared memory that a call
// can need.
template <typename F>
void for_each_kernel(const F& f) {
  constexpr ParamsTag<DispatchParams> kDispatch;
  for (const int access_bytes : {16, 4, 2, 1}) {
    f(dispatch_small(kMaxExperts, kMaxSmallByAll, access_bytes), kDispatch);
  }
  f(dispatch_large(kMaxExperts), kDispatch);
  f(dispatch_along(), kDispatch);
  for (const DType dtype : kDTypes) {
    constexpr ParamsTag<CombineParams> kCombine;
    if (const Kernel small = combine_small(dtype); small.function != nullptr) f(small, kCombine);
    f(combine_few(dtype), kCombine);
    for (const bool wide : {true, false}) {
      f(combine_large(dtype, wide), kCombine);
      f(combine_transpose(dtype, wide), ParamsTag<CombineTransposeParams>{});
    }
  }
}

}  // namespace freeio::cuda
