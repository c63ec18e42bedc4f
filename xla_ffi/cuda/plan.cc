#include "cuda/plan.h"

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <utility>

#include "core/digest.h"
#include "core/layout.h"
#include "cuda/geometry.h"
#include "cuda/kernels.h"

namespace freeio::cuda {
namespace {

std::atomic<int64_t> max_sent_assignments{kMaxSentAssignments};
std::atomic<int64_t> max_sent_routes{kMaxSentRoutes};
std::atomic<int64_t> max_sent_slices{kMaxSentSlices};

enum Op : uint32_t { kDispatchOp, kDispatchAlongOp, kCombineOp, kCombineTransposeOp };

// The widest access, up to 16 bytes, that suits rows of `row_bytes` at these addresses.
int32_t access_bytes(int64_t row_bytes, std::initializer_list<const void*> buffers) {
  uint64_t bits = 16 | static_cast<uint64_t>(row_bytes);
  for (const void* buffer : buffers) bits |= reinterpret_cast<uint64_t>(buffer);
  return static_cast<int32_t>(bits & (~bits + 1));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts `accesses` of a row evenly into slices of whole warps, at most `most` each.
std::pair<int64_t, int32_t> slices_of(int64_t accesses, int64_t most) {
  constexpr int64_t kWarp = 32;
  const int64_t slices = std::max<int64_t>(1, ceil_div(accesses, most));
  const int64_t each = std::max(kWarp, round_up(ceil_div(accesses, slices), kWarp));
  return {std::max<int64_t>(1, ceil_div(accesses, each)), static_cast<int32_t>(each)};
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

bool is_wide(const RowType& type, std::initializer_list<const void*> buffers) {
  const int64_t bytes = bytes_of(type.dtype);
  return access_bytes(type.width * bytes, buffers) >= bytes * pack_of(type.dtype, true);
}

template <typename Params>
void set_slices(int32_t slices, Params& params) {
  params.slices = Divisor(slices);
  params.num_slices = slices;
}

// Slices of a row of so many accesses, and the accesses of each, where it is sent in lines.
std::pair<int64_t, int32_t> sent_slices_of(int64_t accesses) {
  return {std::max<int64_t>(1, ceil_div(accesses, kSentSlice)), kSentSlice};
}

// Width of the rows that are summed, and their slices.
template <typename Params>
void cut_rows(const RowType& type, bool wide, std::pair<int64_t, int32_t> slices, Params& params) {
  params.width = static_cast<int32_t>(type.width);
  params.slice_width = slices.second * pack_of(type.dtype, wide);
  set_slices(static_cast<int32_t>(slices.first), params);
}

Blocks blocks_of(int32_t capacity) {
  const int32_t rows = block_rows(capacity);
  const int32_t count = (capacity - 1) / rows + 1;
  return {rows, count, spreading_stride(count)};
}

void post(Address slot, const void* buffer, Exchange& exchange) {
  exchange.posted[slot] = reinterpret_cast<uint64_t>(buffer);
}

template <typename Params>
void post_routes(Params& params) {
  post(kDestRank, params.dest_rank, params.exchange);
  post(kDestRow, params.dest_row, params.exchange);
}

// Whether the call has so few assignments that it sends its routing itself.
bool sends_routing(const Exchange& exchange) {
  const int64_t assignments = int64_t{exchange.num_tokens} * exchange.top_k;
  return assignments <= max_sent_assignments && assignments * exchange.num_ranks <= kMaxSentByAll;
}

// Whether combine and its transpose send their routes: not too many, and weights of 32 bits.
bool sends_routes(const Exchange& exchange, DType dtype) {
  return exchange.num_ranks > 1 && exchange.capacity <= kMaxSentRow && bytes_of(dtype) <= 4 &&
         int64_t{exchange.num_tokens} * exchange.top_k <= max_sent_routes;
}

// Whether it has so few bytes that it sends rows or partial sums of so many slices, too.
bool sends_slices(const Exchange& exchange, int64_t of_token) {
  return sends_routing(exchange) && exchange.num_tokens * of_token <= max_sent_slices;
}

// CTAs that only send, so many slices to each peer, where there is enough to do for them.
int32_t senders_of(const Exchange& exchange, int64_t slices, int receivers) {
  constexpr int64_t kLeast = 4;  // of each CTA
  const auto ctas = static_cast<int32_t>(exchange.signature[kGrid]);
  return exchange.num_ranks > 1 && slices >= kLeast * ctas ? ctas / (1 + receivers) : 0;
}

// Cuts the leaves into slices that can be sent in lines, if the call sends its rows.
bool cut_to_be_sent(DispatchParams& params) {
  int64_t of_token = 0;
  for (int i = 0; i < params.num_leaves; ++i) {
    if (params.leaves[i].access_bytes != kSentAccess) return false;
    of_token += sent_slices_of(params.leaves[i].row_bytes / kSentAccess).first;
  }
  if (!sends_slices(params.exchange, of_token)) return false;
  for (int i = 0; i < params.num_leaves; ++i) {
    Leaf& leaf = params.leaves[i];
    const auto [slices, accesses] = sent_slices_of(leaf.row_bytes / kSentAccess);
    leaf.num_slices = static_cast<int32_t>(slices);
    leaf.slice_bytes = accesses * kSentAccess;
  }
  params.num_slices = static_cast<int32_t>(of_token);
  params.senders =
      senders_of(params.exchange, params.exchange.num_tokens * of_token, kDispatchReceivers);
  return true;
}

// Segments of each rank's assignments: to count one of so many, and to add up so many counts, take
// about the same time.
int32_t segments_of(const Exchange& x) {
  const int64_t assignments = int64_t{x.num_tokens} * x.top_k;
  const int64_t counts = int64_t{x.num_ranks} * x.num_experts;
  const int most = std::min(kMaxSegments, kMaxExperts / x.num_experts);
  int32_t segments = 1;
  while (segments < most && 4 * counts * (segments + 1) * (segments + 1) <= assignments) ++segments;
  return segments;
}

// How a dispatch routes by counts.
void cut_into_segments(DispatchParams& params) {
  const Exchange& x = params.exchange;
  params.sends_places = int64_t{x.num_tokens} * x.top_k <= max_sent_routes;
  if (!params.sends_places) post(kScratch, params.routes, params.exchange);
  const auto ctas = static_cast<int32_t>(x.signature[kGrid]);
  params.segment_ctas = static_cast<int32_t>(ceil_div(ctas, segments_of(x)));
  params.num_segments = static_cast<int32_t>(ceil_div(ctas, params.segment_ctas));
}

}  // namespace

void set_most_sent(int64_t assignments, int64_t routes, int64_t slices) {
  max_sent_assignments = std::min<int64_t>(assignments, kMaxSentAssignments);
  max_sent_routes = std::min<int64_t>(routes, kMaxSentRoutes);
  max_sent_slices = std::min<int64_t>(slices, kMaxSentSlices);
}

void add_leaf(const void* tokens, void* rows, int64_t row_bytes, uint64_t row_type,
              DispatchParams& params) {
  uint32_t& types = params.exchange.signature[kRows];
  types = Digest({types, static_cast<int64_t>(row_type)}).folded();
  Leaf& leaf = params.leaves[params.num_leaves++];
  leaf.tokens = static_cast<const std::byte*>(tokens);
  leaf.rows = static_cast<std::byte*>(rows);
  leaf.row_bytes = row_bytes;
  leaf.access_bytes = access_bytes(row_bytes, {tokens, rows});
  const auto [slices, accesses] = slices_of(row_bytes / leaf.access_bytes, kCopySlice);
  leaf.num_slices = static_cast<int32_t>(slices);
  leaf.slice_bytes = accesses * leaf.access_bytes;
  params.num_slices += leaf.num_slices;
}

Kernel complete_dispatch(bool routed, DispatchParams& params) {
  Digest rows({params.exchange.signature[kRows]});
  for (int i = 0; i < params.num_leaves; ++i) {
    rows.add({params.leaves[i].row_bytes, params.leaves[i].access_bytes});
  }
  const Routes routes = !routed                          ? Routes::kOfHandle
                        : cut_to_be_sent(params)         ? Routes::kByIdsWithRows
                        : sends_routing(params.exchange) ? Routes::kByIds
                                                         : Routes::kByCounts;
  // What no peer reads is not shown to them.
  for (int i = 0; i < params.num_leaves && routes != Routes::kByIdsWithRows; ++i) {
    post(static_cast<Address>(kFirstLeaf + i), params.leaves[i].tokens, params.exchange);
  }
  if (routes == Routes::kOfHandle) post_routes(params);
  if (routes == Routes::kByCounts) cut_into_segments(params);
  set_slices(params.num_slices, params);
  params.padding = blocks_of(params.exchange.capacity);
  params.exchange.signature[kOp] = routed ? kDispatchOp : kDispatchAlongOp;
  params.exchange.signature[kRows] = rows.folded();
  const Exchange& x = params.exchange;
  const int64_t all = int64_t{x.num_tokens} * x.top_k * x.num_ranks;
  return {dispatch_function(routes),
          dispatch_shared_bytes(routes, x.num_experts,
                                static_cast<int>(std::min<int64_t>(all, kMaxSentByAll)))};
}

Kernel complete_combine(const RowType& type, bool weighted, CombineParams& params) {
  const bool wide = is_wide(type, {params.expert_out, params.sums, params.partial_sums});
  const Exchange& x = params.exchange;
  const bool sends = sends_routes(x, type.dtype);
  const int32_t pack = pack_of(type.dtype, wide);
  const int64_t accesses = type.width / pack;
  const auto sent = sent_slices_of(accesses);
  const bool in_lines =
      sends && pack * bytes_of(type.dtype) == kSentAccess && sends_slices(x, sent.first);
  cut_rows(type, wide, in_lines ? sent : slices_of(accesses, kCombineSlice), params);
  params.sends_routes =
      in_lines || (sends && int64_t{x.num_tokens} * params.num_slices <= kMaxArrivals);
  if (in_lines) {
    params.senders = senders_of(x, x.num_tokens * sent.first, kCombineReceivers);
    params.peers = Divisor(x.num_ranks - 1);
  } else {
    params.ahead = combine_ahead(x.num_ranks);
    post(kScratch, params.partial_sums, params.exchange);
  }
  if (!params.sends_routes) {
    post_routes(params);
    post(kWeights, params.weights, params.exchange);
    post(kFlags, params.flags, params.exchange);
  }
  params.num_slots = std::min(params.exchange.top_k, params.exchange.num_ranks - 1);
  params.exchange.signature[kOp] = kCombineOp;
  params.exchange.signature[kRows] = Digest({static_cast<int>(type.dtype), type.width, wide,
                                             weighted, params.sends_routes, in_lines})
                                         .folded();
  if (in_lines) return {combine_in_lines_function(type.dtype), combine_in_lines_shared_bytes()};
  return {combine_function(type.dtype, wide), combine_shared_bytes()};
}

Kernel complete_combine_transpose(const RowType& type, bool rows, bool weights,
                                  CombineTransposeParams& params) {
  const bool wide = is_wide(type, {params.tokens, params.expert_out, params.rows});
  const int assignments = params.exchange.num_ranks * params.exchange.top_k;
  const size_t accumulator_bytes = type.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  int64_t slice = transpose_slice(params.exchange.num_tokens);
  do {
    cut_rows(type, wide, slices_of(type.width / pack_of(type.dtype, wide), slice), params);
    slice *= 2;
  } while (!combine_transpose_fits(accumulator_bytes, params.num_slices, assignments));
  params.sends_routes = sends_routes(params.exchange, type.dtype);
  if (!params.sends_routes) {
    post_routes(params);
    post(kWeights, params.weights, params.exchange);
  }
  post(kWeightGrads, params.weight_grads, params.exchange);
  post(kFirstLeaf, params.tokens, params.exchange);
  params.padding = blocks_of(params.exchange.capacity);
  params.exchange.signature[kOp] = kCombineTransposeOp;
  params.exchange.signature[kRows] =
      Digest({static_cast<int>(type.dtype), type.width, wide, rows, weights}).folded();
  return {combine_transpose_function(type.dtype, wide), combine_transpose_shared_bytes()};
}

}  // namespace freeio::cuda
