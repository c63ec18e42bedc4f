// combine_transpose: the gradients of combine by the rows and by the weights.
//
// The expert's rank pulls the cotangent x of each token of which it has rows, once. It stores
// weight * x to each of these rows, and sends <expert_out row, x> back to the token's rank.
#include "cuda/device/elements.cuh"
#include "cuda/device/end.cuh"
#include "cuda/device/opening.cuh"
#include "cuda/device/routes.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/geometry.h"
#include "cuda/kernels.h"

namespace freeio::cuda {
namespace {

constexpr int kSharedBytes = 96 << 10;  // for the routes of a tile and its dot products

// Assignments whose routes and dot products fit.
__host__ __device__ constexpr int tile_capacity(size_t accumulator_bytes, int num_slices) {
  return kSharedBytes / static_cast<int>(2 * sizeof(int) + accumulator_bytes * (1 + num_slices));
}

// A tile's work, as one warp does it.
template <typename Element, int kCount>
struct PullingWarp {
  using Accumulator = typename Element::Accumulator;
  using R = Raw<Element, kCount>;
  // Rows of a token for which one read of x is enough. With more rows x is read again.
  static constexpr int kRows = 8;
  static constexpr int kBatch = 4;    // rows of expert_out in flight together
  static constexpr int kColumns = 4;  // accesses of one lane to x in flight together
  static constexpr int kPair = 2;     // ... to rows of expert_out
  static constexpr int kStep = kWarpSize * kCount;

  const CombineTransposeParams& p;
  const Exchange& x;
  const CtaState& s;
  const RouteTile<Accumulator>& routes_of;
  Accumulator* slice_dots;  // [R, tokens, K, num_slices], in shared memory
  const Tile& tile;

  struct Rows {
    int rows[kRows];
    int assignments[kRows];
    Accumulator weights[kRows];
    Accumulator dots[kRows];
    int count;
  };

  // Takes one access to x. Stores it, weighted, to rows [begin, begin + kBatch), and adds its part
  // of their dot products.
  __device__ void serve(const R& raw, int column, Rows& rows, int begin,
                        const R (&expert_rows)[kBatch]) const {
    Accumulator values[kCount];
    widen<Element, kCount>(raw, values);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = begin + b;
      if (i >= rows.count) continue;
      if (p.rows != nullptr) {
        Accumulator products[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) products[j] = rows.weights[i] * values[j];
        store_raw<Element, kCount>(
            static_cast<Element*>(p.rows) + int64_t{rows.rows[i]} * p.width + column,
            round_to<Element, kCount>(products));
      }
      if (p.weight_grads != nullptr) {
        Accumulator expert_values[kCount];
        widen<Element, kCount>(expert_rows[b], expert_values);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          rows.dots[i] = fma(expert_values[j], values[j], rows.dots[i]);
        }
      }
    }
  }

  __device__ void serve_rows(const Element* token, Rows& rows, int begin, int end) const {
    const auto* expert_out = static_cast<const Element*>(p.expert_out);
    for (int pass = begin; pass < end; pass += kColumns * kStep) {
      const int first = pass + lane_id() * kCount;
      R x_values[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = first + c * kStep;
        if (column < end) x_values[c] = load_raw<Element, kCount>(token + column);
      }
#pragma unroll
      for (int pair = 0; pair < kColumns; pair += kPair) {
#pragma unroll
        for (int i = 0; i < kRows; i += kBatch) {
          if (i >= rows.count) continue;
          R expert_rows[kPair][kBatch];
#pragma unroll
          for (int c = 0; c < kPair; ++c) {
            const int column = first + (pair + c) * kStep;
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
              if (expert_out != nullptr && i + b < rows.count && column < end) {
                expert_rows[c][b] = load_raw<Element, kCount>(
                    expert_out + int64_t{rows.rows[i + b]} * p.width + column);
              }
            }
          }
#pragma unroll
          for (int c = 0; c < kPair; ++c) {
            const int column = first + (pair + c) * kStep;
            if (column < end) serve(x_values[pair + c], column, rows, i, expert_rows[c]);
          }
        }
      }
    }
  }

  __device__ void pull(int item) const {
    const int rank = source_rank(x, item);
    const int unit = x.ranks.quotient(item);
    const int tile_token = p.slices.quotient(unit);
    const int slice = unit - tile_token * p.num_slices;
    const TokenRoutes<Accumulator> routes = routes_of.of(rank, tile_token);
    const auto* tokens = rank == x.rank ? static_cast<const Element*>(p.tokens)
                                        : s.buffer<const Element>(rank, kFirstLeaf);
    const int begin = slice * p.slice_width;
    const int end = min(begin + p.slice_width, p.width);
    for (uint32_t mask = routes.on(x.rank); mask != 0;) {
      Rows rows = {};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int k = mask != 0 ? __ffs(static_cast<int>(mask)) - 1 : 0;
        rows.count += mask != 0;
        mask &= mask - 1;
        rows.assignments[i] = k;
        rows.rows[i] = __shfl_sync(kFullWarp, routes.row, k);
        rows.weights[i] = __shfl_sync(kFullWarp, routes.weight, k);
      }
      serve_rows(tokens + int64_t{tile.begin + tile_token} * p.width, rows, begin, end);
      if (p.weight_grads == nullptr) continue;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
          rows.dots[i] += __shfl_xor_sync(kFullWarp, rows.dots[i], distance);
        }
        if (i >= rows.count || lane_id() != 0) continue;
        const int assignment = routes_of.first_of(rank, tile_token) + rows.assignments[i];
        slice_dots[assignment * p.num_slices + slice] = rows.dots[i];
      }
    }
  }

  // Adds up the slices' dot products, in order, and stores them on the tokens' ranks. All threads.
  __device__ void send_weight_grads() const {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < routes_of.size(); i += kThreads) {
      const int rank = routes_of.rank_of(i);
      const bool own = rank == x.rank;
      if (routes_of.ranks[i] != x.rank && !(own && routes_of.ranks[i] < 0)) continue;
      Accumulator dot = 0;
      if (routes_of.ranks[i] == x.rank) {
        for (int slice = 0; slice < p.num_slices; ++slice) {
          dot += slice_dots[i * p.num_slices + slice];
        }
      }
      Accumulator* grads = own ? static_cast<Accumulator*>(p.weight_grads)
                               : s.buffer<Accumulator>(rank, kWeightGrads);
      grads[int64_t{tile.begin} * x.top_k + i % routes_of.per_rank] = dot;
    }
  }

  __device__ void zero_padding(int64_t first_row) const {
    uint32_t rest = rows_to_zero(x, p.padding, p.row_source, first_row);
    for (; rest != 0; rest &= rest - 1) {
      const int64_t zero_row = first_row + __ffs(static_cast<int>(rest)) - 1;
      Element* to = static_cast<Element*>(p.rows) + zero_row * p.width;
      for (int column = lane_id() * kCount; column < p.width; column += kStep) {
        store_raw<Element, kCount>(to + column, R{});
      }
    }
  }
};

