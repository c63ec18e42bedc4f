#include "cuda/handlers.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core/buffers.h"
#include "core/digest.h"
#include "core/registration.h"
#include "cuda/call.h"
#include "cuda/custom_call.h"
#include "cuda/gpus.h"
#include "cuda/operands.h"
#include "cuda/overlap.h"

namespace freeio::cuda {
namespace {

namespace py = pybind11;

// One custom call of a program. XLA shares it among the devices that run the program.
template <typename Operands>
struct CustomCall : CustomCallOf<Operands, Call<Operands>> {
  static inline ffi::TypeId id = {};

  // GPU number of each mesh device; -1: the device is on another host. Empty: the mesh has one
  // device, and that may be any GPU.
  std::vector<int64_t> gpus;

  // Of a start: its name, but for the run, and the custom call that waits for it.
  StartName start;
  std::shared_ptr<StartPair> pair;

  // The member of a group that runs on the GPU. Its rank is -1 if there is none.
  GroupMember member(int gpu) const {
    GroupMember found{{}, -1, 0};
    if (gpu < 0) return found;
    if (gpus.empty()) return {{gpu}, 0, static_cast<uint32_t>(this->groups.front())};
    const PlaceInGroup place = this->find([&](int64_t device) { return gpus[device] == gpu; });
    found.rank = place.rank;
    found.mesh_device = place.mesh_device;
    for (const int64_t device : place.devices) found.gpus.push_back(static_cast<int>(gpus[device]));
    return found;
  }
};

ffi::ErrorOr<std::vector<int64_t>> read_gpus(const ffi::Dictionary& attributes) {
  auto gpus = attributes.get<ffi::Span<const int64_t>>("gpus");
  if (!gpus.has_value()) {
    return ffi::Unexpected(
        ffi::Error(ffi::ErrorCode::kInternal, "freeio_jax: custom call lacks attribute gpus"));
  }
  return std::vector<int64_t>(gpus->begin(), gpus->end());
}

// The name of an exchange that runs beside compute, but for the run of the program.
ffi::ErrorOr<StartName> read_start(const ffi::Dictionary& attributes,
                                   const std::vector<int64_t>& gpus) {
  const auto number = attributes.get<int64_t>("start");
  if (!number.has_value()) {
    return ffi::Unexpected(
        ffi::Error(ffi::ErrorCode::kInternal, "freeio_jax: custom call lacks attribute start"));
  }
  Digest program(module_of(attributes));
  for (const int64_t gpu : gpus) program.add({gpu});
  return StartName{program.value(), *number, 0};
}

// `kLane`: kSynchronous, or kOverlap of a call that only starts its exchange.
template <typename Operands, Operation kOperation, Lane kLane = kSynchronous>
ffi::ErrorOr<std::unique_ptr<CustomCall<Operands>>> instantiate(ffi::Dictionary attributes) {
  if (ffi::Error error = starter().ensure(); error.failure()) return ffi::Unexpected(error);
  auto gpus = read_gpus(attributes);
  if (!gpus.has_value()) return ffi::Unexpected(gpus.error());
  auto call = std::make_unique<CustomCall<Operands>>();
  if (ffi::Error error = call->read(kOperation, kLane, attributes); error.failure()) {
    return ffi::Unexpected(error);
  }
  call->gpus = std::move(*gpus);
  if constexpr (kLane == kOverlap) {
    auto start = read_start(attributes, call->gpus);
    if (!start.has_value()) return ffi::Unexpected(start.error());
    call->start = *start;
    call->pair = pair_start(start->program, start->number);
  }
  return call;
}

// Makes a custom call as the GPU with this ordinal runs it.
template <typename Operands>
Status make_call(const CustomCall<Operands>& custom_call, int32_t ordinal,
                 const typename Operands::Types& types, std::unique_ptr<Call<Operands>>& call) {
  GroupMember member = custom_call.member(gpu_number(ordinal));
  if (member.rank < 0) return not_in_mesh(ordinal);
  call = std::make_unique<Call<Operands>>(
      CallSite{custom_call.operation, custom_call.layout, std::move(member), custom_call.name,
               custom_call.share},
      types);
  return {};
}

template <typename Operands, typename Run>
ffi::Error run_on_gpu(CustomCall<Operands>* custom_call, int32_t ordinal,
                      ffi::Buffer<ffi::U32, 0> device, const ffi::RemainingArgs& args,
                      const ffi::RemainingRets& rets, const Run& run) {
  return custom_call->run_on_gpu(
      ordinal, device.typed_data(), args, rets,
      [&](const auto& types, auto& call) { return make_call(*custom_call, ordinal, types, call); },
      run);
}

template <typename Operands>
ffi::Error execute(CustomCall<Operands>* custom_call, void* stream, int32_t ordinal,
                   ffi::Buffer<ffi::U32, 0> device, ffi::RemainingArgs args,
                   ffi::RemainingRets rets, ffi::Dictionary) {
  return run_on_gpu(
      custom_call, ordinal, device, args, rets,
      [&](Call<Operands>& call, const Operands& operands) { return call.run(operands, stream); });
}

template <typename Operands>
auto execute_binding() {
  return binding_of_run<CustomCall<Operands>>();
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

// --- freeio_<operation>_start, freeio_done -------------------------------------------------------
//
// XLA must not capture them: a captured stream cannot wait for what runs on the overlap stream.

ffi::Error add_buffers(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                       CallBuffers& buffers) {
  for (size_t i = 0; i < args.size(); ++i) {
    auto buffer = args.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    buffers.arguments.push_back(buffer->untyped_data());
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    auto buffer = rets.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    buffers.results.push_back((*buffer)->untyped_data());
  }
  return ffi::Error::Success();
}

template <typename Operands>
ffi::Error execute_start(CustomCall<Operands>* custom_call, void* stream, int32_t ordinal,
                         ffi::RunId run, ffi::Buffer<ffi::U32, 0> device, ffi::RemainingArgs args,
                         ffi::RemainingRets rets, ffi::Dictionary) {
  // XLA has made all custom calls of the program before it runs.
  if (!custom_call->pair->has_wait) {
    Connection gpu;
    if (find_gpu(ordinal, gpu).ok()) gpu.overlap->wait_for_all(stream);
    return to_error(never_waited_for(custom_call->operation));
  }
  CallBuffers buffers;
  buffers.arguments.push_back(device.typed_data());
  if (ffi::Error error = add_buffers(args, rets, buffers); error.failure()) return error;
  StartName name = custom_call->start;
  name.run = run.run_id;
  return run_on_gpu(custom_call, ordinal, device, args, rets,
                    [&](Call<Operands>& call, const Operands& operands) {
                      return call.start(operands, name, std::move(buffers), stream);
                    });
}

template <typename Operands>
auto start_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<CustomCall<Operands>>>()
      .template Ctx<ffi::PlatformStream<void*>>()
      .template Ctx<ffi::DeviceOrdinal>()
      .template Ctx<ffi::RunId>()
      .template Arg<ffi::Buffer<ffi::U32, 0>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs();
}

XLA_FFI_DEFINE_HANDLER(kMakeDispatchStart,
                       (instantiate<DispatchOperands, Operation::kDispatch, kOverlap>),
                       ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kMakeDispatchAlongStart,
                       (instantiate<DispatchOperands, Operation::kDispatchAlong, kOverlap>),
                       ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kMakeCombineStart,
                       (instantiate<CombineOperands, Operation::kCombine, kOverlap>),
                       ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(
    kMakeCombineTransposeStart,
    (instantiate<CombineTransposeOperands, Operation::kCombineTranspose, kOverlap>),
    ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kDispatchStart, execute_start<DispatchOperands>,
                       start_binding<DispatchOperands>());
XLA_FFI_DEFINE_HANDLER(kCombineStart, execute_start<CombineOperands>,
                       start_binding<CombineOperands>());
XLA_FFI_DEFINE_HANDLER(kCombineTransposeStart, execute_start<CombineTransposeOperands>,
                       start_binding<CombineTransposeOperands>());

// The custom call that waits for an exchange. XLA shares it among the devices that run the program.
struct Done {
  static inline ffi::TypeId id = {};

  struct OnGpu {
    std::mutex mutex;  // XLA may run the program twice at once
    WaitingCall call;
  };

  StartName start;  // but for the run
  std::shared_ptr<StartPair> pair;
  std::array<OnGpu, kMaxOrdinals> on_gpus;  // by CUDA ordinal
};

ffi::ErrorOr<std::unique_ptr<Done>> instantiate_done(ffi::Dictionary attributes) {
  if (ffi::Error error = starter().ensure(); error.failure()) return ffi::Unexpected(error);
  auto gpus = read_gpus(attributes);
  if (!gpus.has_value()) return ffi::Unexpected(gpus.error());
  auto start = read_start(attributes, *gpus);
  if (!start.has_value()) return ffi::Unexpected(start.error());
  auto done = std::make_unique<Done>();
  done->start = *start;
  done->pair = pair_wait(start->program, start->number);
  return done;
}

// The operands are those of the start, and then its results, scratch included. Each result is the
// operand that it stands for, in place.
ffi::Error execute_done(Done* done, void* stream, int32_t ordinal, ffi::RunId run,
                        ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary) {
  if (ffi::Error error = check_ordinal(ordinal); error.failure()) return error;
  CallBuffers buffers;
  if (ffi::Error error = add_buffers(args, rets, buffers); error.failure()) return error;
  StartName name = done->start;
  name.run = run.run_id;
  auto& [mutex, call] = done->on_gpus[ordinal];
  std::lock_guard lock(mutex);
  return to_error(call.run(ordinal, name, buffers, stream));
}

XLA_FFI_DEFINE_HANDLER(kMakeDone, instantiate_done, ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kDone, execute_done,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<Done>>()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::RunId>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs());

// --- freeio_check --------------------------------------------------------------------------------
//
// XLA does not call execute() when it replays launches that it captured in an earlier run, so a
// failed exchange would go unnoticed. But XLA calls the initialize stage of a custom call before
// every run. Each such call takes about a microsecond of the host's time. So only one
// custom call of each block of a program has this stage: freeio_check, which launches nothing.

struct ProgramCheck {
  static inline ffi::TypeId id = {};

  std::vector<int64_t> gpus;            // as CustomCall::gpus
  std::atomic<uint64_t> generation{0};  // of the engine in the first run; 0: there was no run
};

ffi::ErrorOr<std::unique_ptr<ProgramCheck>> instantiate_check(ffi::Dictionary attributes) {
  if (ffi::Error error = starter().ensure(); error.failure()) return ffi::Unexpected(error);
  auto gpus = read_gpus(attributes);
  if (!gpus.has_value()) return ffi::Unexpected(gpus.error());
  auto check = std::make_unique<ProgramCheck>();
  check->gpus = std::move(*gpus);
  return check;
}

ffi::Error check_before_run(ProgramCheck* check, ffi::Dictionary) {
  const uint64_t now = generation();
  uint64_t then = check->generation;
  if (then == 0 && check->generation.compare_exchange_strong(then, now)) then = now;
  if (then != now) {
    return ffi::Error(
        ffi::ErrorCode::kFailedPrecondition,
        "freeio_jax: this program ran before freeio_jax.shutdown(), and what XLA has "
        "captured of it names memory of then. Call jax.clear_caches(), and it will be "
        "compiled anew.");
  }
  return to_error(state_of(check->gpus));
}

ffi::Error do_nothing(ProgramCheck*, ffi::Dictionary) { return ffi::Error::Success(); }

XLA_FFI_DEFINE_HANDLER(kMakeCheck, instantiate_check, ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kCheckBeforeRun, check_before_run,
                       ffi::Ffi::BindInitialize().Ctx<ffi::State<ProgramCheck>>().Attrs());
XLA_FFI_DEFINE_HANDLER(kCheck, do_nothing, ffi::Ffi::Bind().Ctx<ffi::State<ProgramCheck>>().Attrs(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Starter& starter() {
  static Starter instance;
  return instance;
}

py::dict ffi_types() {
  py::dict types;
  add_ffi_type<CustomCall<DispatchOperands>>("freeio_cuda_dispatch", types);
  add_ffi_type<CustomCall<CombineOperands>>("freeio_cuda_combine", types);
  add_ffi_type<CustomCall<CombineTransposeOperands>>("freeio_cuda_combine_transpose", types);
  add_ffi_type<Done>("freeio_cuda_done", types);
  add_ffi_type<ProgramCheck>("freeio_cuda_check", types);
  return types;
}

py::dict ffi_targets() {
  py::dict targets =
      ffi_targets_of({kMakeDispatch, kDispatch}, {kMakeDispatchAlong, kDispatch},
                     {kMakeCombine, kCombine}, {kMakeCombineTranspose, kCombineTranspose});
  const py::dict starts = ffi_targets_of(
      {kMakeDispatchStart, kDispatchStart}, {kMakeDispatchAlongStart, kDispatchStart},
      {kMakeCombineStart, kCombineStart}, {kMakeCombineTransposeStart, kCombineTransposeStart});
  for (const auto& [name, handlers] : starts) {
    targets[(py::cast<std::string>(name) + "_start").c_str()] = handlers;
  }
  targets["freeio_done"] = handlers_of({kMakeDone, kDone});
  targets["freeio_check"] = handlers_of({kMakeCheck, kCheck, kCheckBeforeRun});
  return targets;
}

}  // namespace freeio::cuda
