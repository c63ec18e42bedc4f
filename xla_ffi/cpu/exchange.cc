#include "cpu/exchange.h"

#include <algorithm>
#include <cstring>
#include <list>

#include "core/operations.h"
#include "cpu/threads.h"

namespace freeio::cpu {
namespace {

// Bytes that one task moves: enough to hide its start, few enough to spread over the cores.
constexpr int64_t kTaskBytes = 512 << 10;

// Cuts [0, size) of every rank of this process into chunks of about kTaskBytes, numbered through.
struct Chunks {
  std::vector<int64_t> ranks;
  int64_t size;
  int64_t step;
  int64_t per_rank;
  int64_t count;
  int64_t bytes;

  Chunks(const Homes& homes, int64_t items, int64_t bytes_per_item)
      : size(items),
        step(std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, bytes_per_item))),
        per_rank((items + step - 1) / step),
        count(0),
        bytes(0) {
    for (size_t rank = 0; rank < homes.size(); ++rank) {
      if (homes[rank] == nullptr) ranks.push_back(static_cast<int64_t>(rank));
    }
    count = static_cast<int64_t>(ranks.size()) * per_rank;
    bytes = static_cast<int64_t>(ranks.size()) * items * bytes_per_item;
  }

  int64_t rank(int64_t task) const { return ranks[task / per_rank]; }
  int64_t begin(int64_t task) const { return task % per_rank * step; }
  int64_t end(int64_t task) const { return std::min(size, begin(task) + step); }
};

// Runs `first` over its chunks and `second` over its own, all of them in parallel.
template <typename First, typename Second>
void parallel_for_both(const Chunks& a, const First& first, const Chunks& b, const Second& second) {
  parallel_for(a.count + b.count, a.bytes + b.bytes, [&](int64_t task) {
    if (task < a.count) {
      first(a.rank(task), a.begin(task), a.end(task));
    } else {
      task -= a.count;
      second(b.rank(task), b.begin(task), b.end(task));
    }
  });
}

// Calls f(begin, end) for each run of padding rows in [begin, end).
template <typename F>
void for_padding(const int32_t* row_source, int64_t begin, int64_t end, const F& f) {
  for (int64_t row = begin; row < end;) {
    if (row_source[row] >= 0) {
      ++row;
      continue;
    }
    const int64_t first = row;
    while (row < end && row_source[row] < 0) ++row;
    f(first, row);
  }
}

void zero_padding(const std::vector<Leaf>& leaves, const int32_t* row_source, int64_t begin,
                  int64_t end) {
  for_padding(row_source, begin, end, [&](int64_t first, int64_t last) {
    for (const Leaf& leaf : leaves) {
      std::memset(leaf.rows + first * leaf.row_bytes, 0, (last - first) * leaf.row_bytes);
    }
  });
}

bool all_here(const Homes& homes) {
  return std::all_of(homes.begin(), homes.end(), [](auto* home) { return home == nullptr; });
}

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

// Every assignment's row goes from its token to its place in the peer's output; what is left of
// the outputs is zeroed. `Op` is Dispatch or DispatchAlong; `routes` holds those of own ranks.
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
        zero_padding(ranks[rank]->leaves, routes[rank].row_source, begin, end);
        if (!alone) pull_rows(layout, ranks, homes, routes[rank], rank, begin, end);
      });
}

