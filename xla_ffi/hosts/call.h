// A custom call of a group that spans hosts, as one GPU runs it: the counterpart of cuda/call.h.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cuda/call.h"
#include "hosts/kernels.h"
#include "hosts/params.h"
#include "hosts/sources.h"

namespace freeio::cuda {

// The symmetric memory of a program: its layout, and where it is.
struct Landings {
  LandingLayout layout;
  std::vector<int> host_of_pe;  // hosts are numbered in order of their first PEs
  // Of each PE's, as this GPU sees it. Used for the PEs of this host only.
  std::vector<std::byte*> address;
  Sources* sources = nullptr;  // null: what rows are put out of need not be exposed
};

// One member of a group that spans hosts.
struct HostsMember {
  std::vector<int> pes;   // of all ranks
  std::vector<int> gpus;  // of this host's ranks, in order: their numbers in the engine
  int rank;               // of this member
  uint32_t mesh_device;
};

// What the kernels of the operations of a group have in common. Fills `hosts` except for what
// depends on the operation. An error if the hosts do not have the same number of ranks, on GPUs
// with the same numbers within their hosts.
Status find_hosts(const Landings& landings, const HostsMember& member, Hosts& hosts);

// The parameters of the kernels of an operation.
template <typename Operands>
struct HostsParamsOf;
template <>
struct HostsParamsOf<DispatchOperands> {
  using Type = HostsDispatchParams;
};
template <>
struct HostsParamsOf<CombineOperands> {
  using Type = HostsCombineParams;
};
template <>
struct HostsParamsOf<CombineTransposeOperands> {
  using Type = HostsTransposeParams;
};

// Two threads must not use it at the same time.
template <typename Operands>
class HostsCall {
 public:
  using Types = typename Operands::Types;

  // `site`: its member's GPUs are those of this host. `landings` must outlive the call.
  HostsCall(CallSite site, HostsMember member, const Landings& landings, const Types& types)
      : site_(std::move(site)), member_(std::move(member)), landings_(landings), types_(types) {}

  // As Call::run().
  Status run(const Operands& operands, void* stream);

 private:
  Status prepare(int32_t alignment);

  const CallSite site_;
  const HostsMember member_;
  const Landings& landings_;
  const Types types_;
  uint64_t engine_version_ = 0;  // 0: it was not prepared
  int32_t alignment_ = 0;

  Connection connection_;
  uint32_t posted_ = 0;
  LoadedKernel kernel_;
  typename HostsParamsOf<Operands>::Type params_ = {};
  SharedAddresses addresses_;
};

}  // namespace freeio::cuda
