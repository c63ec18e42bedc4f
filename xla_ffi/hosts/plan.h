// How a call between hosts is cut into rounds and parcels. Knows nothing of XLA, CUDA or networks.
#pragma once

#include <cstdint>

#include "core/status.h"
#include "hosts/params.h"

namespace freeio::cuda {

// What a rank sends for each token to each other host, and what comes back.
struct TokenBytes {
  int32_t top_k = 1;
  int32_t weight_bytes = 0;  // of each assignment
  int32_t answer_bytes = 0;
};

// Cuts the tokens of each rank into rounds that fit in a half of a window, whose parts have
// `part_bytes`, and places the rows and routes of a round among the requests there. An error if not
// even one token fits.
Status plan_rounds(int64_t part_bytes, int64_t num_tokens, const TokenBytes& of_token,
                   SentLeaf* leaves, int num_leaves, Rounds& rounds);

// Cuts the pulls of a small call into parts, so that there is work for many warps where there are
// few tokens. Those of other calls have one part. `slices`: of a row, the most parts there can be.
void plan_pulls(int64_t slices, Rounds& rounds);

// Cuts the answers to parcels into parts, so that there is work for many warps where there are few
// tokens. `step`: the columns that a warp takes at a time.
void plan_answers(int64_t width, int64_t step, Rounds& rounds);

// Bytes of symmetric memory that each GPU has for `num_pes` GPUs on `num_hosts` hosts.
int64_t landing_bytes(int num_pes, int num_hosts, int64_t part_bytes);

}  // namespace freeio::cuda
