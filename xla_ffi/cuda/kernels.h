// The kernels, as the host launches them. Each takes its parameter struct by value.
#pragma once

#include <cstddef>

#include "core/dtype.h"
#include "cuda/control.h"

namespace freeio::cuda {

// Where dispatch has the rows of its assignments from.
enum class Routes { kOfHandle, kByCounts, kByIds, kByIdsWithRows };

// DispatchParams. `assignments_of_all`: of all ranks together.
const void* dispatch_function(Routes routes);
size_t dispatch_shared_bytes(Routes routes, int num_experts, int assignments_of_all);

// CombineParams, CombineTransposeParams. `wide`: 16 bytes for each access of a lane (8 of one-byte
// elements), for rows and buffers that allow it; else one element. The one for small calls sends
// partial sums in lines: null where that is not possible.
const void* combine_function(DType dtype, bool wide);
size_t combine_shared_bytes();
const void* combine_in_lines_function(DType dtype);
size_t combine_in_lines_shared_bytes();
const void* combine_transpose_function(DType dtype, bool wide);
size_t combine_transpose_shared_bytes();
// Whether so many assignments, those of one token of each rank, fit in it.
bool combine_transpose_fits(size_t accumulator_bytes, int num_slices, int assignments);

int threads_per_cta();

}  // namespace freeio::cuda
