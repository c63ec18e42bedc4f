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

constexpr int kMaxOrdinals = 64;  // CUDA's numbers of one process's GPUs

// One custom call of a program; XLA shares it among the devices that run the program.
template <typename Operands>
struct Instance {
  static inline ffi::TypeId id = {};

  // What one GPU keeps of it.
  struct OnGpu {
    std::mutex mutex;  // XLA may run the program twice at once
    std::unique_ptr<Call<Operands>> call;
  };

  Operation operation;
  Layout layout;
  std::vector<int64_t> groups;  // mesh device indices, a group after the other, by rank
  // Number of each mesh device's GPU; -1: of another host. Empty: a mesh of one device, whichever.
  std::vector<int64_t> gpus;
  uint32_t name;                            // of the instance in its program
  typename Operands::Types types = {};      // as far as the attributes say
  std::atomic<uint64_t> generation{0};      // of the engine when it first ran; 0: it has not
  std::array<OnGpu, kMaxOrdinals> on_gpus;  // by ordinal

  // The member that runs on the GPU; the rank is -1 if none does.
  Member member(int gpu) const {
    Member found{{}, -1, 0};
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

// What the attributes say of the types.
void read_attributes(Operation operation, const ffi::Dictionary&, DispatchTypes& types) {
  types.routed = operation == Operation::kDispatch;
}
void read_attributes(Operation, const ffi::Dictionary& attributes, CombineTypes& types) {
  types.weighted = read_flag(attributes, "weighted");
}
void read_attributes(Operation, const ffi::Dictionary& attributes, CombineTransposeTypes& types) {
  types.rows = read_flag(attributes, "rows");
  types.weights = read_flag(attributes, "weights");
}

// The buffers in the order of the custom call; what is in them goes to `types` unless that is null.

void read_leaves(Buffers& buffers, DispatchOperands& operands, DispatchTypes* types) {
  for (int i = 0; i < kMaxLeaves && buffers.has_arg(); ++i) {
    const ffi::AnyBuffer* tokens = buffers.arg();
    ffi::AnyBuffer* rows = buffers.ret();
    if (!buffers.ok()) return;
    operands.leaves[i] = {tokens->untyped_data(), rows->untyped_data()};
    if (types == nullptr) continue;
    types->leaves[i] = {Buffers::row_bytes(*tokens), Buffers::row_digest(*tokens)};
    types->num_leaves = i + 1;
  }
}

void read(Buffers& buffers, const DispatchTypes& known, DispatchOperands& operands,
          DispatchTypes* types) {
  if (!known.routed) {
    // The kernel writes to them only where it routes.
    operands.dest_rank = const_cast<int32_t*>(buffers.arg_data<int32_t>());
    operands.dest_row = const_cast<int32_t*>(buffers.arg_data<int32_t>());
    operands.row_source = const_cast<int32_t*>(buffers.arg_data<int32_t>());
    return read_leaves(buffers, operands, types);
  }
  operands.topk_idx = buffers.arg_data<int32_t>();
  read_leaves(buffers, operands, types);
  operands.dest_rank = buffers.ret_data<int32_t>();
  operands.dest_row = buffers.ret_data<int32_t>();
  operands.row_source = buffers.ret_data<int32_t>();
  operands.group_sizes = buffers.ret_data<int32_t>();
  operands.expert_load = buffers.ret_data<int32_t>();
  operands.num_dropped = buffers.ret_data<int32_t>();
  operands.num_invalid = buffers.ret_data<int32_t>();
  operands.places = buffers.ret_data<Word>();
}

// The next argument's rows.
template <typename Types>
const void* read_rows(Buffers& buffers, Types* types) {
  const ffi::AnyBuffer* rows = buffers.arg();
  if (types != nullptr) buffers.row_type(rows, types->dtype, types->width);
  return rows == nullptr ? nullptr : rows->untyped_data();
}

void read(Buffers& buffers, const CombineTypes& known, CombineOperands& operands,
          CombineTypes* types) {
  operands.dest_rank = buffers.arg_data<int32_t>();
  operands.dest_row = buffers.arg_data<int32_t>();
  buffers.arg();  // row_source: the CPU engine's
  operands.expert_out = read_rows(buffers, types);
  if (known.weighted) operands.weights = buffers.arg_data<void>();
  operands.sums = buffers.ret_data<void>();
  operands.partial_sums = buffers.ret_data<void>();
  operands.flags = buffers.ret_data<uint32_t>();
}

void read(Buffers& buffers, const CombineTransposeTypes& known, CombineTransposeOperands& operands,
          CombineTransposeTypes* types) {
  operands.dest_rank = buffers.arg_data<int32_t>();
  operands.dest_row = buffers.arg_data<int32_t>();
  operands.row_source = buffers.arg_data<int32_t>();
  operands.tokens = read_rows(buffers, types);
  if (known.weights) operands.expert_out = buffers.arg_data<void>();
  if (known.rows) operands.weights = buffers.arg_data<void>();
  if (known.rows) operands.rows = buffers.ret_data<void>();
  if (known.weights) operands.weight_grads = buffers.ret_data<void>();
}

template <typename Operands, Operation kOperation>
ffi::ErrorOr<std::unique_ptr<Instance<Operands>>> instantiate(ffi::Dictionary attributes) {
  if (ffi::Error error = starter().ensure(); error.failure()) return ffi::Unexpected(error);
  auto call = freeio::read_attributes(attributes);
  if (!call.has_value()) return ffi::Unexpected(call.error());
  auto gpus = attributes.get<ffi::Span<const int64_t>>("gpus");
  if (!gpus.has_value()) {
    return ffi::Unexpected(
        ffi::Error(ffi::ErrorCode::kInternal, "freeio_jax: custom call lacks attribute gpus"));
  }
  auto instance = std::make_unique<Instance<Operands>>();
  instance->operation = kOperation;
  instance->layout = call->layout;
  instance->groups = std::move(call->groups);
  instance->gpus.assign(gpus->begin(), gpus->end());
  // Ranks pair their calls by the order in which they come; the name is compared, no more.
  instance->name =
      Digest(identity_of(static_cast<int64_t>(kOperation), *call, attributes)).folded();
  read_attributes(kOperation, attributes, instance->types);
  return instance;
}

// XLA calls it before every run of a program. It does not call execute() where it replays the
// launches of an earlier run, and nobody would be told there that an exchange has failed.
template <typename Operands>
ffi::Error initialize(Instance<Operands>* instance, ffi::RemainingArgs, ffi::RemainingRets,
                      ffi::Dictionary) {
  const uint64_t now = generation();
  uint64_t then = instance->generation;
  if (then == 0 && instance->generation.compare_exchange_strong(then, now)) then = now;
  if (then != now) {
    return ffi::Error(
        ffi::ErrorCode::kFailedPrecondition,
        "freeio_jax: this program ran before freeio_jax.shutdown(), and what XLA has "
        "captured of it names memory of then. Call jax.clear_caches(), and it will be "
        "compiled anew.");
  }
  return to_error(state_of(instance->gpus));
}

template <typename Operands>
ffi::Error execute(Instance<Operands>* instance, void* stream, int32_t ordinal,
                   ffi::Buffer<ffi::U32, 0> device, ffi::RemainingArgs args,
                   ffi::RemainingRets rets, ffi::Dictionary) {
  if (ordinal < 0 || ordinal >= kMaxOrdinals) {
    return ffi::Error(ffi::ErrorCode::kInternal,
                      "freeio_jax: CUDA device " + std::to_string(ordinal) +
                          " is beyond the engine's " + std::to_string(kMaxOrdinals) +
                          ". Leave GPUs out with CUDA_VISIBLE_DEVICES.");
  }
  auto& [mutex, call] = instance->on_gpus[ordinal];
  std::lock_guard lock(mutex);
  Buffers buffers(args, rets);
  Operands operands = {};
  operands.device = device.typed_data();
  if (call != nullptr) {
    read(buffers, instance->types, operands, nullptr);
    return buffers.ok() ? to_error(call->run(operands, stream)) : buffers.error();
  }
  Member member = instance->member(gpu_number(ordinal));
  if (member.rank < 0) {
    return ffi::Error(
        ffi::ErrorCode::kInternal,
        "freeio_jax: CUDA device " + std::to_string(ordinal) + " is not in the mesh of this call.");
  }
  auto types = instance->types;
  read(buffers, instance->types, operands, &types);
  if (!buffers.ok()) return buffers.error();
  call = std::make_unique<Call<Operands>>(
      CallSite{instance->operation, instance->layout, std::move(member), instance->name}, types);
  return to_error(call->run(operands, stream));
}

template <typename Operands>
auto initialize_binding() {
  return ffi::Ffi::BindInitialize()
      .Ctx<ffi::State<Instance<Operands>>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs();
}

template <typename Operands>
auto execute_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<Instance<Operands>>>()
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

XLA_FFI_DEFINE_HANDLER(kInitializeDispatch, initialize<DispatchOperands>,
                       initialize_binding<DispatchOperands>());
XLA_FFI_DEFINE_HANDLER(kInitializeCombine, initialize<CombineOperands>,
                       initialize_binding<CombineOperands>());
XLA_FFI_DEFINE_HANDLER(kInitializeCombineTranspose, initialize<CombineTransposeOperands>,
                       initialize_binding<CombineTransposeOperands>());

// The kernels advance their own state: a captured launch can be replayed as it is.
XLA_FFI_DEFINE_HANDLER(kDispatch, execute<DispatchOperands>, execute_binding<DispatchOperands>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCombine, execute<CombineOperands>, execute_binding<CombineOperands>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCombineTranspose, execute<CombineTransposeOperands>,
                       execute_binding<CombineTransposeOperands>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Starter& starter() {
  static Starter instance;
  return instance;
}

py::dict ffi_types() {
  py::dict types;
  add_ffi_type<Instance<DispatchOperands>>("freeio_cuda_dispatch", types);
  add_ffi_type<Instance<CombineOperands>>("freeio_cuda_combine", types);
  add_ffi_type<Instance<CombineTransposeOperands>>("freeio_cuda_combine_transpose", types);
  return types;
}

py::dict ffi_targets() {
  return ffi_targets_of({kMakeDispatch, kDispatch, kInitializeDispatch},
                        {kMakeDispatchAlong, kDispatch, kInitializeDispatch},
                        {kMakeCombine, kCombine, kInitializeCombine},
                        {kMakeCombineTranspose, kCombineTranspose, kInitializeCombineTranspose});
}

}  // namespace freeio::cuda
