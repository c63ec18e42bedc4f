#include "cuda/plan.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

#include "core/digest.h"
#include "cuda/geometry.h"
#include "cuda/gpus.h"
#include "cuda/launch.h"
#include "cuda/sizes.h"

namespace freeio::cuda {
namespace {

std::atomic<int64_t> max_sent_routes{kMaxSentRoutes};
std::atomic<int64_t> max_sent_slices{kMaxSentSlices};
std::atomic<int32_t> few_ctas{kFewCtas};

constexpr int32_t kMaxAccess = 16;  // bytes

// The largest power of two, up to 16, that divides all of these addresses.
template <typename... Buffers>
int32_t common_alignment(const Buffers*... buffers) {
  const uint64_t bits = (uint64_t{kMaxAccess} | ... | reinterpret_cast<uint64_t>(buffers));
  return static_cast<int32_t>(bits & (~bits + 1));
}

// The widest access that suits rows of `row_bytes` in buffers of this alignment.
int32_t access_bytes(int64_t row_bytes, int32_t alignment) {
  const int64_t bits = alignment | row_bytes;
  return static_cast<int32_t>(bits & (~bits + 1));
}

uint64_t address_of(const void* buffer) { return reinterpret_cast<uint64_t>(buffer); }

// Elements that one lane takes at a time.
int32_t pack_of(DType dtype, bool wide) {
  int32_t elements = 1;
  with_element_type(dtype, [&](auto tag) {
    if (wide) elements = wide_pack(sizeof(typename decltype(tag)::Type));
  });
  return elements;
}

template <typename Params>
void set_slices(int32_t slices, Params& params) {
  params.slices = Divisor(slices);
  params.num_slices = slices;
}

// Width of the rows that are summed, and their slices.
template <typename Types, typename Params>
void cut_rows(const Types& types, bool wide, std::pair<int64_t, int32_t> slices, Params& params) {
  params.width = static_cast<int32_t>(types.width);
  params.slice_width = slices.second * pack_of(types.dtype, wide);
  set_slices(static_cast<int32_t>(slices.first), params);
}

constexpr uint32_t bit(int address) { return 1u << address; }
constexpr uint32_t kRoutesBits = bit(kDestRank) | bit(kDestRow);

// The same with the bound that tests may have lowered. `of_token`: slices of each token.
bool is_small(const Exchange& x, int64_t of_token) {
  return is_small_call(x.num_ranks, x.num_tokens, x.top_k, of_token, max_sent_slices);
}

// Whether combine and its transpose send their routes: not too many, and weights of 32 bits.
bool sends_routes(const Exchange& exchange, DType dtype) {
  return exchange.num_ranks > 1 && exchange.capacity <= kMaxSentRow && bytes_of(dtype) <= 4 &&
         int64_t{exchange.num_tokens} * exchange.top_k <= max_sent_routes;
}

// Slices of a row where few CTAs combine `num_tokens` tokens, and the accesses of each.
std::pair<int64_t, int32_t> few_slices_of(int64_t accesses, int64_t num_tokens, int32_t ctas) {
  auto slices = slices_of_passes(accesses, kCombinePass, 1);
  for (int passes = kMostPasses; passes > 1; passes /= 2) {
    const auto longer = slices_of_passes(accesses, kCombinePass, passes);
    if (num_tokens * longer.first >= int64_t{kSlicesOfCta} * ctas) return longer;
  }
  return slices;
}

// How many CTAs only send if each peer gets `slices` slices. 0: that is too little, and all CTAs
// send and receive.
int32_t senders_of(const Exchange& exchange, int64_t slices, int32_t ctas, int receivers) {
  constexpr int64_t kLeast = 4;  // of each CTA
  return exchange.num_ranks > 1 && slices >= kLeast * ctas ? ctas / (1 + receivers) : 0;
}

// Cuts a leaf into slices that are pulled.
void cut_leaf(const LeafType& type, int32_t alignment, SlicedLeaf& leaf) {
  leaf.row_bytes = type.row_bytes;
  leaf.access_bytes = access_bytes(type.row_bytes, alignment);
  const auto [slices, accesses] = slices_of(leaf.row_bytes / leaf.access_bytes, kCopySlice);
  leaf.num_slices = static_cast<int32_t>(slices);
  leaf.slice_bytes = accesses * leaf.access_bytes;
}

// By how many bytes the rows of all leaves can be accessed.
int least_access(const DispatchParams& params) {
  int least = kSentAccess;
  for (int i = 0; i < params.num_leaves; ++i)
    least = std::min(least, params.leaves[i].access_bytes);
  return least;
}

// Cuts the leaves into slices that are sent in lines. False, and nothing is cut: the call is large.
bool cut_to_be_sent(int32_t ctas, DispatchParams& params) {
  const auto slices_of_leaf = [](const SlicedLeaf& leaf) {
    return sent_slices_of(ceil_div(leaf.row_bytes, kSentAccess));
  };
  int64_t of_token = 0;
  for (int i = 0; i < params.num_leaves; ++i) of_token += slices_of_leaf(params.leaves[i]).first;
  if (!is_small(params.exchange, of_token)) return false;
  const bool in_parts = least_access(params) < kSentAccess;
  if (in_parts && params.exchange.num_tokens * of_token > kMaxSlicesInParts) return false;
  for (int i = 0; i < params.num_leaves; ++i) {
    SlicedLeaf& leaf = params.leaves[i];
    const auto [slices, accesses] = slices_of_leaf(leaf);
    leaf.num_slices = static_cast<int32_t>(slices);
    leaf.slice_bytes = accesses * kSentAccess;
  }
  params.num_slices = static_cast<int32_t>(of_token);
  params.senders =
      senders_of(params.exchange, params.exchange.num_tokens * of_token, ctas, kDispatchReceivers);
  return true;
}

// Segments of each rank's assignments. With more segments each CTA counts fewer assignments, but
// adds up more counts. Both should take about the same time.
int32_t segments_of(const Exchange& x) {
  const int64_t assignments = int64_t{x.num_tokens} * x.top_k;
  const int64_t counts = int64_t{x.num_ranks} * x.num_experts;
  const int most = std::min(kMaxSegments, kMaxExperts / x.num_experts);
  int32_t segments = 1;
  while (segments < most && 4 * counts * (segments + 1) * (segments + 1) <= assignments) ++segments;
  return segments;
}

// How a dispatch routes by counts: the segments whose assignments are counted together, and the
// form of places.
Status plan_routing(int32_t ctas, DispatchParams& params) {
  const Exchange& x = params.exchange;
  const int64_t assignments = int64_t{x.num_tokens} * x.top_k;
  const int64_t experts = x.num_experts / x.num_ranks;
  params.place_bits = 0;
  while (assignments >> params.place_bits != 0) ++params.place_bits;
  if (x.num_ranks > 1 && experts << params.place_bits > int64_t{1} << 32) {
    int64_t most = 1;
    while (experts * 2 * most <= int64_t{1} << 32) most *= 2;
    return {Code::kInvalidArgument,
            "freeio_jax: dispatch has num_tokens * top_k = " + std::to_string(assignments) +
                " assignments of one rank, and the CUDA engine takes at most " +
                std::to_string(most - 1) + " where num_experts=" + std::to_string(x.num_experts) +
                " are on " + std::to_string(x.num_ranks) +
                " ranks. Pass fewer tokens per call, or use more ranks."};
  }
  params.places_in_scratch = assignments > max_sent_routes;
  params.segment_ctas = static_cast<int32_t>(ceil_div(ctas, segments_of(x)));
  params.num_segments = static_cast<int32_t>(ceil_div(ctas, params.segment_ctas));
  return {};
}

}  // namespace

int64_t bytes_of(DType dtype) {
  int64_t bytes = 0;
  with_element_type(dtype, [&](auto tag) { bytes = sizeof(typename decltype(tag)::Type); });
  return bytes;
}

bool is_wide(DType dtype, int64_t width, int32_t alignment) {
  const int64_t bytes = bytes_of(dtype);
  return access_bytes(width * bytes, alignment) >= bytes * pack_of(dtype, true);
}

Blocks blocks_of(const Exchange& x, bool marks) {
  // Groups are not padded if their sizes need not be multiples of more than 1.
  const bool zeroes = x.zero_tail || x.alignment.divisor > 1;
  if (x.capacity == 0 || (!zeroes && !marks)) return {1, 0, 1};
  const int32_t rows = zeroes ? block_rows(x.capacity) : kMarkedBlockRows;
  const int32_t count = (x.capacity - 1) / rows + 1;
  return {rows, count, spreading_stride(count)};
}

void set_most_sent(int64_t routes, int64_t slices) {
  max_sent_routes = std::min<int64_t>(routes, kMaxSentRoutes);
  max_sent_slices = std::min<int64_t>(slices, kMaxSentSlices);
  outdate_calls();
}

void set_few_ctas(int32_t ctas) {
  few_ctas = ctas;
  outdate_calls();
}

// --- dispatch ------------------------------------------------------------------------------------

int32_t alignment_of(const DispatchTypes& types, const DispatchOperands& operands) {
  int32_t alignment = kMaxAccess;
  for (int i = 0; i < types.num_leaves; ++i) {
    const LeafBuffers& leaf = operands.leaves[i];
    alignment = std::min(alignment, common_alignment(leaf.tokens, leaf.rows));
  }
  return alignment;
}

uint32_t plan_pulling(const DispatchTypes& types, int32_t alignment, DispatchParams& params,
                      uint32_t& leaves) {
  Digest rows;
  leaves = 0;
  params.num_leaves = types.num_leaves;
  int32_t num_slices = 0;
  for (int i = 0; i < types.num_leaves; ++i) {
    SlicedLeaf& leaf = params.leaves[i];
    cut_leaf(types.leaves[i], alignment, leaf);
    num_slices += leaf.num_slices;
    leaves |= bit(kFirstLeaf + i);
    rows.add({static_cast<int64_t>(types.leaves[i].row_type), leaf.row_bytes, leaf.access_bytes});
  }
  set_slices(num_slices, params);
  params.padding = blocks_of(params.exchange, types.routed);
  return rows.folded();
}

Status make_plan(const DispatchTypes& types, int32_t alignment, int32_t ctas,
                 DispatchParams& params, Plan& plan) {
  plan = {};
  uint32_t leaves = 0;
  plan.rows = plan_pulling(types, alignment, params, leaves);
  const Exchange& x = params.exchange;
  // Peers get only the addresses that they read.
  if (!types.routed) {
    plan.kernel = dispatch_along();
    plan.posted = leaves | kRoutesBits;
  } else if (cut_to_be_sent(ctas, params)) {
    plan.kernel =
        dispatch_small(x.num_experts, x.num_tokens * x.top_k * x.num_ranks, least_access(params));
  } else {
    Status status = plan_routing(ctas, params);
    if (!status.ok()) return status;
    plan.kernel = dispatch_large(x.num_experts);
    plan.posted = params.places_in_scratch ? leaves | bit(kScratch) : leaves;
  }
  set_slices(params.num_slices, params);
  return {};
}

void set_operands(const DispatchOperands& operands, DispatchParams& params) {
  params.exchange.device = operands.device;
  uint64_t* const posted = params.exchange.posted;
  for (int i = 0; i < params.num_leaves; ++i) {
    const auto& [tokens, rows] = operands.leaves[i];
    params.leaves[i].tokens = static_cast<const std::byte*>(tokens);
    params.leaves[i].rows = static_cast<std::byte*>(rows);
    posted[kFirstLeaf + i] = address_of(tokens);
  }
  params.topk_idx = operands.topk_idx;
  params.dest_rank = operands.dest_rank;
  params.dest_row = operands.dest_row;
  params.row_source = operands.row_source;
  params.group_sizes = operands.group_sizes;
  params.expert_load = operands.expert_load;
  params.num_dropped = operands.num_dropped;
  params.num_invalid = operands.num_invalid;
  params.places = operands.places;
  posted[kDestRank] = address_of(operands.dest_rank);
  posted[kDestRow] = address_of(operands.dest_row);
  posted[kScratch] = address_of(operands.places);
}

// --- combine -------------------------------------------------------------------------------------

int32_t alignment_of(const CombineTypes&, const CombineOperands& operands) {
  return common_alignment(operands.expert_out, operands.sums, operands.partial_sums);
}

Status make_plan(const CombineTypes& types, int32_t alignment, int32_t ctas, CombineParams& params,
                 Plan& plan) {
  plan = {};
  const bool wide = is_wide(types.dtype, types.width, alignment);
  const Exchange& x = params.exchange;
  const bool sends = sends_routes(x, types.dtype);
  const int32_t pack = pack_of(types.dtype, wide);
  const int64_t accesses = types.width / pack;
  const auto sent = sent_slices_of(accesses);
  if (!combine_large_fits(types.dtype, x.num_ranks * x.top_k)) {
    return {Code::kInvalidArgument,
            "freeio_jax: combine has num_ranks * top_k = " + std::to_string(x.num_ranks * x.top_k) +
                " routes of a token of each rank, and the CUDA engine takes fewer with such wide "
                "sums. Use float32, fewer ranks, or a smaller top_k."};
  }
  const bool in_lines =
      sends && pack * bytes_of(types.dtype) == kSentAccess && is_small(x, sent.first);
  const bool few = !in_lines && ctas <= few_ctas && fits(combine_few(types.dtype)) &&
                   access_bytes(types.width * bytes_of(types.dtype), alignment) == kMaxAccess;
  cut_rows(types, wide,
           in_lines ? sent
           : few    ? few_slices_of(accesses, x.num_tokens, ctas)
                    : slices_of(accesses, kCombineSlice),
           params);
  params.sends_routes =
      in_lines || (sends && int64_t{x.num_tokens} * params.num_slices <= kMaxArrivals);
  if (in_lines) {
    params.senders = senders_of(x, x.num_tokens * sent.first, ctas, kCombineReceivers);
    params.peers = Divisor(x.num_ranks - 1);
  } else {
    params.ahead = combine_ahead(x.num_ranks);
    plan.posted |= bit(kScratch);
  }
  if (!params.sends_routes) plan.posted |= kRoutesBits | bit(kWeights) | bit(kFlags);
  params.num_slots = static_cast<int32_t>(num_slots(x.top_k, x.num_ranks));
  plan.rows = Digest({static_cast<int>(types.dtype), types.width, wide, types.weighted,
                      params.sends_routes, in_lines, few})
                  .folded();
  plan.kernel = in_lines ? combine_small(types.dtype)
                : few    ? combine_few(types.dtype)
                         : combine_large(types.dtype, wide);
  return {};
}

void set_operands(const CombineOperands& operands, CombineParams& params) {
  params.exchange.device = operands.device;
  params.dest_rank = operands.dest_rank;
  params.dest_row = operands.dest_row;
  params.expert_out = operands.expert_out;
  params.weights = operands.weights;
  params.sums = operands.sums;
  params.partial_sums = operands.partial_sums;
  params.flags = operands.flags;
  uint64_t* const posted = params.exchange.posted;
  posted[kDestRank] = address_of(operands.dest_rank);
  posted[kDestRow] = address_of(operands.dest_row);
  posted[kWeights] = address_of(operands.weights);
  posted[kScratch] = address_of(operands.partial_sums);
  posted[kFlags] = address_of(operands.flags);
}

// --- combine_transpose ---------------------------------------------------------------------------

int32_t alignment_of(const CombineTransposeTypes&, const CombineTransposeOperands& operands) {
  return common_alignment(operands.tokens, operands.expert_out, operands.rows);
}

Status make_plan(const CombineTransposeTypes& types, int32_t alignment, int32_t,
                 CombineTransposeParams& params, Plan& plan) {
  plan = {};
  const Exchange& x = params.exchange;
  const bool wide = is_wide(types.dtype, types.width, alignment);
  const int assignments = x.num_ranks * x.top_k;
  const size_t accumulator_bytes = types.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  int64_t slice = transpose_slice(x.num_tokens);
  do {
    cut_rows(types, wide, slices_of(types.width / pack_of(types.dtype, wide), slice), params);
    slice *= 2;
  } while (!combine_transpose_fits(accumulator_bytes, params.num_slices, assignments));
  params.sends_routes = sends_routes(x, types.dtype);
  if (!params.sends_routes) plan.posted |= kRoutesBits | bit(kWeights);
  plan.posted |= bit(kWeightGrads) | bit(kFirstLeaf);
  if (types.rows) params.padding = blocks_of(x, false);
  plan.rows = Digest({static_cast<int>(types.dtype), types.width, wide, types.rows, types.weights})
                  .folded();
  plan.kernel = combine_transpose(types.dtype, wide);
  return {};
}

void set_operands(const CombineTransposeOperands& operands, CombineTransposeParams& params) {
  params.exchange.device = operands.device;
  params.dest_rank = operands.dest_rank;
  params.dest_row = operands.dest_row;
  params.row_source = operands.row_source;
  params.tokens = operands.tokens;
  params.expert_out = operands.expert_out;
  params.weights = operands.weights;
  params.rows = operands.rows;
  params.weight_grads = operands.weight_grads;
  uint64_t* const posted = params.exchange.posted;
  posted[kDestRank] = address_of(operands.dest_rank);
  posted[kDestRow] = address_of(operands.dest_row);
  posted[kWeights] = address_of(operands.weights);
  posted[kWeightGrads] = address_of(operands.weight_grads);
  posted[kFirstLeaf] = address_of(operands.tokens);
}

}  // namespace freeio::cuda
