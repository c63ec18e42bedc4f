#include "hosts/call.h"

#include <algorithm>
#include <string>

#include "core/digest.h"
#include "cuda/failure_code.h"
#include "cuda/geometry.h"
#include "cuda/plan.h"
#include "cuda/sizes.h"
#include "hosts/plan.h"

namespace freeio::cuda {
namespace {

constexpr uint32_t bit(int address) { return 1u << address; }

// A GPU's number within its host, among the PEs.
int number_within_host(const Landings& landings, int pe) {
  const auto begin = landings.host_of_pe.begin();
  return static_cast<int>(std::count(begin, begin + pe, landings.host_of_pe[pe]));
}

Status differs_in_hosts() {
  return {
      Code::kInvalidArgument,
      "freeio_jax: a group that spans hosts must have the same number of ranks on each of them, "
      "in order on GPUs that have the same numbers within their hosts. Use a mesh whose expert "
      "axis has as many devices of each host."};
}

// What an operation decides: its kernel, the rounds, and the addresses that the ranks of this host
// get. `group`: the exchange of the whole group. Returns the digest of the row types.

Status plan_call(const Landings& landings, const DispatchTypes& types, int32_t alignment,
                 const Exchange& group, int /*num_ctas*/, HostsDispatchParams& params,
                 Kernel& kernel, uint32_t& posted, uint32_t& rows) {
  DispatchParams& call = params.call;
  Hosts& hosts = params.hosts;
  call.exchange = group;
  rows = plan_pulling(types, alignment, call, posted);
  posted |= bit(kDestRank) | bit(kDestRow);
  hosts.num_leaves = types.num_leaves;
  for (int i = 0; i < types.num_leaves; ++i) hosts.leaves[i].row_bytes = types.leaves[i].row_bytes;
  kernel = types.routed ? hosts_dispatch(group.num_experts) : hosts_dispatch_along();
  Status status = plan_rounds(landings.layout.part_bytes, group.num_tokens, {group.top_k},
                              hosts.leaves, hosts.num_leaves, hosts.rounds);
  plan_pulls(call.num_slices, hosts.rounds);
  return status;
}

Status plan_call(const Landings& landings, const CombineTypes& types, int32_t alignment,
                 const Exchange& group, int /*num_ctas*/, HostsCombineParams& params,
                 Kernel& kernel, uint32_t& posted, uint32_t& rows) {
  const bool wide = is_wide(types.dtype, types.width, alignment);
  params.width = static_cast<int32_t>(types.width);
  posted = bit(kFirstLeaf);
  rows = Digest({static_cast<int>(types.dtype), types.width, wide, types.weighted}).folded();
  kernel = hosts_combine(types.dtype, wide);
  TokenBytes of_token = {group.top_k};
  if (types.weighted) of_token.weight_bytes = types.dtype == DType::kFloat64 ? 8 : 4;
  constexpr int64_t kLanes = 32;
  const auto element_bytes = static_cast<int32_t>(bytes_of(types.dtype));
  of_token.answer_bytes = static_cast<int32_t>(types.width) * element_bytes;
  Rounds& rounds = params.hosts.rounds;
  Status status =
      plan_rounds(landings.layout.part_bytes, group.num_tokens, of_token, nullptr, 0, rounds);
  plan_answers(types.width, kLanes * (wide ? wide_pack(element_bytes) : 1), rounds);
  return status;
}

Status plan_call(const Landings& landings, const CombineTransposeTypes& types, int32_t alignment,
                 const Exchange& group, int num_ctas, HostsTransposeParams& params, Kernel& kernel,
                 uint32_t& posted, uint32_t& rows) {
  const bool wide = is_wide(types.dtype, types.width, alignment);
  CombineTransposeParams& call = params.call;
  Hosts& hosts = params.hosts;
  call.exchange = group;
  call.width = static_cast<int32_t>(types.width);
  if (types.rows) call.padding = blocks_of(group, false);
  posted = bit(kFirstLeaf) | bit(kDestRank) | bit(kDestRow);
  if (types.rows) posted |= bit(kWeights);
  if (types.weights) posted |= bit(kWeightGrads);
  rows = Digest({static_cast<int>(types.dtype), types.width, wide, types.rows, types.weights})
             .folded();
  kernel = hosts_transpose(types.dtype, wide);
  const int32_t accumulator_bytes = types.dtype == DType::kFloat64 ? 8 : 4;
  TokenBytes of_token = {group.top_k};
  if (types.rows) of_token.weight_bytes = accumulator_bytes;
  if (types.weights) of_token.answer_bytes = group.top_k * accumulator_bytes;
  hosts.num_leaves = 1;
  hosts.leaves[0].row_bytes = types.width * bytes_of(types.dtype);
  Rounds& rounds = hosts.rounds;
  Status status =
      plan_rounds(landings.layout.part_bytes, group.num_tokens, of_token, hosts.leaves, 1, rounds);
  constexpr int64_t kLanes = 32;
  const int pack = wide ? wide_pack(static_cast<int>(bytes_of(types.dtype))) : 1;
  plan_pulls(ceil_div(types.width, kLanes * pack), rounds);
  // The dot products of the parts must fit in the shared memory of each CTA.
  const int64_t pulls =
      ceil_div(int64_t{rounds.parcels} * rounds.count, num_ctas) * group.num_ranks;
  const int64_t dots = int64_t{rounds.parcel_tokens} * group.top_k * rounds.pull_parts;
  if (pulls * (int64_t{sizeof(uint64_t)} + dots * accumulator_bytes) > kDotsBytes) {
    rounds.pull_parts = 1;
  }
  return status;
}

// Fills in the addresses of the buffers.

void set_buffers(const DispatchOperands& operands, HostsDispatchParams& params) {
  Hosts& hosts = params.hosts;
  set_operands(operands, params.call);
  for (int i = 0; i < hosts.num_leaves; ++i) hosts.leaves[i].tokens = params.call.leaves[i].tokens;
  hosts.dest_rank = operands.dest_rank;
  hosts.dest_row = operands.dest_row;
  std::copy_n(params.call.exchange.posted, kMaxAddresses, hosts.local.posted);
}

void set_buffers(const CombineOperands& operands, HostsCombineParams& params) {
  Hosts& hosts = params.hosts;
  params.expert_out = operands.expert_out;
  params.sums = operands.sums;
  hosts.dest_rank = operands.dest_rank;
  hosts.dest_row = operands.dest_row;
  hosts.weights = operands.weights;
  hosts.local.posted[kFirstLeaf] = reinterpret_cast<uint64_t>(operands.expert_out);
}

void set_buffers(const CombineTransposeOperands& operands, HostsTransposeParams& params) {
  Hosts& hosts = params.hosts;
  set_operands(operands, params.call);
  hosts.leaves[0].tokens = static_cast<const std::byte*>(operands.tokens);
  hosts.dest_rank = operands.dest_rank;
  hosts.dest_row = operands.dest_row;
  hosts.weights = operands.weights;
  std::copy_n(params.call.exchange.posted, kMaxAddresses, hosts.local.posted);
}

Hosts& hosts_of(HostsDispatchParams& params) { return params.hosts; }
Hosts& hosts_of(HostsCombineParams& params) { return params.hosts; }
Hosts& hosts_of(HostsTransposeParams& params) { return params.hosts; }

// Exposes the buffers out of which the kernel puts.
Status expose(const Hosts& hosts, Sources& sources) {
  Status status;
  const auto one = [&](const void* buffer) {
    if (status.ok() && buffer != nullptr) status = sources.expose(buffer);
  };
  for (int i = 0; i < hosts.num_leaves; ++i) one(hosts.leaves[i].tokens);
  one(hosts.dest_rank);
  one(hosts.dest_row);
  if (hosts.rounds.weight_bytes > 0) one(hosts.weights);
  return status;
}

}  // namespace

Status find_hosts(const Landings& landings, const HostsMember& member, Hosts& hosts) {
  const auto num_ranks = static_cast<int>(member.pes.size());
  hosts.layout = landings.layout;
  hosts.rank = member.rank;
  hosts.num_ranks = num_ranks;
  hosts.num_hosts = 0;
  std::vector<std::vector<int>> ranks_of;  // of each host
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int pe = member.pes[rank];
    const int number = landings.host_of_pe[pe];
    int host = 0;
    while (host < hosts.num_hosts && hosts.host_number[host] != number) ++host;
    if (host == hosts.num_hosts) {
      hosts.host_number[hosts.num_hosts++] = number;
      ranks_of.emplace_back();
    }
    hosts.pe[rank] = pe;
    hosts.host_of[rank] = host;
    hosts.local_of[rank] = static_cast<int>(ranks_of[host].size());
    ranks_of[host].push_back(rank);
  }
  hosts.host = hosts.host_of[member.rank];
  const std::vector<int>& here = ranks_of[hosts.host];
  for (int host = 0; host < hosts.num_hosts; ++host) {
    if (ranks_of[host].size() != here.size()) return differs_in_hosts();
    for (size_t local = 0; local < here.size(); ++local) {
      const int rank = ranks_of[host][local];
      hosts.rank_at[host * static_cast<int>(here.size()) + static_cast<int>(local)] = rank;
      if (number_within_host(landings, member.pes[rank]) !=
          number_within_host(landings, member.pes[here[local]])) {
        return differs_in_hosts();
      }
    }
  }
  for (size_t local = 0; local < here.size(); ++local) {
    hosts.landing[local] = landings.address[member.pes[here[local]]];
  }
  return {};
}

