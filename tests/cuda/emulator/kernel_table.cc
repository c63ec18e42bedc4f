#include "kernel_table.h"

#include <map>

#include "cuda/control.h"
#include "cuda/kernels.h"

namespace emulator {
namespace {

using namespace freeio;
using namespace freeio::cuda;

using Bind = std::function<void()> (*)(const void* function, const void* params);

template <typename Params>
std::function<void()> bind(const void* function, const void* params) {
  const auto kernel = reinterpret_cast<void (*)(Params)>(const_cast<void*>(function));
  return [kernel, copy = *static_cast<const Params*>(params)] { kernel(copy); };
}

std::map<const void*, Bind> make_table() {
  std::map<const void*, Bind> table;
  for (const Routes routes :
       {Routes::kOfHandle, Routes::kByCounts, Routes::kByIds, Routes::kByIdsWithRows}) {
    table[dispatch_function(routes)] = bind<DispatchParams>;
  }
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16,
                            DType::kFloat8E5M2, DType::kFloat8E4M3FN}) {
    if (const void* combine = combine_in_lines_function(dtype)) {
      table[combine] = bind<CombineParams>;
    }
    for (const bool wide : {true, false}) {
      table[combine_function(dtype, wide)] = bind<CombineParams>;
      table[combine_transpose_function(dtype, wide)] = bind<CombineTransposeParams>;
    }
  }
  return table;
}

}  // namespace

std::function<void()> bind_kernel(const void* function, const void* params) {
  static const std::map<const void*, Bind> table = make_table();
  const auto found = table.find(function);
  return found == table.end() ? nullptr : found->second(function, params);
}

}  // namespace emulator
