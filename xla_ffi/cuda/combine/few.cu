// combine of large calls where few CTAs run it, as large_kernel.cuh.
#include "cuda/combine/few_warp.cuh"
#include "cuda/combine/large_kernel.cuh"
#include "cuda/kernels.h"

namespace freeio::cuda {

Kernel combine_few(DType dtype) {
  Kernel kernel;
  with_element_type(
      dtype, [&](auto tag) { kernel = large_kernel<FewWarp<typename decltype(tag)::Type>>(); });
  return kernel;
}

}  // namespace freeio::cuda
