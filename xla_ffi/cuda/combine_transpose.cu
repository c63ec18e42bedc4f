// combine_transpose: the gradients of combine by the rows and by the weights.
//
// The expert's rank pulls the cotangent x of each token that it has rows of, once, stores
// weight * x to each of its rows here, and sends <expert_out row, x> back to the token's rank.
#include "cuda/elements.cuh"
#include "cuda/geometry.h"
#include "cuda/kernels.h"
#include "cuda/rows.cuh"

namespace freeio::cuda {
namespace {

template <typename Element, int kCount>
struct CombineTranspose {
  using Accumulator = typename Element::Accumulator;
  using Routes = TokenRoutes<Accumulator>;
  // Rows of a token that are served by one read of x; a token with more here is read again.
  static constexpr int kRows = 8;
  static constexpr int kColumns = 4;  // accesses of a lane to x in flight together

  const CombineTransposeParams& p;
  const Exchange& x;
  Session& s;

  __device__ CombineTranspose(const CombineTransposeParams& params, Session& session)
      : p(params), x(params.exchange), s(session) {}

  __device__ void serve_rows(const Element* token, const int64_t (&rows)[kRows],
                             const Accumulator (&weights)[kRows], int num_rows, int begin, int end,
                             Accumulator (&dots)[kRows]) const {
    for (int first = begin; first < end; first += kColumns * kWarpSize * kCount) {
      Pack<Element, kCount> packs[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = first + (c * kWarpSize + lane_id()) * kCount;
        if (column < end) packs[c] = load_pack<Element, kCount>(token + column);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = first + (c * kWarpSize + lane_id()) * kCount;
        if (column >= end) continue;
        Accumulator values[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) values[j] = widen(packs[c].elements[j]);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (i >= num_rows) break;
          const int64_t offset = rows[i] * p.width + column;
          if (p.rows != nullptr) {
            Pack<Element, kCount> out;
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
              out.elements[j] = round_to<Element>(weights[i] * values[j]);
            }
            store_pack(static_cast<Element*>(p.rows) + offset, out);
          }
          if (p.weight_grads != nullptr) {
            const auto row =
                load_pack<Element, kCount>(static_cast<const Element*>(p.expert_out) + offset);
#pragma unroll
            for (int j = 0; j < kCount; ++j) dots[i] += widen(row.elements[j]) * values[j];
          }
        }
      }
    }
  }

  __device__ void pull(const Chunk& chunk, int64_t item) const {
    const int rank = source_rank(x, item);
    const auto unit = static_cast<int>(item / x.num_ranks);
    const int token = chunk.begin + unit / p.num_slices;
    const int slice = unit % p.num_slices;
    const bool own = rank == x.rank;
    const auto* weights = own ? static_cast<const Accumulator*>(p.weights)
                              : s.buffer<const Accumulator>(rank, kWeights);
    const Routes routes(own ? p.dest_rank : s.buffer<int32_t>(rank, kDestRank),
                        own ? p.dest_row : s.buffer<int32_t>(rank, kDestRow), weights, token,
                        x.top_k);
    const auto* tokens = own ? static_cast<const Element*>(p.tokens)
                             : s.buffer<const Element>(rank, kFirstLeaf);
    Accumulator* grads =
        p.weight_grads == nullptr
            ? nullptr
            : (own ? static_cast<Accumulator*>(p.weight_grads)
                   : s.buffer<Accumulator>(rank, kWeightGrads)) +
                  static_cast<int64_t>(token) * x.top_k;
    if (own && grads != nullptr && lane_id() < x.top_k && routes.rank < 0) grads[lane_id()] = 0;
    uint32_t mask = routes.on(x.rank);
    const int begin = slice * p.slice_width;
    const int end = min(begin + p.slice_width, p.width);
    while (mask != 0) {
      int64_t rows[kRows];
      Accumulator row_weights[kRows];
      int assignments[kRows];
      Accumulator dots[kRows] = {};
      int num_rows = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int k = mask != 0 ? __ffs(static_cast<int>(mask)) - 1 : 0;
        num_rows += mask != 0;
        mask &= mask - 1;
        assignments[i] = k;
        rows[i] = __shfl_sync(kFullWarp, routes.row, k);
        row_weights[i] = __shfl_sync(kFullWarp, routes.weight, k);
      }
      serve_rows(tokens + static_cast<int64_t>(token) * p.width, rows, row_weights, num_rows, begin,
                 end, dots);
      if (grads == nullptr) continue;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
          dots[i] += __shfl_xor_sync(kFullWarp, dots[i], distance);
        }
        if (i < num_rows && lane_id() == 0) grads[assignments[i]] = dots[i];
      }
    }
  }

  __device__ void zero_padding(int64_t first_row) const {
    const int64_t row = first_row + lane_id();
    const bool padding =
        lane_id() < kBlockRows && row < x.capacity && p.row_source[row] < 0;
    for (uint32_t rest = __ballot_sync(kFullWarp, padding); rest != 0; rest &= rest - 1) {
      const int64_t zero_row = first_row + __ffs(static_cast<int>(rest)) - 1;
      Element* to = static_cast<Element*>(p.rows) + zero_row * p.width;
      for (int column = lane_id() * kCount; column < p.width; column += kWarpSize * kCount) {
        store_pack(to + column, Pack<Element, kCount>{});
      }
    }
  }
};

__device__ void post_buffers(const CombineTransposeParams& p, const Session& s) {
  const Exchange& x = p.exchange;
  post_signature(x, s);
  if (threadIdx.x != 0) return;
  post_address(x, s, kDestRank, p.dest_rank);
  post_address(x, s, kDestRow, p.dest_row);
  post_address(x, s, kWeights, p.weights);
  post_address(x, s, kWeightGrads, p.weight_grads);
  post_address(x, s, kFirstLeaf, p.tokens);
}

template <typename Element, int kCount>
__global__ void __launch_bounds__(kThreads, 1)
    combine_transpose_kernel(const __grid_constant__ CombineTransposeParams p) {
  __shared__ Session s;
  const Exchange& x = p.exchange;
  const Chunk chunk(x.num_tokens);
  if (!open(x, s)) return;
  if (blockIdx.x == 0) post_buffers(p, s);
  constexpr uint32_t kSlots = 1u << kDestRank | 1u << kDestRow | 1u << kWeights |
                              1u << kWeightGrads | 1u << kFirstLeaf;
  if (receive_addresses(x, s, kSlots)) {
    const CombineTranspose<Element, kCount> op(p, s);
    const Work work(static_cast<int64_t>(chunk.size()) * p.num_slices * x.num_ranks,
                    p.rows == nullptr ? 0 : x.capacity, p.row_stride);
    run_work(
        work, s, [&](int64_t item) { op.pull(chunk, item); },
        [&](int64_t row) { op.zero_padding(row); });
  }
  __syncthreads();
  // The weights' gradients are in the peers' memory; finish() tells the peers so.
  if (threadIdx.x == 0) fence_system();
  finish(x, s);
}

}  // namespace

const void* combine_transpose_function(DType dtype, bool wide) {
  const void* function = nullptr;
  with_element_type(dtype, [&](auto tag) {
    using Element = typename decltype(tag)::Type;
    constexpr int kWide = wide_pack(sizeof(Element));
    function = wide ? reinterpret_cast<const void*>(&combine_transpose_kernel<Element, kWide>)
                    : reinterpret_cast<const void*>(&combine_transpose_kernel<Element, 1>);
  });
  return function;
}

}  // namespace freeio::cuda
