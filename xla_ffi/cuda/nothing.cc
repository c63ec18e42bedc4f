#include "cuda/nothing.h"

#include "core/registration.h"
#include "cuda/measure.h"

namespace freeio::cuda {
namespace {

ffi::Error call_nothing(void* stream, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer>, int64_t ctas) {
  const char* const error = launch_empty_kernel(ctas, stream);
  if (error == nullptr) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, error);
}

XLA_FFI_DEFINE_HANDLER(kNothing, call_nothing,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<int64_t>("ctas"),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

pybind11::capsule nothing_handler() { return capsule(kNothing); }

}  // namespace freeio::cuda