// Fills every rank's routing outputs: loads, group sizes, and where each assignment goes.
void route(const Layout& layout, const std::vector<const Dispatch*>& ranks) {
  const int64_t num_ranks = layout.num_ranks;
  const int64_t experts = layout.experts_per_rank();
  const int64_t routing_bytes = num_ranks * (layout.num_assignments() * 3 + layout.capacity) * 4;

  // counts[source][expert], then turned in place into the next free row of that source's block
  // within the expert's group: rows of one expert are ordered by source rank.
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

// The routing outputs of a rank of another process: computed here too, for nobody to see.
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

void run(const Layout& layout, std::vector<const Dispatch*> ranks, const Homes& homes) {
  // Routing is small and a function of all ranks' ids alone: every process computes all of it, and
  // nothing is left to agree on.
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

void run(const Layout& layout, const std::vector<const DispatchAlong*>& ranks, const Homes& homes) {
  std::vector<Routes> routes;
  for (const DispatchAlong* op : ranks) routes.push_back(op->routes);
  move_rows(layout, ranks, homes, routes);
}

// The expert rows of the assignments of tokens [begin, end) of one rank: where they lie, or a copy
// of those that lie in another process.
class ExpertRows {
 public:
  template <typename Op>
  ExpertRows(const Layout& layout, const std::vector<const Op*>& ranks, const Homes& homes,
             bool alone, const Routes& routes, int64_t bytes, int64_t begin, int64_t end)
      : routes_(routes), bytes_(bytes), first_(begin * layout.top_k) {
    bases_.reserve(ranks.size());
    for (const Op* op : ranks) bases_.push_back(static_cast<const std::byte*>(op->expert_out));
    if (alone) return;
    copies_.resize((end - begin) * layout.top_k);
    int64_t count = 0;
    for (int64_t a = first_; a < end * layout.top_k; ++a) {
      if (routes.dest_rank[a] >= 0 && homes[routes.dest_rank[a]] != nullptr) ++count;
    }
    memory_.resize(count * bytes);
    std::byte* next = memory_.data();
    Gather gather;
    for (int64_t a = first_; a < end * layout.top_k; ++a) {
      const int32_t peer = routes.dest_rank[a];
      if (peer < 0 || homes[peer] == nullptr) continue;
      copies_[a - first_] = next;
      gather.add(*homes[peer], in_place(a), next, static_cast<size_t>(bytes));
      next += bytes;
    }
    gather.run();
  }

  template <typename Element>
  const Element* of(int64_t assignment) const {
    const std::byte* copy = copies_.empty() ? nullptr : copies_[assignment - first_];
    return reinterpret_cast<const Element*>(copy != nullptr ? copy : in_place(assignment));
  }

 private:
  const std::byte* in_place(int64_t assignment) const {
    return bases_[routes_.dest_rank[assignment]] + routes_.dest_row[assignment] * bytes_;
  }

  const Routes& routes_;
  const int64_t bytes_;
  const int64_t first_;
  std::vector<const std::byte*> bases_;
  std::vector<const std::byte*> copies_;  // by assignment; null: in place
  std::vector<std::byte> memory_;
};

// One row of a token on some rank, with its weight.
template <typename Element>
struct Term {
  int32_t rank;
  const Element* row;
  typename Element::Accumulator weight;
};

// total += sum of the terms of one rank, rounded once to Element: what would cross a link.
template <typename Element, typename Accumulator = typename Element::Accumulator>
void add_partial_sum(const Term<Element>* begin, const Term<Element>* end, int64_t offset,
                     int64_t width, Accumulator* partial, Accumulator* total) {
  std::fill_n(partial, width, Accumulator{0});
  for (const Term<Element>* term = begin; term != end; ++term) {
    const Element* row = term->row + offset;
    const Accumulator weight = term->weight;
    for (int64_t i = 0; i < width; ++i) partial[i] += weight * Element::widen(row[i]);
  }
  for (int64_t i = 0; i < width; ++i) total[i] += Element::widen(Element::round(partial[i]));
}

template <typename Element>
void combine_tokens(const Layout& layout, const std::vector<const Combine*>& ranks,
                    const Homes& homes, bool alone, int64_t rank, int64_t begin, int64_t end) {
  using Accumulator = typename Element::Accumulator;
  constexpr int64_t kBlock = 512;
  Accumulator partial[kBlock];
  Accumulator total[kBlock];
  std::vector<Term<Element>> terms;
  const Combine& op = *ranks[rank];
  const auto* weights = static_cast<const Accumulator*>(op.weights);
  const int64_t bytes = op.width * static_cast<int64_t>(sizeof(Element));
  const ExpertRows rows(layout, ranks, homes, alone, op.routes, bytes, begin, end);
  for (int64_t token = begin; token < end; ++token) {
    terms.clear();
    for (int64_t a = token * layout.top_k; a < (token + 1) * layout.top_k; ++a) {
      const int32_t peer = op.routes.dest_rank[a];
      if (peer < 0) continue;
      terms.push_back(
          {peer, rows.of<Element>(a), weights != nullptr ? weights[a] : Accumulator{1}});
    }
    // By rank, and within a rank in order of k.
    std::stable_sort(terms.begin(), terms.end(),
                     [](const auto& a, const auto& b) { return a.rank < b.rank; });
    auto* sums = static_cast<Element*>(op.sums) + token * op.width;
    for (int64_t offset = 0; offset < op.width; offset += kBlock) {
      const int64_t width = std::min(kBlock, op.width - offset);
      std::fill_n(total, width, Accumulator{0});
      const Term<Element>* const last = terms.data() + terms.size();
      for (const Term<Element>* first = terms.data(); first != last;) {
        const Term<Element>* next = first;
        while (next != last && next->rank == first->rank) ++next;
        add_partial_sum(first, next, offset, width, partial, total);
        first = next;
      }
      for (int64_t i = 0; i < width; ++i) sums[offset + i] = Element::round(total[i]);
    }
  }
}

void run(const Layout& layout, const std::vector<const Combine*>& ranks, const Homes& homes) {
  const bool alone = all_here(homes);
  with_element_type(ranks[0]->dtype, [&](auto tag) {
    using Element = typename decltype(tag)::Type;
    const int64_t bytes = ranks[0]->width * static_cast<int64_t>(sizeof(Element));
    const Chunks chunks(homes, layout.num_tokens, bytes * layout.top_k);
    parallel_for(chunks.count, chunks.bytes, [&](int64_t task) {
      combine_tokens<Element>(layout, ranks, homes, alone, chunks.rank(task), chunks.begin(task),
                              chunks.end(task));
    });
  });
}

// Dot product in a fixed order that vectorizes: lane i adds the elements i, i + 16, i + 32, ...
template <typename Element, typename Accumulator = typename Element::Accumulator>
Accumulator dot(const Element* row, const Accumulator* token, int64_t width) {
  constexpr int64_t kLanes = 16;
  Accumulator lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += Element::widen(row[i + j]) * token[i + j];
  }
  for (int64_t j = 0; i + j < width; ++j) lanes[j] += Element::widen(row[i + j]) * token[i + j];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

// row = weight * token, rounded.
template <typename Element, typename Accumulator = typename Element::Accumulator>
void write_scaled(const Accumulator* token, Accumulator weight, int64_t width, Element* row) {
  for (int64_t i = 0; i < width; ++i) row[i] = Element::round(weight * token[i]);
}

template <typename Element>
void combine_transpose_tokens(const Layout& layout,
                              const std::vector<const CombineTranspose*>& ranks, const Homes& homes,
                              bool alone, int64_t rank, int64_t begin, int64_t end) {
  using Accumulator = typename Element::Accumulator;
  const CombineTranspose& op = *ranks[rank];
  const auto* weights = static_cast<const Accumulator*>(op.weights);
  auto* weight_grads = static_cast<Accumulator*>(op.weight_grads);
  const int64_t bytes = op.width * static_cast<int64_t>(sizeof(Element));
  const ExpertRows rows(layout, ranks, homes, alone || weight_grads == nullptr, op.routes, bytes,
                        begin, end);
  std::vector<Accumulator> wide(op.width);
  for (int64_t token = begin; token < end; ++token) {
    const auto* row = static_cast<const Element*>(op.tokens) + token * op.width;
    for (int64_t i = 0; i < op.width; ++i) wide[i] = Element::widen(row[i]);
    for (int64_t a = token * layout.top_k; a < (token + 1) * layout.top_k; ++a) {
      const int32_t peer = op.routes.dest_rank[a];
      if (weight_grads != nullptr) {
        weight_grads[a] =
            peer < 0 ? Accumulator{0} : dot(rows.of<Element>(a), wide.data(), op.width);
      }
      if (peer < 0 || op.rows == nullptr || homes[peer] != nullptr) continue;
      write_scaled(wide.data(), weights[a], op.width,
                   static_cast<Element*>(ranks[peer]->rows) + op.routes.dest_row[a] * op.width);
    }
  }
}

// Fills packed rows [begin, end) of `rank` whose tokens are in other processes.
template <typename Element>
void pull_scaled_rows(const Layout& layout, const std::vector<const CombineTranspose*>& ranks,
                      const Homes& homes, int64_t rank, int64_t begin, int64_t end) {
  using Accumulator = typename Element::Accumulator;
  const CombineTranspose& op = *ranks[rank];
  const size_t bytes = op.width * sizeof(Element);
  auto* out = static_cast<Element*>(op.rows);
  std::vector<Accumulator> weights(end - begin);
  Gather gather;
  const auto for_remote = [&](const auto& f) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t source = op.routes.row_source[row];
      if (source >= 0 && homes[layout.source_rank(source)] != nullptr) f(row, source);
    }
  };
  for_remote([&](int64_t row, int64_t source) {
    const int64_t peer = layout.source_rank(source);
    const auto* token =
        static_cast<const Element*>(ranks[peer]->tokens) + layout.source_token(source) * op.width;
    gather.add(*homes[peer], token, out + row * op.width, bytes);
    const auto* weight =
        static_cast<const Accumulator*>(ranks[peer]->weights) + layout.source_assignment(source);
    gather.add(*homes[peer], weight, &weights[row - begin], sizeof(Accumulator));
  });
  gather.run();
  std::vector<Accumulator> wide(op.width);
  for_remote([&](int64_t row, int64_t) {
    Element* token = out + row * op.width;
    for (int64_t i = 0; i < op.width; ++i) wide[i] = Element::widen(token[i]);
    write_scaled(wide.data(), weights[row - begin], op.width, token);
  });
}