template <typename Operands>
Status HostsCall<Operands>::prepare(int32_t alignment) {
  // This is read before everything else. So the next run prepares again if something changes now.
  const uint64_t version = engine_version();
  engine_version_ = 0;
  params_ = {};
  addresses_ = {};
  Hosts& hosts = hosts_of(params_);
  Status status = find_hosts(landings_, member_, hosts);
  if (!status.ok()) return status;
  Layout local = site_.layout;
  local.num_ranks = static_cast<int64_t>(member_.gpus.size());
  const GroupMember here = {member_.gpus, hosts.local_of[member_.rank], member_.mesh_device};
  status = find_group(local, here, site_.share, hosts.local, connection_);
  if (!status.ok()) return status;
  Exchange group = hosts.local;
  group.rank = member_.rank;
  group.num_ranks = hosts.num_ranks;
  group.ranks = Divisor(group.num_ranks);
  group.local_experts = Divisor(static_cast<int32_t>(site_.layout.experts_per_rank()));
  hosts.num_tokens = group.num_tokens;
  hosts.top_k = group.top_k;
  Kernel kernel;
  uint32_t rows = 0;
  status = plan_call(landings_, types_, alignment, group, static_cast<int>(connection_.num_ctas),
                     params_, kernel, posted_, rows);
  if (status.ok()) status = LoadedKernel::load(kernel, kernel_);
  if (!status.ok()) return status;
  sign(site_, rows, connection_.num_ctas, hosts.local.signature);
  hosts.local.signature[kOp] += kBetweenHosts;
  alignment_ = alignment;
  engine_version_ = version;
  return {};
}

template <typename Operands>
Status HostsCall<Operands>::run(const Operands& operands, void* stream) {
  const int32_t alignment = alignment_of(types_, operands);
  if (engine_version_ != engine_version() || alignment_ != alignment) {
    Status status = prepare(alignment);
    if (!status.ok()) return status;
  }
  if (has_failure(*connection_.host)) return failure_of(*connection_.host);
  set_buffers(operands, params_);
  Exchange& local = hosts_of(params_).local;
  local.device = operands.device;
  if (landings_.sources != nullptr) {
    Status status = expose(hosts_of(params_), *landings_.sources);
    if (!status.ok()) return status;
  }
  for (int slot = 0; connection_.peers != nullptr && slot < kMaxAddresses; ++slot) {
    uint64_t& address = local.posted[slot];
    if ((posted_ >> slot & 1) == 0 || address == 0) continue;
    Status status = addresses_.translate(*connection_.peers, address);
    if (!status.ok()) return status;
  }
  return kernel_.launch({connection_.num_ctas, local.num_experts, &params_}, stream);
}

template class HostsCall<DispatchOperands>;
template class HostsCall<CombineOperands>;
template class HostsCall<CombineTransposeOperands>;

}  // namespace freeio::cuda
