// The exchanges themselves: all ranks' operands are known, and rows go straight from the sender's
// tensor to their final row in the receiver's. Ranks of other processes are read, never written:
// each process fills the results of its own ranks.
#pragma once

#include <vector>

#include "core/layout.h"
#include "cpu/operands.h"
#include "cpu/peer_memory.h"

namespace freeio::cpu {

// Where each rank's operands are: null for this process, whose ranks' results are to be filled.
using Homes = std::vector<const PeerMemory*>;

// One exchange, with the operands by rank. Each throws std::runtime_error where a peer's memory
// cannot be read.
void exchange(const Layout& layout, std::vector<const Dispatch*> ranks, const Homes& homes);
void exchange(const Layout& layout, const std::vector<const DispatchAlong*>& ranks,
              const Homes& homes);
void exchange(const Layout& layout, const std::vector<const Combine*>& ranks, const Homes& homes);
void exchange(const Layout& layout, const std::vector<const CombineTranspose*>& ranks,
              const Homes& homes);

// The same for operands of whatever operation; `ranks` holds the same alternative for each.
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
