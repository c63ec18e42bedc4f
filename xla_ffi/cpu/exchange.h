// The exchanges themselves: all ranks' operands are known, and rows go straight from the sender's
// tensor to their final row in the receiver's. Ranks of other processes are read, never written:
// each process fills the results of its own ranks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "core/dtype.h"
#include "core/layout.h"
#include "cpu/peer_memory.h"

namespace freeio::cpu {

// One array of a token pytree.
struct Leaf {
  const std::byte* tokens;  // [T] rows
  std::byte* rows;          // [capacity] rows
  int64_t row_bytes;
  std::string row;  // element type and shape of a row, which all ranks must share
};

// The handle of a dispatch, as one rank holds it.
struct Routes {
  const int32_t* dest_rank;   // [T, K]; -1: no row
  const int32_t* dest_row;    // [T, K]; -1: no row
  const int32_t* row_source;  // [capacity]; -1: padding
};

struct Dispatch {
  const int32_t* topk_idx;  // [T, K]
  std::vector<Leaf> leaves;
  int32_t* dest_rank;
  int32_t* dest_row;
  int32_t* row_source;
  int32_t* group_sizes;  // [E/R]
  int32_t* expert_load;  // [E/R]
  int32_t* num_dropped;
  int32_t* num_invalid;
};

struct DispatchAlong {
  Routes routes;
  std::vector<Leaf> leaves;
};

struct Combine {
  Routes routes;
  DType dtype;
  int64_t width;           // elements of one row
  const void* expert_out;  // [capacity, width]
  const void* weights;     // [T, K] accumulators, or null for ones
  void* sums;              // [T, width]
};

struct CombineTranspose {
  Routes routes;
  DType dtype;
  int64_t width;
  const void* tokens;      // [T, width]
  const void* expert_out;  // [capacity, width], or null without weight_grads
  const void* weights;     // [T, K] accumulators, or null without rows
  void* rows;              // [capacity, width]: weight * token, or null
  void* weight_grads;      // [T, K] accumulators: <expert_out row, token>, or null
};

using Operands = std::variant<Dispatch, DispatchAlong, Combine, CombineTranspose>;

const char* name_of(const Operands& operands);

// Where each rank's operands are: null for this process, whose ranks' results are to be filled.
using Homes = std::vector<const PeerMemory*>;

// Runs one exchange; `ranks` holds the same alternative for each. Throws std::runtime_error where
// a peer's memory cannot be read.
void run_exchange(const Layout& layout, const std::vector<Operands>& ranks, const Homes& homes);

}  // namespace freeio::cpu
