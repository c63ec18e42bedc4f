#include "cuda/handlers.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/buffers.h"
#include "core/digest.h"
#include "core/registration.h"
#include "cuda/geometry.h"
#include "cuda/gpus.h"
#include "cuda/measure.h"
#include "cuda/plan.h"
#include "host/instance_name.h"
#include "host/pod.h"

namespace freeio::cuda {
namespace {

namespace py = pybind11;

// One custom-call instance; XLA shares it among the devices that run the program.
struct Instance {
  static inline ffi::TypeId id = {};

  Layout layout;
  std::vector<int64_t> groups;  // mesh device indices, a group after the other, by rank
  // Number of each mesh device's GPU; -1: of another host. Empty: a mesh of one device, whichever.
  std::vector<int64_t> gpus;
  uint32_t name;                        // of the instance in its program
  std::atomic<uint64_t> generation{0};  // of the engine when it first ran; 0: it has not

  // The member that runs on the GPU; the rank is -1 if none does.
  Member member(int gpu) const {
    Member found{{}, -1, 0, nullptr};
    if (gpus.empty()) return {{gpu}, 0, static_cast<uint32_t>(groups.front()), nullptr};
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

template <Operation kOperation>
ffi::ErrorOr<std::unique_ptr<Instance>> instantiate(ffi::Dictionary attributes) {
  auto call = read_attributes(attributes);
  if (!call.has_value()) return ffi::Unexpected(call.error());
  auto gpus = attributes.get<ffi::Span<const int64_t>>("gpus");
  if (!gpus.has_value()) {
    return ffi::Unexpected(
        ffi::Error(ffi::ErrorCode::kInternal, "freeio_jax: custom call lacks attribute gpus"));
  }
  const host::InstanceName name =
      host::name_instance(identity_of(static_cast<int64_t>(kOperation), *call, attributes));
  auto instance = std::make_unique<Instance>();
  instance->layout = call->layout;
  instance->groups = std::move(call->groups);
  instance->gpus.assign(gpus->begin(), gpus->end());
  instance->name = Digest({static_cast<int64_t>(name.attributes), name.ordinal}).folded();
  return instance;
}

void read_leaves(Buffers& buffers, DispatchParams& params) {
  while (buffers.has_arg() && params.num_leaves < kMaxLeaves) {
    const ffi::AnyBuffer* tokens = buffers.arg();
    ffi::AnyBuffer* rows = buffers.ret();
    if (!buffers.ok()) return;
    add_leaf(tokens->untyped_data(), rows->untyped_data(), Buffers::row_bytes(*tokens),
             Buffers::row_digest(*tokens), params);
  }
}

Kernel read_dispatch(Buffers& buffers, const ffi::Dictionary&, DispatchParams& params) {
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
  return complete_dispatch(true, params);
}

Kernel read_dispatch_along(Buffers& buffers, const ffi::Dictionary&, DispatchParams& params) {
  // The kernel writes to them only where it routes.
  params.dest_rank = const_cast<int32_t*>(buffers.arg_data<int32_t>());
  params.dest_row = const_cast<int32_t*>(buffers.arg_data<int32_t>());
  params.row_source = const_cast<int32_t*>(buffers.arg_data<int32_t>());
  read_leaves(buffers, params);
  return complete_dispatch(false, params);
}

// The next argument's rows, and their type.
const void* read_rows(Buffers& buffers, RowType& type) {
  const ffi::AnyBuffer* rows = buffers.arg();
  buffers.row_type(rows, type.dtype, type.width);
  return rows == nullptr ? nullptr : rows->untyped_data();
}

Kernel read_combine(Buffers& buffers, const ffi::Dictionary& attributes, CombineParams& params) {
  const bool weighted = read_flag(attributes, "weighted");
  RowType type;
  params.dest_rank = buffers.arg_data<int32_t>();
  params.dest_row = buffers.arg_data<int32_t>();
  buffers.arg();  // row_source: the CPU engine's
  params.expert_out = read_rows(buffers, type);
  if (weighted) params.weights = buffers.arg_data<void>();
  params.sums = buffers.ret_data<void>();
  params.partial_sums = buffers.ret_data<void>();
  params.flags = buffers.ret_data<uint32_t>();
  return complete_combine(type, weighted, params);
}

Kernel read_combine_transpose(Buffers& buffers, const ffi::Dictionary& attributes,
                              CombineTransposeParams& params) {
  const bool rows = read_flag(attributes, "rows");
  const bool weights = read_flag(attributes, "weights");
  RowType type;
  params.dest_rank = buffers.arg_data<int32_t>();
  params.dest_row = buffers.arg_data<int32_t>();
  params.row_source = buffers.arg_data<int32_t>();
  params.tokens = read_rows(buffers, type);
  if (weights) params.expert_out = buffers.arg_data<void>();
  if (rows) params.weights = buffers.arg_data<void>();
  if (rows) params.rows = buffers.ret_data<void>();
  if (weights) params.weight_grads = buffers.ret_data<void>();
  return complete_combine_transpose(type, rows, weights, params);
}

// XLA calls it before every run of a program. It does not call execute() where it replays the
// launches of an earlier run, and nobody would be told there that an exchange has failed.
ffi::Error initialize(Instance* instance, ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  const uint64_t now = generation();
  uint64_t then = 0;
  if (!instance->generation.compare_exchange_strong(then, now) && then != now) {
    return ffi::Error(
        ffi::ErrorCode::kFailedPrecondition,
        "freeio_jax: this program ran before freeio_jax.shutdown(), and what XLA has "
        "captured of it names memory of then. Call jax.clear_caches(), and it will be "
        "compiled anew.");
  }
  return to_error(state_of(instance->gpus));
}

template <typename Params, auto kRead>
ffi::Error execute(Instance* instance, void* stream, int32_t ordinal,
                   ffi::Buffer<ffi::U32, 0> device, ffi::RemainingArgs args,
                   ffi::RemainingRets rets, ffi::Dictionary attributes) {
  const int gpu = gpu_number(ordinal);
  Member member = gpu < 0 ? Member{{}, -1, 0, nullptr} : instance->member(gpu);
  member.device = device.typed_data();
  if (member.rank < 0) {
    return ffi::Error(
        ffi::ErrorCode::kInternal,
        "freeio_jax: CUDA device " + std::to_string(ordinal) + " is not in the mesh of this call.");
  }
  Params params = {};
  Status status = describe(instance->layout, member, params.exchange);
  if (!status.ok()) return to_error(status);
  params.exchange.signature[kInstance] = instance->name;
  Buffers buffers(args, rets);
  const Kernel kernel = kRead(buffers, attributes, params);
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

XLA_FFI_DEFINE_HANDLER(kMakeDispatch, instantiate<Operation::kDispatch>,
                       ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kMakeDispatchAlong, instantiate<Operation::kDispatchAlong>,
                       ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kMakeCombine, instantiate<Operation::kCombine>,
                       ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kMakeCombineTranspose, instantiate<Operation::kCombineTranspose>,
                       ffi::Ffi::BindInstantiate().Attrs());

XLA_FFI_DEFINE_HANDLER(
    kInitialize, initialize,
    ffi::Ffi::BindInitialize().Ctx<ffi::State<Instance>>().RemainingArgs().RemainingRets().Attrs());

// The kernels advance their own state: a captured launch can be replayed as it is.
XLA_FFI_DEFINE_HANDLER(kDispatch, (execute<DispatchParams, read_dispatch>), execute_binding(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kDispatchAlong, (execute<DispatchParams, read_dispatch_along>),
                       execute_binding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCombine, (execute<CombineParams, read_combine>), execute_binding(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCombineTranspose, (execute<CombineTransposeParams, read_combine_transpose>),
                       execute_binding(), {ffi::Traits::kCmdBufferCompatible});

// Only looks for the library: initializing CUDA would be felt by a process that forks later.
bool has_driver() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver == nullptr) return false;
  dlclose(driver);
  return true;
}

py::dict ffi_types() { return ffi_type<Instance>("freeio_cuda_instance"); }

py::dict ffi_targets() {
  return ffi_targets_of({kMakeDispatch, kDispatch, kInitialize},
                        {kMakeDispatchAlong, kDispatchAlong, kInitialize},
                        {kMakeCombine, kCombine, kInitialize},
                        {kMakeCombineTranspose, kCombineTranspose, kInitialize});
}

void raise_unless_ok(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

}  // namespace

void add_module(py::module_& native) {
  py::module_ module = native.def_submodule("cuda", "The CUDA engine.");
  module.attr("max_ranks") = kMaxRanks;
  module.attr("max_experts") = kMaxExperts;
  module.attr("max_top_k") = kMaxTopK;
  module.attr("max_leaves") = kMaxLeaves;
  module.attr("combine_slice") = kCombineSlice;
  module.def("has_driver", &has_driver, "Whether this machine has NVIDIA's driver.");
  module.def("has_link", &has_link, py::arg("from_ordinal"), py::arg("to_ordinal"));
  module.def(
      "memory",
      [] {
        const Memory bytes = memory();
        return py::make_tuple(bytes.owned_bytes, bytes.mapped_bytes);
      },
      "Bytes of device memory that the engine owns on each GPU, and that it has mapped of other "
      "processes.");
  module.def(
      "start", [](const std::vector<int>& ordinals) { raise_unless_ok(start(ordinals)); },
      py::arg("ordinals"), py::call_guard<py::gil_scoped_release>(),
      "Prepares the GPUs of the one process that there is, by CUDA ordinal.");
  module.def(
      "join",
      [](int process, const std::vector<std::tuple<int, int, int>>& gpus) {
        std::vector<PodGpu> pod_gpus;
        for (const auto& [number, owner, ordinal] : gpus) {
          pod_gpus.push_back({number, owner, ordinal});
        }
        host::Pod* const pod = host::Pod::current();
        if (pod == nullptr) throw std::runtime_error("freeio_jax: this process is in no pod.");
        raise_unless_ok(join(*pod, process, pod_gpus));
      },
      py::arg("process"), py::arg("gpus"), py::call_guard<py::gil_scoped_release>(),
      "Prepares this process's GPUs and connects them with those of the pod's other processes. "
      "gpus: (number, process, CUDA ordinal) of all.");
  module.def(
      "leave", [] { raise_unless_ok(leave()); }, py::call_guard<py::gil_scoped_release>(),
      "Parts from the other processes' GPUs.");
  // Waits while leave() does, and must not keep Python from running meanwhile.
  module.def("take_failure", &take_failure, py::call_guard<py::gil_scoped_release>(),
             "What became of an exchange that failed, once for each GPU; empty: nothing new.");
  module.def("memory_bandwidth", &memory_bandwidth, py::arg("ordinal"), py::arg("bytes"));
  module.def("link_bandwidth", &link_bandwidth, py::arg("ordinals"), py::arg("bytes"),
             py::arg("ctas"), py::arg("pull"));
  module.def("flag_trip", &flag_trip, py::arg("source"), py::arg("target"));
  module.def("ffi_types", &ffi_types);
  module.def("ffi_targets", &ffi_targets);
}

}  // namespace freeio::cuda
