// Messages to users about failed exchanges and long waits.
#pragma once

#include <string>

#include "core/status.h"
#include "cuda/gpu_block.h"

namespace freeio::cuda {

// The error of a failed exchange. `timeout`: for how many seconds a rank waits. `peer_process`: the
// process of the peer if it is not this one; else empty. The text also says that the engine makes
// no further exchange on this GPU.
Status to_status(const Failure& failure, double timeout, const std::string& peer_process);

// How many seconds the wait has lasted, rounded down.
int seconds_of(const Wait& wait);

// What the log says of a wait that goes on. It ends after `timeout` seconds.
std::string to_note(const Wait& wait, double timeout, const std::string& peer_process);

}  // namespace freeio::cuda
