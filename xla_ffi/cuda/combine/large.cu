// combine of large calls: large_kernel.cuh. (Where few CTAs run it: few.cu.)
#include "cuda/combine/large_kernel.cuh"
#include "cuda/combine/pushing_warp.cuh"
#include "cuda/kernels.h"

namespace freeio::cuda {

int threads_per_cta() { return kThreads; }

bool combine_large_fits(DType dtype, int assignments) {
  bool fits = false;
  with_element_type(dtype, [&](auto tag) {
    using Warp = PushingWarp<typename decltype(tag)::Type, 1>;
    fits = assignments <= tile_assignments<typename Warp::Accumulator>(Warp::kTileBytes);
  });
  return fits;
}

Kernel combine_large(DType dtype, bool wide) {
  Kernel kernel;
  with_element_type(dtype, [&](auto tag) {
    using Element = typename decltype(tag)::Type;
    kernel = wide ? large_kernel<PushingWarp<Element, wide_pack(sizeof(Element))>>()
                  : large_kernel<PushingWarp<Element, 1>>();
  });
  return kernel;
}

}  // namespace freeio::cuda
