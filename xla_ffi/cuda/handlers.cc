#include "cuda/handlers.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/buffers.h"
#include "core/digest.h"
#include "core/registration.h"
#include "cuda/call.h"
#include "cuda/gpus.h"
#include "cuda/operands.h"
#include "cuda/overlap.h"

namespace freeio::cuda {
namespace {

namespace py = pybind11;

constexpr int kMaxOrdinals = 64;  // a process may see more GPUs than take part in a pod

// One custom call of a program. XLA shares it among the devices that run the program.
template <typename Operands>
struct CustomCall {
  static inline ffi::TypeId id = {};

  // The call as one GPU runs it.
  struct OnGpu {
    std::mutex mutex;  // XLA may run the program twice at once
    std::unique_ptr<Call<Operands>> call;
  };

  Operation operation;
  Layout layout;
  std::vector<int64_t> groups;  // mesh device indices, a group after the other, by rank
  // GPU number of each mesh device; -1: the device is on another host. Empty: the mesh has one
  // device, and that may be any GPU.
  std::vector<int64_t> gpus;
  uint32_t name;  // a digest of this call and its program
  LaneShare share;
  typename Operands::Types types = {};      // only what the attributes say
  std::array<OnGpu, kMaxOrdinals> on_gpus;  // by CUDA ordinal

  // Of a start: its name, but for the run, and the custom call that waits for it.
  StartName start;
  std::shared_ptr<StartPair> pair;

  // The member of a group that runs on the GPU. Its rank is -1 if there is none.
  GroupMember member(int gpu) const {
    GroupMember found{{}, -1, 0};
    if (gpu < 0) return found;
    if (gpus.empty()) return {{gpu}, 0, static_cast<uint32_t>(groups.front())};
    for (size_t i = 0; i < groups.size(); ++i) {
      if (gpus[groups[i]] != gpu) continue;
      const auto num_ranks = static_cast<size_t>(layout.num_ranks);
      found.rank = static_cast<int>(i % num_ranks);
      found.mesh_device = static_cast<uint32_t>(groups[i]);
      for (size_t j = i - i % num_ranks; j < i - i % num_ranks + num_ranks; ++j) {
        found.gpus.push_back(static_cast<int>(gpus[groups[j]]));
      }
      break;
    }
    return found;
  }
};

// Fills what the attributes say about the types.
void read_flags(Operation operation, const ffi::Dictionary&, DispatchTypes& types) {
  types.routed = operation == Operation::kDispatch;
}
void read_flags(Operation, const ffi::Dictionary& attributes, CombineTypes& types) {
  types.weighted = read_flag(attributes, "weighted");
}
void read_flags(Operation, const ffi::Dictionary& attributes, CombineTransposeTypes& types) {
  types.rows = read_flag(attributes, "rows");
  types.weights = read_flag(attributes, "weights");
}

// Reads the buffers of a call into its operands. Given `types`, it also fills these.
struct CallReader : BufferReader {
  DispatchTypes* leaf_types = nullptr;

  explicit CallReader(Buffers& of_call) : BufferReader{of_call} {}
  CallReader(Buffers& of_call, DispatchTypes& types) : BufferReader{of_call}, leaf_types(&types) {}
  template <typename Types>
  CallReader(Buffers& of_call, Types& types) : BufferReader{of_call, &types.dtype, &types.width} {}

  void leaves(LeafBuffers (&leaves)[kMaxLeaves]) {
    for (int i = 0; i < kMaxLeaves && buffers.has_arg(); ++i) {
      const ffi::AnyBuffer* tokens = buffers.arg();
      ffi::AnyBuffer* rows = buffers.ret();
      if (!buffers.ok()) return;
      leaves[i] = {tokens->untyped_data(), rows->untyped_data()};
      if (leaf_types == nullptr) continue;
      leaf_types->leaves[i] = {Buffers::row_bytes(*tokens), Buffers::row_digest(*tokens)};
      leaf_types->num_leaves = i + 1;
    }
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

// An attribute that is a number; absent: the default.
int64_t read_number(const ffi::Dictionary& attributes, const char* name, int64_t otherwise) {
  const auto value = attributes.get<int64_t>(name);
  return value.has_value() ? *value : otherwise;
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
  auto read = read_attributes(attributes);
  if (!read.has_value()) return ffi::Unexpected(read.error());
  auto gpus = read_gpus(attributes);
  if (!gpus.has_value()) return ffi::Unexpected(gpus.error());
  auto call = std::make_unique<CustomCall<Operands>>();
  call->operation = kOperation;
  // The ranks' n-th calls belong together. Their names are compared, to find ranks that make
  // different calls.
  call->name = Digest(identity_of(static_cast<int64_t>(kOperation), *read, attributes)).folded();
  call->layout = read->layout;
  call->groups = std::move(read->groups);
  call->gpus = std::move(*gpus);
  read_flags(kOperation, attributes, call->types);
  call->share.lane = kLane;
  call->share.num_sms = read_number(attributes, "num_sms", 0);
  call->share.starts_num_sms = read_number(attributes, "starts_num_sms", LaneShare::kNoStarts);
  if constexpr (kLane == kOverlap) {
    auto start = read_start(attributes, call->gpus);
    if (!start.has_value()) return ffi::Unexpected(start.error());
    call->start = *start;
    call->pair = pair_start(start->program, start->number);
  }
  return call;
}

ffi::Error check_ordinal(int32_t ordinal) {
  if (ordinal >= 0 && ordinal < kMaxOrdinals) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal,
                    "freeio_jax: CUDA device " + std::to_string(ordinal) +
                        " is beyond the engine's " + std::to_string(kMaxOrdinals) +
                        ". Leave GPUs out with CUDA_VISIBLE_DEVICES.");
}

// Reads the buffers of a run, and calls run(call, operands) with the call as this GPU runs it.
template <typename Operands, typename Run>
ffi::Error run_on_gpu(CustomCall<Operands>* custom_call, int32_t ordinal,
                      ffi::Buffer<ffi::U32, 0> device, const ffi::RemainingArgs& args,
                      const ffi::RemainingRets& rets, const Run& run) {
  if (ffi::Error error = check_ordinal(ordinal); error.failure()) return error;
  auto& [mutex, call] = custom_call->on_gpus[ordinal];
  std::lock_guard lock(mutex);
  Buffers buffers(args, rets);
  Operands operands = {};
  operands.device = device.typed_data();
  if (call != nullptr) {
    CallReader reader(buffers);
    visit_buffers(custom_call->types, operands, reader);
    return buffers.ok() ? to_error(run(*call, operands)) : buffers.error();
  }
  GroupMember member = custom_call->member(gpu_number(ordinal));
  if (member.rank < 0) {
    return ffi::Error(
        ffi::ErrorCode::kInternal,
        "freeio_jax: CUDA device " + std::to_string(ordinal) + " is not in the mesh of this call.");
  }
  auto types = custom_call->types;
  CallReader reader(buffers, types);
  visit_buffers(custom_call->types, operands, reader);
  if (!buffers.ok()) return buffers.error();
  call = std::make_unique<Call<Operands>>(
      CallSite{custom_call->operation, custom_call->layout, std::move(member), custom_call->name,
               custom_call->share},
      types);
  return to_error(run(*call, operands));
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
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<CustomCall<Operands>>>()
      .template Ctx<ffi::PlatformStream<void*>>()
      .template Ctx<ffi::DeviceOrdinal>()
      .template Arg<ffi::Buffer<ffi::U32, 0>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs();
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
