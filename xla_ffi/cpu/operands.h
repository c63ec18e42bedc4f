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

// The alternatives are in the order of the list of operations.
using Operands = std::variant<Dispatch, DispatchAlong, Combine, CombineTranspose>;

inline const char* name_of(const Operands& operands) {
  return freeio::name_of(static_cast<Operation>(operands.index()));
}

}  // namespace freeio::cpu
