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
  uint32_t name;                            // a digest of this call and its program
  typename Operands::Types types = {};      // only what the attributes say
  std::array<OnGpu, kMaxOrdinals> on_gpus;  // by CUDA ordinal

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

template <typename Operands, Operation kOperation>
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
  return call;
}

template <typename Operands>
ffi::Error execute(CustomCall<Operands>* custom_call, void* stream, int32_t ordinal,
                   ffi::Buffer<ffi::U32, 0> device, ffi::RemainingArgs args,
                   ffi::RemainingRets rets, ffi::Dictionary) {
  if (ordinal < 0 || ordinal >= kMaxOrdinals) {
    return ffi::Error(ffi::ErrorCode::kInternal,
                      "freeio_jax: CUDA device " + std::to_string(ordinal) +
                          " is beyond the engine's " + std::to_string(kMaxOrdinals) +
                          ". Leave GPUs out with CUDA_VISIBLE_DEVICES.");
  }
  auto& [mutex, call] = custom_call->on_gpus[ordinal];
  std::lock_guard lock(mutex);
  Buffers buffers(args, rets);
  Operands operands = {};
  operands.device = device.typed_data();
  if (call != nullptr) {
    CallReader reader(buffers);
    visit_buffers(custom_call->types, operands, reader);
    return buffers.ok() ? to_error(call->run(operands, stream)) : buffers.error();
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
      CallSite{custom_call->operation, custom_call->layout, std::move(member), custom_call->name},
      types);
  return to_error(call->run(operands, stream));
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
  add_ffi_type<ProgramCheck>("freeio_cuda_check", types);
  return types;
}

py::dict ffi_targets() {
  py::dict targets =
      ffi_targets_of({kMakeDispatch, kDispatch}, {kMakeDispatchAlong, kDispatch},
                     {kMakeCombine, kCombine}, {kMakeCombineTranspose, kCombineTranspose});
  targets["freeio_check"] = handlers_of({kMakeCheck, kCheck, kCheckBeforeRun});
  return targets;
}

}  // namespace freeio::cuda
