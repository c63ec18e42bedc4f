// The list of kernels for groups that span hosts. Each takes its parameter struct by value.
#pragma once

#include "cuda/kernels.h"
#include "hosts/params.h"

namespace freeio::cuda {

// HostsDispatchParams.
Kernel hosts_dispatch(int num_experts);
Kernel hosts_dispatch_along();
// HostsCombineParams and HostsTransposeParams. `wide` as in cuda/kernels.h.
Kernel hosts_combine(DType dtype, bool wide);
Kernel hosts_transpose(DType dtype, bool wide);

// As for_each_kernel().
template <typename F>
void for_each_hosts_kernel(const F& f) {
  constexpr ParamsTag<HostsDispatchParams> kDispatch;
  f(hosts_dispatch(kMaxExperts), kDispatch);
  f(hosts_dispatch_along(), kDispatch);
  for (const DType dtype : kDTypes) {
    for (const bool wide : {true, false}) {
      f(hosts_combine(dtype, wide), ParamsTag<HostsCombineParams>{});
      f(hosts_transpose(dtype, wide), ParamsTag<HostsTransposeParams>{});
    }
  }
}

}  // namespace freeio::cuda
