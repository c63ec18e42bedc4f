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
#include "cpu/handlers.h"
#include "cpu/instance_name.h"
#include "cpu/notes.h"
#include "cpu/padding.h"
#include "cpu/peer_exchanges.h"
#include "cpu/peer_memory.h"
#include "cpu/session.h"
#include "pod/pod.h"

#ifdef FREEIO_CUDA
#include "cuda/gpus.h"
#include "cuda/module.h"
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

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Engines of freeio_jax behind XLA FFI custom calls.";
  // The element types that combine can sum.
  module.attr("combine_dtypes") =
      std::vector<std::string>(std::begin(freeio::kDTypeNames), std::end(freeio::kDTypeNames));
  freeio::cpu::add_engine(module);
#ifdef FREEIO_CUDA
  freeio::cuda::add_module(module);
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
