#include "kernel_table.h"

#include <map>

#include "cuda/kernels.h"
#include "cuda/params.h"
#include "hosts/kernels.h"

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
  const auto add = [&](const Kernel& kernel, auto tag) {
    table[kernel.function] = bind<typename decltype(tag)::Type>;
  };
  for_each_kernel(add);
  for_each_hosts_kernel(add);
  return table;
}

}  // namespace

std::function<void()> bind_kernel(const void* function, const void* params) {
  static const std::map<const void*, Bind> table = make_table();
  const auto found = table.find(function);
  return found == table.end() ? nullptr : found->second(function, params);
}

}  // namespace emulator
