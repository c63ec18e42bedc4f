// combine: each process sums the weighted expert rows of its own ranks' tokens.
#include <algorithm>
#include <tuple>
#include <vector>

#include "core/dtype.h"
#include "cpu/chunks.h"
#include "cpu/exchange.h"
#include "cpu/expert_rows.h"
#include "cpu/threads.h"

namespace freeio::cpu {

namespace {

// One row of a token on some rank, with its weight.
template <typename Element>
struct Term {
  int64_t host;
  int32_t rank;
  const Element* row;
  typename Element::Accumulator weight;
};

// sum += addend, rounded once to Element: what would cross a link.
template <typename Element, typename Accumulator = typename Element::Accumulator>
void add_rounded(const Accumulator* addend, int64_t width, Accumulator* sum) {
  for (int64_t i = 0; i < width; ++i) sum[i] += Element::widen(Element::round(addend[i]));
}

// partial = sum of the terms of one rank.
template <typename Element, typename Accumulator = typename Element::Accumulator>
void sum_terms(const Term<Element>* begin, const Term<Element>* end, int64_t offset, int64_t width,
               Accumulator* partial) {
  std::fill_n(partial, width, Accumulator{0});
  for (const Term<Element>* term = begin; term != end; ++term) {
    const Element* row = term->row + offset;
    const Accumulator weight = term->weight;
    for (int64_t i = 0; i < width; ++i) partial[i] += weight * Element::widen(row[i]);
  }
}

template <typename Element>
void combine_tokens(const Layout& layout, const std::vector<const Combine*>& ranks,
                    const Homes& homes, bool alone, int64_t rank, int64_t begin, int64_t end) {
  using Accumulator = typename Element::Accumulator;
  constexpr int64_t kBlock = 512;
  Accumulator partial[kBlock];  // of one rank
  Accumulator of_host[kBlock];
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
      terms.push_back({op.hosts != nullptr ? op.hosts[peer] : 0, peer, rows.of<Element>(a),
                       weights != nullptr ? weights[a] : Accumulator{1}});
    }
    // By host, then by rank, and within a rank in order of k.
    std::stable_sort(terms.begin(), terms.end(), [](const auto& a, const auto& b) {
      return std::tie(a.host, a.rank) < std::tie(b.host, b.rank);
    });
    auto* sums = static_cast<Element*>(op.sums) + token * op.width;
    for (int64_t offset = 0; offset < op.width; offset += kBlock) {
      const int64_t width = std::min(kBlock, op.width - offset);
      std::fill_n(total, width, Accumulator{0});
      std::fill_n(of_host, width, Accumulator{0});
      // With one host nothing more is added, so its sum is the total.
      Accumulator* const sum = op.hosts != nullptr ? of_host : total;
      const Term<Element>* const last = terms.data() + terms.size();
      for (const Term<Element>* first = terms.data(); first != last;) {
        const Term<Element>* next = first;
        while (next != last && next->rank == first->rank) ++next;
        sum_terms(first, next, offset, width, partial);
        add_rounded<Element>(partial, width, sum);
        if (op.hosts != nullptr && (next == last || next->host != first->host)) {
          add_rounded<Element>(of_host, width, total);
          std::fill_n(of_host, width, Accumulator{0});
        }
        first = next;
      }
      for (int64_t i = 0; i < width; ++i) sums[offset + i] = Element::round(total[i]);
    }
  }
}

}  // namespace

void exchange(const Layout& layout, const std::vector<const Combine*>& ranks, const Homes& homes) {
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

}  // namespace freeio::cpu
