// The parameters of the kernels for groups that span hosts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/params.h"
#include "hosts/landing.h"

namespace freeio::cuda {

// One array of this rank's tokens, whose rows are sent to other hosts.
struct SentLeaf {
  const std::byte* tokens;
  int64_t row_bytes;
  int64_t at;  // in a window's requests: the round's rows
};

// How a call is cut into rounds and parcels, and what of a round lies where among the requests in a
// half of a window.
//
// A round is as many tokens of each rank as fit. A parcel is a part of a round, for which there is
// one signal. A token's place in the window follows from its number.
struct Rounds {
  int32_t count = 0;
  int32_t tokens = 1;         // of a round
  int32_t parcel_tokens = 1;  // of a parcel
  int32_t parcels = 0;        // of a round; the last round may have fewer
  // Parts, by columns, in which a rank pulls a parcel. A small call has too few tokens for all
  // warps.
  int32_t pull_parts = 1;
  // Whether all warps put the first rounds before anything else: of small calls. In others the push
  // warps do so while the moving warps pull, so that links and memory are busy together.
  bool pushes_ahead = true;
  int64_t dest_rank_at = 0;  // [tokens, K]
  int64_t dest_row_at = 0;   // [tokens, K]
  int64_t weights_at = 0;    // [tokens, K]
  int32_t weight_bytes = 0;  // of each; 0: none are sent
  int32_t answer_bytes = 0;  // for a token; 0: there are none
  // combine: an answer to a parcel comes in parts, each for some of its columns, with its own
  // signal.
  int32_t answer_parts = 1;
  int32_t part_columns = 0;

  // Whether a parcel is a token, and its number the token's.
  FREEIO_HOST_DEVICE bool are_parcels_tokens() const { return count == 1 && parcel_tokens == 1; }
};

// What all these kernels have. Here "host" is a host's number in the group, in order of the hosts'
// first ranks. All hosts have equally many ranks. A rank's rail on another host is the rank with
// the same number there: its tokens' rows land on that GPU, and this GPU is the rail of that rank.
struct Hosts {
  Exchange local;  // this host's ranks, numbered within the host
  LandingLayout layout;
  std::byte* landing[kMaxRanks];   // of this host's ranks, as this GPU sees it
  int32_t pe[kMaxRanks];           // of each rank of the group
  int32_t rank_at[kMaxRanks];      // [host, number within the host]: its rank
  int32_t host_of[kMaxRanks];      // of each rank
  int32_t local_of[kMaxRanks];     // of each rank: its number within its host
  int32_t host_number[kMaxRanks];  // of each host: its number in the program
  int32_t rank;
  int32_t num_ranks;
  int32_t host;
  int32_t num_hosts;
  int32_t num_tokens;
  int32_t top_k;
  Rounds rounds;
  int32_t num_leaves;
  SentLeaf leaves[kMaxLeaves];
  const int32_t* dest_rank;
  const int32_t* dest_row;
  const void* weights;

  FREEIO_HOST_DEVICE int num_local() const { return local.num_ranks; }
  FREEIO_HOST_DEVICE bool is_here(int of_rank) const { return host_of[of_rank] == host; }
  // This rank's rail on a host: its tokens' rows land there, and what it gets from there it sent.
  FREEIO_HOST_DEVICE int rail_on(int of_host) const {
    return rank_at[of_host * num_local() + local.rank];
  }
  // The n-th of the other hosts, from the next one on, so that not all begin with the same one.
  FREEIO_HOST_DEVICE int other_host(int n) const { return (host + 1 + n) % num_hosts; }
  FREEIO_HOST_DEVICE int num_others() const { return num_hosts - 1; }
};

// `call.exchange` is that of the whole group, of which only numbers are used.
struct HostsDispatchParams {
  DispatchParams call;
  Hosts hosts;
};

struct HostsCombineParams {
  Hosts hosts;
  const void* expert_out;
  void* sums;
  int32_t width;
};

// Shared memory of a CTA for the dot products of parts of rows.
constexpr int kDotsBytes = 64 << 10;

struct HostsTransposeParams {
  CombineTransposeParams call;
  Hosts hosts;
};

}  // namespace freeio::cuda
