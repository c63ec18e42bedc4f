// The exchanges, once the operands of all ranks are known. A row goes straight from the sender's
// tensor to its final place in the receiver's. Each process fills the results of its own ranks. It
// reads the memory of other processes, and never writes it.
#pragma once

#include <vector>

#include "core/layout.h"
#include "cpu/operands.h"
#include "cpu/peer_memory.h"

namespace freeio::cpu {

// The process that has each rank's operands; null: this process, which fills the rank's results.
using Homes = std::vector<const PeerMemory*>;

// One exchange, with the operands by rank. Each throws std::runtime_error where a peer's memory
// cannot be read.
void exchange(const Layout& layout, std::vector<const Dispatch*> ranks, const Homes& homes);
void exchange(const Layout& layout, const std::vector<const DispatchAlong*>& ranks,
              const Homes& homes);
void exchange(const Layout& layout, const std::vector<const Combine*>& ranks, const Homes& homes);
void exchange(const Layout& layout, const std::vector<const CombineTranspose*>& ranks,
              const Homes& homes);
inline void exchange(const Layout&, const std::vector<const Meet*>&, const Homes&) {}

// The same for operands of any operation. All of `ranks` hold the same alternative.
inline void run_exchange(const Layout& layout, const std::vector<Operands>& ranks,
                         const Homes& homes) {
  std::visit(
      [&](const auto& first) {
        using Op = std::decay_t<decltype(first)>;
        std::vector<const Op*> ops;
        ops.reserve(ranks.size());
        for (const Operands& operands : ranks) ops.push_back(&std::get<Op>(operands));
        exchange(layout, ops, homes);
      },
      ranks[0]);
}

}  // namespace freeio::cpu
