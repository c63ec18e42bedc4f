#include "hosts/plan.h"

#include <algorithm>
#include <string>

#include "cuda/sizes.h"

namespace freeio::cuda {

Status plan_rounds(int64_t part_bytes, int64_t num_tokens, const TokenBytes& of_token,
                   SentLeaf* leaves, int num_leaves, Rounds& rounds) {
  // One warp moves a parcel, so there should be about as many as warps. But a signal for each
  // parcel costs a fence, which smaller parcels would not hide. In a small call the fences of all
  // warps run beside each other.
  constexpr int64_t kLeastParcelBytes = 8 << 10;
  constexpr int64_t kLeastBytesAhead = 2 << 10;
  constexpr int64_t kMostParcelBytes = 64 << 10;
  const int64_t route_bytes = of_token.top_k * int64_t{sizeof(int32_t)};
  const int64_t weights_bytes = of_token.top_k * int64_t{of_token.weight_bytes};
  int64_t row_bytes = 0;
  for (int i = 0; i < num_leaves; ++i) row_bytes += leaves[i].row_bytes;
  const int64_t token_bytes = 2 * route_bytes + weights_bytes + row_bytes;
  const int64_t arrays = 3 + num_leaves;
  int64_t most = (part_bytes - arrays * kWindowAlignment) / token_bytes;
  if (of_token.answer_bytes > 0) most = std::min(most, part_bytes / of_token.answer_bytes);
  if (most < 1) {
    const int64_t bytes = std::max<int64_t>(row_bytes, of_token.answer_bytes);
    return {Code::kInvalidArgument,
            "freeio_jax: a token has rows or sums of " + std::to_string(bytes) + " bytes, and " +
                std::to_string(part_bytes) +
                " bytes of a window between hosts must hold those of a token and its routes. Use "
                "larger windows or narrower rows."};
  }
  rounds = {};
  const int64_t tokens = std::clamp<int64_t>(num_tokens, 1, most);
  const int64_t sent = std::max<int64_t>(row_bytes, of_token.answer_bytes);
  constexpr int64_t kMostAhead = 8;  // a call puts ahead up to so much of a part of a window
  rounds.pushes_ahead = num_tokens * row_bytes <= part_bytes / kMostAhead;
  const int64_t parcel_bytes =
      std::clamp(tokens * sent / kMaxParcels,
                 rounds.pushes_ahead ? kLeastBytesAhead : kLeastParcelBytes, kMostParcelBytes);
  const int64_t parcel = std::max(ceil_div(tokens, kMaxParcels),
                                  std::min(tokens, parcel_bytes / std::max<int64_t>(sent, 1)));
  rounds.tokens = static_cast<int32_t>(tokens);
  rounds.count = static_cast<int32_t>(ceil_div(num_tokens, tokens));
  rounds.parcel_tokens = static_cast<int32_t>(std::max<int64_t>(parcel, 1));
  rounds.parcels = static_cast<int32_t>(ceil_div(tokens, rounds.parcel_tokens));
  rounds.weight_bytes = of_token.weight_bytes;
  rounds.answer_bytes = of_token.answer_bytes;
  int64_t end = 0;
  const auto take = [&](int64_t bytes_of_token) {
    const int64_t at = end;
    end = round_up(end + tokens * bytes_of_token, kWindowAlignment);
    return at;
  };
  for (int i = 0; i < num_leaves; ++i) leaves[i].at = take(leaves[i].row_bytes);
  rounds.dest_rank_at = take(route_bytes);
  rounds.dest_row_at = take(route_bytes);
  rounds.weights_at = take(weights_bytes);
  return {};
}

void plan_pulls(int64_t slices, Rounds& rounds) {
  constexpr int64_t kMost = 8;
  rounds.pull_parts =
      rounds.pushes_ahead ? static_cast<int32_t>(std::clamp<int64_t>(slices, 1, kMost)) : 1;
}

void plan_answers(int64_t width, int64_t step, Rounds& rounds) {
  const int64_t steps = std::max<int64_t>(ceil_div(width, step), 1);
  // A call of many rounds is faster the sooner a parcel's answer has come back. So even the parcels
  // of a full round are answered in some parts.
  const int64_t most =
      std::max(kMaxParcels / std::max(rounds.parcels, 1), kMaxAnswers / kMaxParcels);
  const int64_t steps_of_part = ceil_div(steps, std::min(most, steps));
  rounds.answer_parts = static_cast<int32_t>(ceil_div(steps, steps_of_part));
  rounds.part_columns = static_cast<int32_t>(steps_of_part * step);
}

int64_t landing_bytes(int num_pes, int num_hosts, int64_t part_bytes) {
  return LandingLayout{num_pes, num_hosts, part_bytes}.bytes();
}

}  // namespace freeio::cuda
