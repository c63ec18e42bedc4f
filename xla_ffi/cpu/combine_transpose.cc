// combine_transpose: the gradients of combine by the rows and by the weights.
#include <vector>

#include "core/dtype.h"
#include "cpu/chunks.h"
#include "cpu/exchange.h"
#include "cpu/expert_rows.h"
#include "cpu/padding.h"

namespace freeio::cpu {

namespace {

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

}  // namespace

void exchange(const Layout& layout, const std::vector<const CombineTranspose*>& ranks,
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
          zero_padding(layout, {{nullptr, out, bytes, {}}}, ranks[rank]->routes.row_source, begin,
                       end);
          if (!alone) pull_scaled_rows<Element>(layout, ranks, homes, rank, begin, end);
        });
  });
}

}  // namespace freeio::cpu
