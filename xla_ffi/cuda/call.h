// A custom call as one GPU runs it.
//
// The first run prepares everything that does not depend on the run: the group's GPUs, the kernel,
// how rows are cut, the signature. Later runs only fill in the addresses of their buffers and
// launch. They allocate no memory, and take no lock that another GPU uses.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "core/layout.h"
#include "core/operations.h"
#include "core/status.h"
#include "cuda/gpus.h"
#include "cuda/launch.h"
#include "cuda/operands.h"
#include "cuda/overlap.h"
#include "cuda/peers.h"
#include "cuda/plan.h"

namespace freeio::cuda {

// Which call of a program this is, and which member of a group makes it.
struct CallSite {
  Operation operation = Operation::kDispatch;
  Layout layout;
  GroupMember member;
  uint32_t instance = 0;  // a digest of the custom call and its program
  LaneShare share;
};

// Fills the signature. The kernels of all ranks compare theirs, so that ranks which make different
// calls get an error instead of each other's rows. `rows`: a digest of the row types.
void sign(const CallSite& site, uint32_t rows, uint32_t ctas,
          uint32_t (&signature)[kSignatureWords]);

// Turns addresses of this process's buffers into addresses for the peers: a region's number and an
// offset (gpu_block.h).
class SharedAddresses {
 public:
  // Replaces the address. Waits for the peers if they have not mapped its region yet.
  Status translate(Peers& peers, uint64_t& address);

 private:
  std::vector<SharedRegion> regions_;  // that all peers have mapped: mostly one
};

// Two threads must not use it at the same time.
template <typename Operands>
class Call {
 public:
  using Types = typename Operands::Types;

  Call(CallSite site, const Types& types) : site_(std::move(site)), types_(types) {}

  // Launches the kernel on this member's GPU, which must be the calling thread's. `stream` is a
  // cudaStream_t. An error if an earlier exchange on the GPU has failed.
  Status run(const Operands& operands, void* stream);

  // The same for a call in the lane kOverlap. The kernel runs beside what comes later on `stream`.
  // A WaitingCall waits for it, and finds it by `name`.
  Status start(const Operands& operands, const StartName& name, CallBuffers buffers, void* stream);

 private:
  Status fill(const Operands& operands);
  Launch launch();
  Status prepare(int32_t alignment);
  Status post_addresses();

  const CallSite site_;
  const Types types_;
  // The engine's version and the operands' alignment for which all below was prepared.
  uint64_t engine_version_ = 0;  // 0: it was not prepared
  int32_t alignment_ = 0;

  Connection connection_;
  Plan plan_ = {};
  LoadedKernel kernel_;
  typename Operands::Params params_ = {};
  SharedAddresses addresses_;
};

// The custom call that waits for what Call::start() has started, as one GPU runs it. Two threads
// must not use it at the same time.
class WaitingCall {
 public:
  // `ordinal`: CUDA's, of the calling thread's GPU. An error as that of Overlap::wait(), or if an
  // exchange on the GPU has failed.
  Status run(int ordinal, const StartName& name, const CallBuffers& buffers, void* stream);

 private:
  uint64_t engine_version_ = 0;  // as Call's
  Connection connection_;
};

}  // namespace freeio::cuda
