// dispatch, and dispatch along a handle: finds the row of every assignment, and moves token rows
// there.
#include <algorithm>
#include <cstring>
#include <list>

#include "cpu/chunks.h"
#include "cpu/exchange.h"
#include "cpu/padding.h"
#include "cpu/threads.h"

namespace freeio::cpu {

namespace {

int64_t row_bytes(const std::vector<Leaf>& leaves) {
  int64_t bytes = 0;
  for (const Leaf& leaf : leaves) bytes += leaf.row_bytes;
  return bytes;
}

// Fills packed rows [begin, end) of `rank` that come from other processes.
template <typename Op>
void pull_rows(const Layout& layout, const std::vector<const Op*>& ranks, const Homes& homes,
               const Routes& routes, int64_t rank, int64_t begin, int64_t end) {
  Gather gather;
  for (int64_t row = begin; row < end; ++row) {
    if (routes.row_source[row] < 0) continue;
    const int64_t source = layout.source_rank(routes.row_source[row]);
    if (homes[source] == nullptr) continue;
    const int64_t token = layout.source_token(routes.row_source[row]);
    for (size_t i = 0; i < ranks[rank]->leaves.size(); ++i) {
      const Leaf& to = ranks[rank]->leaves[i];
      gather.add(*homes[source], ranks[source]->leaves[i].tokens + token * to.row_bytes,
                 to.rows + row * to.row_bytes, static_cast<size_t>(to.row_bytes));
    }
  }
  gather.run();
}

// Moves every assignment's row from its token to its place in the output of its expert's rank, and
// zeroes the rows that no assignment fills, the tail only if it is asked for. `Op` is Dispatch or
// DispatchAlong. `routes` is by rank; those of ranks of other processes are not read.
template <typename Op>
void move_rows(const Layout& layout, const std::vector<const Op*>& ranks, const Homes& homes,
               const std::vector<Routes>& routes) {
  const int64_t bytes = row_bytes(ranks[0]->leaves);
  const Chunks tokens(homes, layout.num_tokens, bytes * layout.top_k);
  const Chunks rows(homes, layout.capacity, bytes);
  const bool alone = all_here(homes);
  parallel_for_both(
      tokens,
      [&](int64_t rank, int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
          for (int64_t a = token * layout.top_k; a < (token + 1) * layout.top_k; ++a) {
            const int32_t peer = routes[rank].dest_rank[a];
            if (peer < 0 || homes[peer] != nullptr) continue;
            const int64_t row = routes[rank].dest_row[a];
            for (size_t i = 0; i < ranks[rank]->leaves.size(); ++i) {
              const Leaf& leaf = ranks[rank]->leaves[i];
              std::memcpy(ranks[peer]->leaves[i].rows + row * leaf.row_bytes,
                          leaf.tokens + token * leaf.row_bytes, leaf.row_bytes);
            }
          }
        }
      },
      rows,
      [&](int64_t rank, int64_t begin, int64_t end) {
        zero_padding(layout, ranks[rank]->leaves, routes[rank].row_source, begin, end);
        if (!alone) pull_rows(layout, ranks, homes, routes[rank], rank, begin, end);
      });
}

// Fills every rank's routing outputs: loads, group sizes, and where each assignment goes.
void route(const Layout& layout, const std::vector<const Dispatch*>& ranks) {
  const int64_t num_ranks = layout.num_ranks;
  const int64_t experts = layout.experts_per_rank();
  const int64_t routing_bytes = num_ranks * (layout.num_assignments() * 3 + layout.capacity) * 4;

  // next[source][expert]: first the number of assignments, then the next free row of the source's
  // part of the expert's group. The rows of one expert are ordered by source rank.
  std::vector<std::vector<int64_t>> next(num_ranks, std::vector<int64_t>(layout.num_experts));
  parallel_for(num_ranks, routing_bytes, [&](int64_t rank) {
    const Dispatch& op = *ranks[rank];
    int32_t invalid = 0;
    for (int64_t a = 0; a < layout.num_assignments(); ++a) {
      const int32_t id = op.topk_idx[a];
      if (layout.is_expert(id)) ++next[rank][id];
      invalid += layout.is_invalid(id);
    }
    *op.num_invalid = invalid;
    std::fill_n(op.row_source, layout.capacity, -1);
  });

  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    const Dispatch& op = *ranks[rank];
    const int64_t first = rank * experts;
    for (int64_t g = 0; g < experts; ++g) {
      int64_t load = 0;
      for (int64_t source = 0; source < num_ranks; ++source) load += next[source][first + g];
      op.expert_load[g] = static_cast<int32_t>(load);
    }
    const Groups groups(layout, op.expert_load);
    int64_t dropped = 0;
    for (int64_t g = 0; g < experts; ++g) {
      op.group_sizes[g] = static_cast<int32_t>(groups.sizes[g]);
      dropped += op.expert_load[g] - std::min<int64_t>(op.expert_load[g], groups.sizes[g]);
      int64_t row = groups.starts[g];
      for (int64_t source = 0; source < num_ranks; ++source) {
        const int64_t count = next[source][first + g];
        next[source][first + g] = row;
        row += count;
      }
    }
    *op.num_dropped = static_cast<int32_t>(dropped);
  }

