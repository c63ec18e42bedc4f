// What the handlers of a custom call have in common, whoever makes the exchange: the call that XLA
// keeps, and how its attributes and buffers are read.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/buffers.h"
#include "core/digest.h"
#include "core/layout.h"
#include "core/operations.h"
#include "core/status.h"
#include "cuda/gpus.h"
#include "cuda/operands.h"

namespace freeio::cuda {

constexpr int kMaxOrdinals = 64;  // a process may see more GPUs than take part in a pod

// Fills what the attributes say about the types.
inline void read_flags(Operation operation, const ffi::Dictionary&, DispatchTypes& types) {
  types.routed = operation == Operation::kDispatch;
}
inline void read_flags(Operation, const ffi::Dictionary& attributes, CombineTypes& types) {
  types.weighted = read_flag(attributes, "weighted");
}
inline void read_flags(Operation, const ffi::Dictionary& attributes, CombineTransposeTypes& types) {
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

// An attribute that is a number; absent: the default.
inline int64_t read_number(const ffi::Dictionary& attributes, const char* name, int64_t otherwise) {
  const auto value = attributes.get<int64_t>(name);
  return value.has_value() ? *value : otherwise;
}

inline ffi::Error check_ordinal(int32_t ordinal) {
  if (ordinal >= 0 && ordinal < kMaxOrdinals) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal,
                    "freeio_jax: CUDA device " + std::to_string(ordinal) +
                        " is beyond the engine's " + std::to_string(kMaxOrdinals) +
                        ". Leave GPUs out with CUDA_VISIBLE_DEVICES.");
}

inline Status not_in_mesh(int32_t ordinal) {
  return {Code::kInternal, "freeio_jax: CUDA device " + std::to_string(ordinal) +
                               " is not in the mesh of this call."};
}

// A mesh device's place in its group.
struct PlaceInGroup {
  int rank = -1;  // -1: the device is in no group
  uint32_t mesh_device = 0;
  std::vector<int64_t> devices;  // of the group, as indices in the mesh, by rank
};

// One custom call of a program. XLA shares it among the devices that run the program. `CallOnGpu`:
// the call as one GPU runs it.
template <typename Operands, typename CallOnGpu>
struct CustomCallOf {
  using Types = typename Operands::Types;

  struct OnGpu {
    std::mutex mutex;  // XLA may run the program twice at once
    std::unique_ptr<CallOnGpu> call;
  };

  Operation operation;
  Layout layout;
  std::vector<int64_t> groups;  // mesh device indices, a group after the other, by rank
  uint32_t name;                // a digest of this call and its program
  LaneShare share;
  Types types = {};                         // only what the attributes say
  std::array<OnGpu, kMaxOrdinals> on_gpus;  // by CUDA ordinal

  // Reads the attributes of a call that runs in the lane.
  ffi::Error read(Operation its_operation, Lane lane, const ffi::Dictionary& attributes) {
    auto attributes_of_all = read_attributes(attributes);
    if (!attributes_of_all.has_value()) return attributes_of_all.error();
    operation = its_operation;
    // The ranks' n-th calls belong together. Their names are compared, to find ranks that make
    // different calls.
    name = Digest(identity_of(static_cast<int64_t>(operation), *attributes_of_all, attributes))
               .folded();
    layout = attributes_of_all->layout;
    groups = std::move(attributes_of_all->groups);
    read_flags(operation, attributes, types);
    share.lane = lane;
    share.num_sms = read_number(attributes, "num_sms", 0);
    share.starts_num_sms = read_number(attributes, "starts_num_sms", LaneShare::kNoStarts);
    return ffi::Error::Success();
  }

  // The place of the first device in a group for which is_it(index in the mesh) is true.
  template <typename IsIt>
  PlaceInGroup find(const IsIt& is_it) const {
    PlaceInGroup place;
    const auto num_ranks = static_cast<size_t>(layout.num_ranks);
    for (size_t i = 0; i < groups.size(); ++i) {
      if (!is_it(groups[i])) continue;
      const auto first = groups.begin() + static_cast<std::ptrdiff_t>(i - i % num_ranks);
      place.rank = static_cast<int>(i % num_ranks);
      place.mesh_device = static_cast<uint32_t>(groups[i]);
      place.devices.assign(first, first + layout.num_ranks);
      break;
    }
    return place;
  }

  // Reads the buffers of a run, and calls run(call, operands) with the call as this GPU runs it. In
  // its first run on the GPU, make(types, call) makes the call.
  template <typename Make, typename Run>
  ffi::Error run_on_gpu(int32_t ordinal, const uint32_t* device, const ffi::RemainingArgs& args,
                        const ffi::RemainingRets& rets, const Make& make, const Run& run) {
    if (ffi::Error error = check_ordinal(ordinal); error.failure()) return error;
    auto& [mutex, call] = on_gpus[ordinal];
    std::lock_guard lock(mutex);
    Buffers buffers(args, rets);
    Operands operands = {};
    operands.device = device;
    if (call != nullptr) {
      CallReader reader(buffers);
      visit_buffers(types, operands, reader);
      return buffers.ok() ? to_error(run(*call, operands)) : buffers.error();
    }
    Types types_of_buffers = types;
    CallReader reader(buffers, types_of_buffers);
    visit_buffers(types, operands, reader);
    if (!buffers.ok()) return buffers.error();
    const Status status = make(types_of_buffers, call);
    return to_error(status.ok() ? run(*call, operands) : status);
  }
};

// What XLA passes to a handler that runs a custom call of this type.
template <typename CustomCall>
auto binding_of_run() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<CustomCall>>()
      .template Ctx<ffi::PlatformStream<void*>>()
      .template Ctx<ffi::DeviceOrdinal>()
      .template Arg<ffi::Buffer<ffi::U32, 0>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs();
}

}  // namespace freeio::cuda
