// Chooses the kernel of a call by its types, and decides how rows are cut into slices, what is
// sent, and which addresses the peers get. Knows nothing of XLA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/layout.h"
#include "core/status.h"
#include "cuda/kernels.h"
#include "cuda/operands.h"
#include "cuda/params.h"

namespace freeio::cuda {

// What a launch needs in addition to the parameters.
struct Plan {
  Kernel kernel;
  uint32_t rows;    // in the signature: a digest of the row types
  uint32_t posted;  // buffers whose addresses the peers get: a bit for each Address
};

// Lowers the bounds on what one rank sends through the GPU blocks of its peers. Up to `routes`
// assignments, combine and its transpose send routes, and dispatch sends places. Up to `slices`
// slices, a call with few assignments is small. The defaults and the largest values are
// kMaxSentRoutes and kMaxSentSlices. Only tests call this. All ranks must have the same bounds.
void set_most_sent(int64_t routes, int64_t slices);

// Sets on how many CTAs at most a large combine takes the kernel for few of them. The default is
// kFewCtas. Only tests and measurements call this. All ranks must have the same.
void set_few_ctas(int32_t ctas);

// The largest power of two, up to 16, that divides the addresses of all rows of the call.
int32_t alignment_of(const DispatchTypes& types, const DispatchOperands& operands);
int32_t alignment_of(const CombineTypes& types, const CombineOperands& operands);
int32_t alignment_of(const CombineTransposeTypes& types, const CombineTransposeOperands& operands);

// Makes the plan, and fills the parameters, except for those that set_operands() fills.
// find_group() must have filled their exchange. `ctas`: of the kernel. `alignment`: the result of
// alignment_of(). An error if the engine cannot number that many assignments.
Status make_plan(const DispatchTypes& types, int32_t alignment, int32_t ctas,
                 DispatchParams& params, Plan& plan);
Status make_plan(const CombineTypes& types, int32_t alignment, int32_t ctas, CombineParams& params,
                 Plan& plan);
Status make_plan(const CombineTransposeTypes& types, int32_t alignment, int32_t ctas,
                 CombineTransposeParams& params, Plan& plan);

// What make_plan() decides for rows that are pulled, in a dispatch and in one along a handle.
// Returns the digest of the row types. Fills the leaves, the slices and the padding. `leaves` gets
// a bit for the address of each leaf.
uint32_t plan_pulling(const DispatchTypes& types, int32_t alignment, DispatchParams& params,
                      uint32_t& leaves);

// Whether lanes take several elements of a row at a time.
bool is_wide(DType dtype, int64_t width, int32_t alignment);
int64_t bytes_of(DType dtype);
// The padding that a call looks for. `marks`: whether it marks padding in the handle, too.
Blocks blocks_of(const Exchange& exchange, bool marks);

// Fills in the addresses of the buffers, also those that may be posted.
void set_operands(const DispatchOperands& operands, DispatchParams& params);
void set_operands(const CombineOperands& operands, CombineParams& params);
void set_operands(const CombineTransposeOperands& operands, CombineTransposeParams& params);

}  // namespace freeio::cuda
