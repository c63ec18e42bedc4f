// A custom call as one GPU runs it.
//
// What does not depend on the run is found once: the group's GPUs, the kernel, how rows are cut,
// the signature. A run fills in the addresses of its buffers and launches. It allocates nothing,
// and no two GPUs share a lock for it.
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
#include "cuda/peers.h"
#include "cuda/plan.h"

namespace freeio::cuda {

// Which call it is, and whose.
struct CallSite {
  Operation operation = Operation::kDispatch;
  Layout layout;
  Member member;
  uint32_t instance = 0;  // custom call of the program
};

// Addresses of this process's buffers, in the form that the host's other processes understand.
class SharedAddresses {
 public:
  // Puts the address into that form.
  Status translate(Peers& peers, uint64_t& address);

 private:
  std::vector<SharedRegion> regions_;  // that the peers have mapped: one, or a few
};

// Not to be used by two threads at once.
template <typename Operands>
class Call {
 public:
  using Types = typename Operands::Types;

  Call(CallSite site, const Types& types) : site_(std::move(site)), types_(types) {}

  // Launches the kernel on this member's GPU, which is the current one. `stream` is a cudaStream_t.
  // An error if this or an earlier exchange on the GPU has failed.
  Status run(const Operands& operands, void* stream);

 private:
  Status prepare(int32_t alignment);
  Status post_addresses();

  const CallSite site_;
  const Types types_;
  // What the rest was prepared for.
  uint64_t engine_version_ = 0;  // 0: nothing
  int32_t alignment_ = 0;

  Connection connection_;
  Plan plan_ = {};
  LoadedKernel kernel_;
  typename Operands::Params params_ = {};
  SharedAddresses addresses_;
};

}  // namespace freeio::cuda