template <typename Element, int kCount>
__device__ void exchange(const CombineTransposeParams& p, CtaState& s, void* shared_memory) {
  const Exchange& x = p.exchange;
  const Opening opening(x);
  const Chunk chunk(x.num_tokens);
  // These loads need no peer, so they run while the exchange opens.
  const Chunk sent(p.sends_routes ? x.num_tokens * x.top_k : 0);
  const SentAssignment first(sent.begin + static_cast<int>(threadIdx.x), sent.end, p.dest_rank,
                             p.dest_row, p.weights);
  if (!open(x, s, opening)) return;
  enter(s, kRouting);
  send_routes(x, s, sent, first, p.dest_rank, p.dest_row, p.weights);
  const uint32_t slots = 1u << kWeightGrads | 1u << kFirstLeaf | (p.sends_routes ? 0 : kRouteSlots);
  if (blockIdx.x == 0) post(x, s, slots);
  enter(s, kAgreeing);
  if (!receive_addresses(x, s, slots)) return;
  using Warp = PullingWarp<Element, kCount>;
  using Accumulator = typename Element::Accumulator;
  const int capacity = tile_capacity(sizeof(Accumulator), p.num_slices);
  auto* dots = static_cast<Accumulator*>(shared_memory);
  RouteTile<Accumulator> routes(dots + capacity * p.num_slices, capacity);
  const Tiles tiles(chunk, capacity / (x.num_ranks * x.top_k));
  bool ready = true;
  tiles.for_each(s, kWarps, [&](const Tile& tile) {
    if (!ready) return;
    enter(s, kAgreeing);
    routes.begin(x, tile);
    routes.take(x, s, tile, p.dest_rank, p.dest_row, p.weights, p.sends_routes);
    ready = !__syncthreads_or(has_failed(s));
    if (!ready) return;
    enter(s, kMoving);
    const Warp warp{p, x, s, routes, dots, tile};
    const Work work(tile, tile.size() * p.num_slices * x.num_ranks, p.padding);
    run_work(
        work, s, [&](int item) { warp.pull(item); }, [&](int64_t row) { warp.zero_padding(row); });
    if (p.weight_grads != nullptr) warp.send_weight_grads();
  });
  // The weights' gradients are in the peers' memory; this tells the peers so.
  finish<true>(x, s);
}

template <typename Element, int kCount>
__global__ void __launch_bounds__(kThreads, 1)
    combine_transpose_kernel(const __grid_constant__ CombineTransposeParams p) {
  __shared__ CtaState s;
  exchange<Element, kCount>(p, s, dynamic_shared_memory<void>());
  leave(p.exchange, s, [&](const Team& spoilers) {
    const Exchange& x = p.exchange;
    const int64_t row_bytes = p.width * static_cast<int64_t>(sizeof(Element));
    const int64_t assignments = int64_t{x.num_tokens} * x.top_k;
    const auto weight_bytes = static_cast<int64_t>(sizeof(typename Element::Accumulator));
    spoil(spoilers, p.rows, x.capacity * row_bytes);
    spoil(spoilers, p.weight_grads, assignments * weight_bytes);
  });
}

}  // namespace

bool combine_transpose_fits(size_t accumulator_bytes, int num_slices, int assignments) {
  return tile_capacity(accumulator_bytes, num_slices) >= assignments;
}

Kernel combine_transpose(DType dtype, bool wide) {
  Kernel kernel;
  kernel.shared_bytes = kSharedBytes;
  with_element_type(dtype, [&](auto tag) {
    using Element = typename decltype(tag)::Type;
    constexpr int kWide = wide_pack(sizeof(Element));
    kernel.function = wide
                          ? reinterpret_cast<const void*>(&combine_transpose_kernel<Element, kWide>)
                          : reinterpret_cast<const void*>(&combine_transpose_kernel<Element, 1>);
  });
  return kernel;
}

}  // namespace freeio::cuda
