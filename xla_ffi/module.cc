// The Python module freeio_jax._native.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/channels.h"
#include "core/dtype.h"
#include "core/layout.h"
#include "core/patience.h"
#include "core/protocol.h"
#include "cpu/handlers.h"
#include "cpu/instance_name.h"
#include "cpu/notes.h"
#include "cpu/padding.h"
#include "cpu/peer_exchanges.h"
#include "cpu/peer_memory.h"
#include "cpu/session.h"
#include "cuda/sizes.h"
#include "pod/pod.h"

#ifdef FREEIO_CUDA
#include "cuda/gpus.h"
#include "cuda/module.h"
#endif
#ifdef FREEIO_HOSTS
#include "hosts/module.h"
#endif

namespace py = pybind11;

namespace {

using MemberTuple = std::tuple<int, int, std::string, uint64_t, uint64_t, int>;

// The CPU engine becomes a guest before a message for it can come. The CUDA engine becomes one when
// its GPUs are ready.
void join_pod(int process, const std::vector<MemberTuple>& members, bool read_memory) {
  std::vector<freeio::pod::Pod::Member> pod_members;
  std::map<int, freeio::cpu::RemoteControlBlock> control_blocks;
  for (const auto& [number, pid, host, address, nonce, socket] : members) {
    pod_members.push_back({{number, pid, host}, freeio::pod::UniqueFd(socket)});
    control_blocks[number] = {address, nonce};
  }
  auto pod = std::make_unique<freeio::pod::Pod>(process, std::move(pod_members));
  auto exchanges = std::make_unique<freeio::cpu::PeerExchanges>(*pod, control_blocks);
  if (read_memory) exchanges->try_to_read();
  pod->admit(freeio::Channel::kCpu, *exchanges);
  freeio::pod::Pod::start(std::move(pod));
  freeio::cpu::PeerExchanges::make_current(std::move(exchanges));
}

freeio::Layout layout_of(int64_t num_ranks, int64_t num_tokens, int64_t top_k) {
  freeio::Layout layout;
  layout.num_ranks = num_ranks;
  layout.num_tokens = num_tokens;
  layout.top_k = top_k;
  return layout;
}

// Also in installations without the CUDA engine, for freeio_jax.plan.
void add_cuda_sizes(py::module_& native) {
  namespace cuda = freeio::cuda;
  py::module_ module =
      native.def_submodule("cuda_sizes", "What the CUDA engine takes at most, and its memory.");
  module.attr("max_ranks") = cuda::kMaxRanks;
  module.attr("max_experts") = cuda::kMaxExperts;
  module.attr("max_top_k") = cuda::kMaxTopK;
  module.attr("max_leaves") = cuda::kMaxLeaves;
  module.def("owned_bytes", &cuda::owned_bytes, py::arg("num_gpus"),
             "Device memory that the engine owns on each of the GPUs that exchange rows.");
  module.def(
      "dispatch_scratch",
      [](int64_t num_ranks, int64_t num_tokens, int64_t top_k) {
        return cuda::dispatch_scratch(layout_of(num_ranks, num_tokens, top_k));
      },
      py::arg("num_ranks"), py::arg("num_tokens"), py::arg("top_k"),
      "Words of 64 bits in dispatch's scratch buffer.");
  module.def(
      "combine_scratch",
      [](int64_t num_ranks, int64_t num_tokens, int64_t top_k, int64_t width) {
        const auto scratch = cuda::combine_scratch(layout_of(num_ranks, num_tokens, top_k), width);
        return py::make_tuple(scratch.partial_sums, scratch.flags);
      },
      py::arg("num_ranks"), py::arg("num_tokens"), py::arg("top_k"), py::arg("width"),
      "Rows, of `width` elements, and words of 32 bits in combine's two scratch buffers.");
  module.def(
      "is_small_call",
      [](int64_t num_ranks, int64_t num_tokens, int64_t top_k, int64_t row_bytes) {
        const int64_t accesses = cuda::ceil_div(row_bytes, cuda::kSentAccess);
        const int64_t of_token = cuda::sent_slices_of(accesses).first;
        return cuda::is_small_call(num_ranks, num_tokens, top_k, of_token);
      },
      py::arg("num_ranks"), py::arg("num_tokens"), py::arg("top_k"), py::arg("row_bytes"),
      "Whether a call with rows of a multiple of 16 bytes sends them in lines.");
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Engines of freeio_jax behind XLA FFI custom calls.";
  // The element types that combine can sum.
  module.attr("combine_dtypes") =
      std::vector<std::string>(std::begin(freeio::kDTypeNames), std::end(freeio::kDTypeNames));
  // Equal in processes that can exchange rows.
  module.attr("protocol") = freeio::kProtocol;
  freeio::cpu::add_engine(module);
  add_cuda_sizes(module);
#ifdef FREEIO_CUDA
  freeio::cuda::add_module(module);
#endif
#ifdef FREEIO_HOSTS
  freeio::cuda::add_hosts_module(module);
#endif
  module.def(
      "set_timeout",
      [](double seconds) {
        freeio::cpu::set_timeout(seconds);
#ifdef FREEIO_CUDA
        freeio::cuda::set_timeout(seconds);
#endif
      },
      py::arg("seconds"));
  module.def(
      "set_num_sms",
      [](int64_t num_sms) {
#ifdef FREEIO_CUDA
        freeio::cuda::set_num_sms(num_sms);
#else
        static_cast<void>(num_sms);
#endif
      },
      py::arg("num_sms"));
  module.def("poison_tails", &freeio::cpu::poison_tails, py::arg("poison"),
             "Whether the CPU engine fills rows that zero_tail=False leaves unspecified with NaN. "
             "Only tests call this.");
  module.def(
      "set_overlap_num_sms",
      [](int64_t num_sms) {
#ifdef FREEIO_CUDA
        freeio::cuda::set_overlap_num_sms(num_sms);
#else
        static_cast<void>(num_sms);
#endif
      },
      py::arg("num_sms"),
      "Multiprocessors of an exchange that runs beside compute, if its start does not say how "
      "many.");
  module.def(
      "compilation_ended", &freeio::cpu::compilation_ended, py::arg("seconds"),
      "Call this when a module with exchanges has been compiled, or loaded from the compilation "
      "cache. seconds: the time that this took.");
  module.def("set_patience", &freeio::set_patience, py::arg("seconds"),
             "After how many seconds the log reports a wait for the first time.");
  module.def("take_note", &freeio::cpu::take_note,
             "Returns and removes the oldest message of the CPU engine for the log; empty: none.");
  module.def("allow_peers_to_read", &freeio::cpu::allow_peers_to_read);
  module.def(
      "control_block",
      [] {
        const auto& block = freeio::cpu::control_block();
        return py::make_tuple(reinterpret_cast<uint64_t>(&block), block.nonce);
      },
      "Address and nonce of the control block, which peers read in this process.");
  module.def(
      "join_pod", &join_pod, py::arg("process"), py::arg("members"), py::arg("read_memory"),
      "members: (process, pid, its host, address and nonce of its control block, connected "
      "socket) of each other process. The host is in words; it is empty if it is the host of "
      "this process. The pod owns the sockets from now on.");
  module.def(
      "leave_pod",
      [] {
        if (auto* pod = freeio::pod::Pod::current()) pod->leave();
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "groups",
      [](int64_t num_ranks, int64_t num_experts, int64_t capacity, int64_t alignment,
         const std::vector<int64_t>& expert_load) {
        freeio::Layout layout;
        layout.num_ranks = num_ranks;
        layout.num_experts = num_experts;
        layout.capacity = capacity;
        layout.alignment = alignment;
        if (static_cast<int64_t>(expert_load.size()) != layout.experts_per_rank()) {
          throw py::value_error("expert_load must have one entry for each expert of a rank");
        }
        const freeio::Groups groups(layout, expert_load.data());
        return py::make_tuple(groups.starts, groups.sizes);
      },
      py::arg("num_ranks"), py::arg("num_experts"), py::arg("capacity"), py::arg("alignment"),
      py::arg("expert_load"), "Group starts and sizes, as the engines compute them.");
}
