#include "hosts/handlers.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/buffers.h"
#include "core/registration.h"
#include "cuda/custom_call.h"
#include "cuda/handlers.h"
#include "hosts/call.h"
#include "hosts/program.h"

namespace freeio::cuda {
namespace {

namespace py = pybind11;

// One custom call of a group that spans hosts.
template <typename Operands>
struct HostsCustomCall : CustomCallOf<Operands, HostsCall<Operands>> {
  static inline ffi::TypeId id = {};

  std::vector<int64_t> pes;  // of each mesh device
};

template <typename Operands, Operation kOperation>
ffi::ErrorOr<std::unique_ptr<HostsCustomCall<Operands>>> instantiate(ffi::Dictionary attributes) {
  if (ffi::Error error = starter().ensure(); error.failure()) return ffi::Unexpected(error);
  auto call = std::make_unique<HostsCustomCall<Operands>>();
  if (ffi::Error error = call->read(kOperation, kSynchronous, attributes); error.failure()) {
    return ffi::Unexpected(error);
  }
  const auto pes = attributes.get<ffi::Span<const int64_t>>("pes");
  if (!pes.has_value()) {
    return ffi::Unexpected(
        ffi::Error(ffi::ErrorCode::kInternal, "freeio_jax: custom call lacks attribute pes"));
  }
  call->pes.assign(pes->begin(), pes->end());
  return call;
}

template <typename Operands>
Status make_call(const HostsCustomCall<Operands>& custom_call, int32_t ordinal,
                 const typename Operands::Types& types,
                 std::unique_ptr<HostsCall<Operands>>& call) {
  const JoinedHosts* const joined = joined_hosts();
  if (joined == nullptr) {
    return {Code::kInternal,
            "freeio_jax: this program has a group that spans hosts, and it was compiled where "
            "NVSHMEM carries rows between hosts. Here NVSHMEM was not started: call "
            "freeio_jax.initialize() before the program runs, and see what `python -m "
            "freeio_jax.info` says of hosts."};
  }
  const HostsProgram& program = joined->program;
  if (program.ordinal != ordinal) return not_in_mesh(ordinal);
  const PlaceInGroup place = custom_call.find(
      [&](int64_t device) { return custom_call.pes[static_cast<size_t>(device)] == program.pe; });
  if (place.rank < 0) return not_in_mesh(ordinal);
  HostsMember member;
  member.rank = place.rank;
  member.mesh_device = place.mesh_device;
  for (const int64_t device : place.devices) {
    const auto pe = static_cast<int>(custom_call.pes[static_cast<size_t>(device)]);
    member.pes.push_back(pe);
    if (program.gpu_of_pe[pe] >= 0) member.gpus.push_back(program.gpu_of_pe[pe]);
  }
  call = std::make_unique<HostsCall<Operands>>(
      CallSite{custom_call.operation, custom_call.layout, {}, custom_call.name, custom_call.share},
      std::move(member), joined->landings, types);
  return {};
}

template <typename Operands>
ffi::Error execute(HostsCustomCall<Operands>* custom_call, void* stream, int32_t ordinal,
                   ffi::Buffer<ffi::U32, 0> device, ffi::RemainingArgs args,
                   ffi::RemainingRets rets, ffi::Dictionary) {
  return custom_call->run_on_gpu(
      ordinal, device.typed_data(), args, rets,
      [&](const auto& types, auto& call) { return make_call(*custom_call, ordinal, types, call); },
      [&](auto& call, const Operands& operands) { return call.run(operands, stream); });
}

template <typename Operands>
auto execute_binding() {
  return binding_of_run<HostsCustomCall<Operands>>();
}

XLA_FFI_DEFINE_HANDLER(kMakeDispatch, (instantiate<DispatchOperands, Operation::kDispatch>),
                       ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kMakeDispatchAlong,
                       (instantiate<DispatchOperands, Operation::kDispatchAlong>),
                       ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kMakeCombine, (instantiate<CombineOperands, Operation::kCombine>),
                       ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kMakeCombineTranspose,
                       (instantiate<CombineTransposeOperands, Operation::kCombineTranspose>),
                       ffi::Ffi::BindInstantiate().Attrs());

// XLA may capture the launches and replay them: the kernels themselves advance the epochs.
XLA_FFI_DEFINE_HANDLER(kDispatch, execute<DispatchOperands>, execute_binding<DispatchOperands>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCombine, execute<CombineOperands>, execute_binding<CombineOperands>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCombineTranspose, execute<CombineTransposeOperands>,
                       execute_binding<CombineTransposeOperands>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

py::dict hosts_ffi_types() {
  py::dict types;
  add_ffi_type<HostsCustomCall<DispatchOperands>>("freeio_hosts_dispatch", types);
  add_ffi_type<HostsCustomCall<CombineOperands>>("freeio_hosts_combine", types);
  add_ffi_type<HostsCustomCall<CombineTransposeOperands>>("freeio_hosts_combine_transpose", types);
  return types;
}

py::dict hosts_ffi_targets() {
  py::dict targets;
  const py::dict operations =
      ffi_targets_of({kMakeDispatch, kDispatch}, {kMakeDispatchAlong, kDispatch},
                     {kMakeCombine, kCombine}, {kMakeCombineTranspose, kCombineTranspose});
  for (const auto& [name, handlers] : operations) {
    targets[(py::cast<std::string>(name) + "_between_hosts").c_str()] = handlers;
  }
  return targets;
}

}  // namespace freeio::cuda
