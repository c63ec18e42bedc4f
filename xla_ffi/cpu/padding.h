// Zeros the rows of packed tensors that no assignment fills.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/layout.h"
#include "cpu/operands.h"

namespace freeio::cpu {

// Fills the rows that a call leaves unspecified with ones in all bits, so that floats there are
// NaN. Tests switch this on, to find what looks at such rows.
void poison_tails(bool poison);

// Fills the rows in [begin, end) that belong to no assignment.
void zero_padding(const Layout& layout, const std::vector<Leaf>& leaves, const int32_t* row_source,
                  int64_t begin, int64_t end);

}  // namespace freeio::cpu
