#include "cuda/handlers.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "core/buffers.h"
#include "cuda/engine.h"
#include "cuda/geometry.h"
#include "cuda/kernels.h"
#include "cuda/measure.h"

namespace freeio::cuda {
namespace {

namespace py = pybind11;

enum Op : uint32_t { kDispatchOp, kDispatchAlongOp, kCombineOp, kCombineTransposeOp };

// One custom-call instance; XLA shares it among the devices that run the program.
struct Instance {
  static inline ffi::TypeId id = {};

  Layout layout;
  std::vector<int64_t> groups;    // mesh device indices, a group after the other, by rank
  std::vector<int64_t> ordinals;  // CUDA ordinal of each mesh device
  uint32_t number;                // of the instance in this process

  // The member that runs on the GPU `ordinal`; the rank is -1 if none does.
  Member member(int32_t ordinal) const {
    Member found{{}, -1, 0, nullptr};
    for (size_t i = 0; i < groups.size(); ++i) {
      if (ordinals[groups[i]] != ordinal) continue;
      const auto num_ranks = static_cast<size_t>(layout.num_ranks);
      found.rank = static_cast<int>(i % num_ranks);
      found.mesh_device = static_cast<uint32_t>(groups[i]);
      for (size_t j = i - i % num_ranks; j < i - i % num_ranks + num_ranks; ++j) {
        found.ordinals.push_back(static_cast<int>(ordinals[groups[j]]));
      }
      break;
    }
    return found;
  }
};

ffi::ErrorOr<std::unique_ptr<Instance>> instantiate(ffi::Dictionary attributes) {
  static std::atomic<uint32_t> instances{0};
  auto call = read_attributes(attributes);
  if (!call.has_value()) return ffi::Unexpected(call.error());
  auto ordinals = attributes.get<ffi::Span<const int64_t>>("ordinals");
  if (!ordinals.has_value()) {
    return ffi::Unexpected(
        ffi::Error(ffi::ErrorCode::kInternal, "freeio_jax: custom call lacks attribute ordinals"));
  }
  return std::make_unique<Instance>(
      Instance{call->layout, std::move(call->groups),
               std::vector<int64_t>(ordinals->begin(), ordinals->end()), ++instances});
}

// One launch, ready to go.
struct Launch {
  const void* function = nullptr;
  size_t shared_bytes = 0;
};

// FNV-1a, for what the ranks' buffers must agree on beyond the layout.
uint32_t digest(std::initializer_list<int64_t> values, uint32_t hash = 2166136261u) {
  for (int64_t value : values) {
    for (int byte = 0; byte < 8; ++byte, value >>= 8) {
      hash = (hash ^ static_cast<uint32_t>(value & 0xff)) * 16777619u;
    }
  }
  return hash;
}

// The widest access, up to 16 bytes, that suits rows of `row_bytes` at these addresses.
int32_t access_bytes(int64_t row_bytes, std::initializer_list<const void*> buffers) {
  uint64_t bits = 16 | static_cast<uint64_t>(row_bytes);
  for (const void* buffer : buffers) bits |= reinterpret_cast<uint64_t>(buffer);
  return static_cast<int32_t>(bits & (~bits + 1));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts `accesses` of a row evenly into slices of whole warps, at most `most` each.
std::pair<int32_t, int32_t> slices_of(int64_t accesses, int64_t most) {
  constexpr int64_t kWarp = 32;
  const int64_t slices = std::max<int64_t>(1, ceil_div(accesses, most));
  const int64_t each = std::max(kWarp, round_up(ceil_div(accesses, slices), kWarp));
  return {static_cast<int32_t>(std::max<int64_t>(1, ceil_div(accesses, each))),
          static_cast<int32_t>(each)};
}

void read_leaves(Buffers& buffers, DispatchParams& params) {
  uint32_t hash = digest({});
  while (buffers.has_arg() && params.num_leaves < kMaxLeaves) {
    Leaf& leaf = params.leaves[params.num_leaves];
    const ffi::AnyBuffer* tokens = buffers.arg();
    ffi::AnyBuffer* rows = buffers.ret();
    if (!buffers.ok()) return;
    leaf.tokens = static_cast<const std::byte*>(tokens->untyped_data());
    leaf.rows = static_cast<std::byte*>(rows->untyped_data());
    leaf.row_bytes = Buffers::row_bytes(*tokens);
    leaf.access_bytes = access_bytes(leaf.row_bytes, {leaf.tokens, leaf.rows});
    const auto [slices, accesses] = slices_of(leaf.row_bytes / leaf.access_bytes, kCopySlice);
    leaf.num_slices = slices;
    leaf.slice_bytes = accesses * leaf.access_bytes;
    hash = digest({leaf.row_bytes, leaf.access_bytes}, hash);
    params.num_slices += slices;
    ++params.num_leaves;
  }
  params.exchange.signature[kRows] = hash;
}

Launch read_dispatch(Buffers& buffers, const ffi::Dictionary&, DispatchParams& params) {
  params.exchange.signature[kOp] = kDispatchOp;
  params.row_stride = spreading_stride(params.exchange.capacity);
  params.topk_idx = buffers.arg_data<int32_t>();
  read_leaves(buffers, params);
  params.dest_rank = buffers.ret_data<int32_t>();
  params.dest_row = buffers.ret_data<int32_t>();
  params.row_source = buffers.ret_data<int32_t>();
  params.group_sizes = buffers.ret_data<int32_t>();
  params.expert_load = buffers.ret_data<int32_t>();
  params.num_dropped = buffers.ret_data<int32_t>();
  params.num_invalid = buffers.ret_data<int32_t>();
  params.routes = buffers.ret_data<Word>();
  return {dispatch_function(true), dispatch_shared_bytes(params.exchange.num_experts)};
}

Launch read_dispatch_along(Buffers& buffers, const ffi::Dictionary&, DispatchParams& params) {
  params.exchange.signature[kOp] = kDispatchAlongOp;
  params.row_stride = spreading_stride(params.exchange.capacity);
  // The kernel writes to them only where it routes.
  params.dest_rank = const_cast<int32_t*>(buffers.arg_data<int32_t>());
  params.dest_row = const_cast<int32_t*>(buffers.arg_data<int32_t>());
  params.row_source = const_cast<int32_t*>(buffers.arg_data<int32_t>());
  read_leaves(buffers, params);
  return {dispatch_function(false), dispatch_shared_bytes(0)};
}

// Elements that one lane takes at a time.
int32_t pack_of(DType dtype, bool wide) {
  int32_t elements = 1;
  with_element_type(dtype, [&](auto tag) {
    if (wide) elements = wide_pack(sizeof(typename decltype(tag)::Type));
  });
  return elements;
}

int64_t bytes_of(DType dtype) {
  int64_t bytes = 0;
  with_element_type(dtype, [&](auto tag) { bytes = sizeof(typename decltype(tag)::Type); });
  return bytes;
}

bool is_wide(DType dtype, int64_t width, std::initializer_list<const void*> buffers) {
  const int64_t bytes = bytes_of(dtype);
  return access_bytes(width * bytes, buffers) >= bytes * pack_of(dtype, true);
}

Launch read_combine(Buffers& buffers, const ffi::Dictionary& attributes, CombineParams& params) {
  DType dtype = DType::kFloat32;
  int64_t width = 0;
  params.dest_rank = buffers.arg_data<int32_t>();
  params.dest_row = buffers.arg_data<int32_t>();
  buffers.arg();  // row_source: the CPU engine's
  const ffi::AnyBuffer* expert_out = buffers.arg();
  buffers.row_type(expert_out, dtype, width);
  if (expert_out != nullptr) params.expert_out = expert_out->untyped_data();
  const bool weighted = read_flag(attributes, "weighted");
  if (weighted) params.weights = buffers.arg_data<void>();
  params.sums = buffers.ret_data<void>();
  params.partial_sums = buffers.ret_data<void>();
  params.flags = buffers.ret_data<uint32_t>();
  const bool wide = is_wide(dtype, width, {params.expert_out, params.sums, params.partial_sums});
  const auto [slices, accesses] =
      slices_of(width / pack_of(dtype, wide), sum_slice(params.exchange.num_tokens));
  params.width = static_cast<int32_t>(width);
  params.num_slots = std::min(params.exchange.top_k, params.exchange.num_ranks - 1);
  params.num_slices = slices;
  params.slice_width = accesses * pack_of(dtype, wide);
  params.exchange.signature[kOp] = kCombineOp;
  params.exchange.signature[kRows] = digest({static_cast<int>(dtype), width, wide, weighted});
  return {combine_function(dtype, wide), combine_shared_bytes(dtype)};
}

Launch read_combine_transpose(Buffers& buffers, const ffi::Dictionary& attributes,
                              CombineTransposeParams& params) {
  DType dtype = DType::kFloat32;
  int64_t width = 0;
  params.dest_rank = buffers.arg_data<int32_t>();
  params.dest_row = buffers.arg_data<int32_t>();
  params.row_source = buffers.arg_data<int32_t>();
  const ffi::AnyBuffer* tokens = buffers.arg();
  buffers.row_type(tokens, dtype, width);
  if (tokens != nullptr) params.tokens = tokens->untyped_data();
  const bool rows = read_flag(attributes, "rows");
  const bool weights = read_flag(attributes, "weights");
  if (weights) params.expert_out = buffers.arg_data<void>();
  if (rows) params.weights = buffers.arg_data<void>();
  if (rows) params.rows = buffers.ret_data<void>();
  if (weights) params.weight_grads = buffers.ret_data<void>();
  const bool wide = is_wide(dtype, width, {params.tokens, params.expert_out, params.rows});
  const auto [slices, accesses] =
      slices_of(width / pack_of(dtype, wide), sum_slice(params.exchange.num_tokens));
  params.width = static_cast<int32_t>(width);
  params.num_slices = slices;
  params.slice_width = accesses * pack_of(dtype, wide);
  params.row_stride = spreading_stride(params.exchange.capacity);
  params.exchange.signature[kOp] = kCombineTransposeOp;
  params.exchange.signature[kRows] = digest({static_cast<int>(dtype), width, wide, rows, weights});
  return {combine_transpose_function(dtype, wide), combine_transpose_shared_bytes()};
}

template <typename Params, auto kRead>
ffi::Error execute(Instance* instance, void* stream, int32_t ordinal,
                   ffi::Buffer<ffi::U32, 0> device, ffi::RemainingArgs args,
                   ffi::RemainingRets rets, ffi::Dictionary attributes) {
  Member member = instance->member(ordinal);
  member.device = device.typed_data();
  if (member.rank < 0) {
    return ffi::Error(
        ffi::ErrorCode::kInternal,
        "freeio_jax: CUDA device " + std::to_string(ordinal) + " is not in the mesh of this call.");
  }
  Params params = {};
  Status status = describe(instance->layout, member, params.exchange);
  if (!status.ok()) return to_error(status);
  params.exchange.signature[kInstance] = instance->number;
  Buffers buffers(args, rets);
  const Launch kernel = kRead(buffers, attributes, params);
  if (!buffers.ok()) return buffers.error();
  return to_error(launch(kernel.function, params.exchange, &params, kernel.shared_bytes, stream));
}

auto execute_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<Instance>>()
      .Ctx<ffi::PlatformStream<void*>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Arg<ffi::Buffer<ffi::U32, 0>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs();
}

// The kernels advance their own state: a captured launch can be replayed as it is.
XLA_FFI_DEFINE_HANDLER(kInstantiate, instantiate, ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kDispatch, (execute<DispatchParams, read_dispatch>), execute_binding(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kDispatchAlong, (execute<DispatchParams, read_dispatch_along>),
                       execute_binding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCombine, (execute<CombineParams, read_combine>), execute_binding(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCombineTranspose, (execute<CombineTransposeParams, read_combine_transpose>),
                       execute_binding(), {ffi::Traits::kCmdBufferCompatible});

template <typename T>
py::capsule capsule(T* pointer) {
  return py::capsule(reinterpret_cast<void*>(pointer));
}

// Only looks for the library: initializing CUDA would be felt by a process that forks later.
bool has_driver() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver == nullptr) return false;
  dlclose(driver);
  return true;
}

py::dict ffi_types() {
  static constexpr ffi::TypeInfo kInfo = ffi::MakeTypeInfo<Instance>();
  py::dict type;
  type["type_id"] = capsule(&Instance::id);
  type["type_info"] = capsule(const_cast<ffi::TypeInfo*>(&kInfo));
  py::dict types;
  types["freeio_cuda_instance"] = type;
  return types;
}

py::dict ffi_targets() {
  py::dict targets;
  const auto add = [&](const char* name, XLA_FFI_Handler* handler) {
    py::dict stages;
    stages["instantiate"] = capsule(kInstantiate);
    stages["execute"] = capsule(handler);
    targets[name] = stages;
  };
  add("freeio_dispatch", kDispatch);
  add("freeio_dispatch_along", kDispatchAlong);
  add("freeio_combine", kCombine);
  add("freeio_combine_transpose", kCombineTranspose);
  return targets;
}

}  // namespace

void add_module(py::module_& native) {
  py::module_ module = native.def_submodule("cuda", "The CUDA engine.");
  module.attr("max_ranks") = kMaxRanks;
  module.attr("max_experts") = kMaxExperts;
  module.attr("max_top_k") = kMaxTopK;
  module.attr("max_leaves") = kMaxLeaves;
  module.def("sum_slice", &sum_slice, py::arg("num_tokens"),
             "Elements, at least, in one slice of a row that combine sums.");
  module.def("has_driver", &has_driver, "Whether this machine has NVIDIA's driver.");
  module.def("can_access_peer", &can_access_peer, py::arg("from_ordinal"), py::arg("to_ordinal"));
  module.def("device_bytes", &device_bytes,
             "Bytes of device memory that the engine owns on each GPU.");
  module.def(
      "start",
      [](const std::vector<int>& ordinals) {
        const Status status = start(ordinals);
        if (!status.ok()) throw std::runtime_error(status.message);
      },
      py::arg("ordinals"), "Prepares these GPUs of the process, by CUDA ordinal.");
  module.def("memory_bandwidth", &memory_bandwidth, py::arg("ordinal"), py::arg("bytes"));
  module.def("link_bandwidth", &link_bandwidth, py::arg("ordinals"), py::arg("bytes"),
             py::arg("ctas"), py::arg("pull"));
  module.def("flag_trip", &flag_trip, py::arg("source"), py::arg("target"));
  module.def("ffi_types", &ffi_types);
  module.def("ffi_targets", &ffi_targets);
}

}  // namespace freeio::cuda
