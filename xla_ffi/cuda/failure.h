// What users are told of a failed exchange.
#pragma once

#include <string>

#include "core/status.h"
#include "cuda/gpu_block.h"

namespace freeio::cuda {

// `timeout`: seconds that were waited. `peer_process`: which process has the peer, where that is
// another one. The engine on the GPU runs no exchange after a failure, and the text says so.
Status to_status(const Failure& failure, double timeout, const std::string& peer_process);

// Seconds that it has lasted, rounded down.
int seconds_of(const Wait& wait);

// What the log says of a wait that goes on, and ends after `timeout` seconds.
std::string to_note(const Wait& wait, double timeout, const std::string& peer_process);

}  // namespace freeio::cuda
