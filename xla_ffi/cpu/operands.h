// The operands and results of each operation, for one rank of an exchange.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "core/dtype.h"
#include "core/operations.h"

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
  const int64_t* hosts;    // [R]: the host of each rank, in order of rank; null: one host
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

// Before an exchange that XLA's collectives make, because its group spans hosts: all ranks say that
// they make it. No row moves.
struct Meet {
  Operation operation = {};  // that follows
  std::string rows;          // element types and shapes, as describe() writes them
};

// The operations come first, in the order of their list.
using Operands = std::variant<Dispatch, DispatchAlong, Combine, CombineTranspose, Meet>;

inline const char* name_of(const Operands& operands) {
  if (const Meet* meet = std::get_if<Meet>(&operands)) return freeio::name_of(meet->operation);
  return freeio::name_of(static_cast<Operation>(operands.index()));
}

}  // namespace freeio::cpu