void run(const Layout& layout, const std::vector<const CombineTranspose*>& ranks,
         const Homes& homes) {
  const bool alone = all_here(homes);
  with_element_type(ranks[0]->dtype, [&](auto tag) {
    using Element = typename decltype(tag)::Type;
    const int64_t bytes = ranks[0]->width * static_cast<int64_t>(sizeof(Element));
    const bool has_rows = ranks[0]->rows != nullptr;
    const Chunks tokens(homes, layout.num_tokens, bytes * layout.top_k);
    const Chunks rows(homes, has_rows ? layout.capacity : 0, bytes);
    parallel_for_both(
        tokens,
        [&](int64_t rank, int64_t begin, int64_t end) {
          combine_transpose_tokens<Element>(layout, ranks, homes, alone, rank, begin, end);
        },
        rows,
        [&](int64_t rank, int64_t begin, int64_t end) {
          auto* out = static_cast<std::byte*>(ranks[rank]->rows);
          zero_padding({{nullptr, out, bytes, {}}}, ranks[rank]->routes.row_source, begin, end);
          if (!alone) pull_scaled_rows<Element>(layout, ranks, homes, rank, begin, end);
        });
  });
}

}  // namespace

const char* name_of(const Operands& operands) {
  return freeio::name_of(static_cast<Operation>(operands.index()));
}

void run_exchange(const Layout& layout, const std::vector<Operands>& ranks, const Homes& homes) {
  std::visit(
      [&](const auto& first) {
        using Op = std::decay_t<decltype(first)>;
        std::vector<const Op*> ops;
        ops.reserve(ranks.size());
        for (const Operands& operands : ranks) ops.push_back(&std::get<Op>(operands));
        run(layout, ops, homes);
      },
      ranks[0]);
}

}  // namespace freeio::cpu