  parallel_for(num_ranks, routing_bytes, [&](int64_t rank) {
    const Dispatch& op = *ranks[rank];
    for (int64_t a = 0; a < layout.num_assignments(); ++a) {
      op.dest_rank[a] = op.dest_row[a] = -1;
      const int32_t id = op.topk_idx[a];
      if (!layout.is_expert(id)) continue;
      const int64_t row = next[rank][id]++;
      if (row >= layout.capacity) continue;
      const int64_t peer = layout.rank_of_expert(id);
      op.dest_rank[a] = static_cast<int32_t>(peer);
      op.dest_row[a] = static_cast<int32_t>(row);
      ranks[peer]->row_source[row] = static_cast<int32_t>(layout.source_of(rank, 0, a));
    }
  });
}

// The routing outputs of a rank of another process. They are needed here only during the exchange.
struct RemoteRouting {
  std::vector<int32_t> topk_idx, dest_rank, dest_row, row_source, group_sizes, expert_load;
  int32_t num_dropped = 0;
  int32_t num_invalid = 0;
  Dispatch op;

  RemoteRouting(const Layout& layout, const Dispatch& remote, const PeerMemory& home)
      : topk_idx(layout.num_assignments()),
        dest_rank(layout.num_assignments()),
        dest_row(layout.num_assignments()),
        row_source(layout.capacity),
        group_sizes(layout.experts_per_rank()),
        expert_load(layout.experts_per_rank()),
        op(remote) {
    if (!topk_idx.empty()) {
      home.read({{remote.topk_idx, topk_idx.data(), topk_idx.size() * sizeof(int32_t)}});
    }
    op.topk_idx = topk_idx.data();
    op.dest_rank = dest_rank.data();
    op.dest_row = dest_row.data();
    op.row_source = row_source.data();
    op.group_sizes = group_sizes.data();
    op.expert_load = expert_load.data();
    op.num_dropped = &num_dropped;
    op.num_invalid = &num_invalid;
  }
};

}  // namespace

void exchange(const Layout& layout, std::vector<const Dispatch*> ranks, const Homes& homes) {
  // Routing depends only on the ids of all ranks, and is little work. So every process computes all
  // of it, and the processes need not exchange results.
  std::list<RemoteRouting> remote;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    if (homes[rank] == nullptr) continue;
    remote.emplace_back(layout, *ranks[rank], *homes[rank]);
    ranks[rank] = &remote.back().op;
  }
  route(layout, ranks);
  std::vector<Routes> routes;
  for (const Dispatch* op : ranks) routes.push_back({op->dest_rank, op->dest_row, op->row_source});
  move_rows(layout, ranks, homes, routes);
}

void exchange(const Layout& layout, const std::vector<const DispatchAlong*>& ranks,
              const Homes& homes) {
  std::vector<Routes> routes;
  for (const DispatchAlong* op : ranks) routes.push_back(op->routes);
  move_rows(layout, ranks, homes, routes);
}

}  // namespace freeio::cpu
