// What the GPUs can do at best, for the benchmark: the terms of the floor.
#pragma once

#include <cstdint>
#include <vector>

namespace freeio::cuda {

// Bytes per second, read and written, of a copy within one GPU.
double memory_bandwidth(int ordinal, int64_t bytes);

// Bytes per second that leave (and enter) each GPU while all of them copy to all others at once,
// by `ctas` CTAs on each. `pull`: by loads from the peers; else by stores to them.
double link_bandwidth(const std::vector<int>& ordinals, int64_t bytes, int ctas, bool pull);

// Seconds that a flag needs from one GPU to another.
double flag_trip(int from, int to);

// Launches a kernel that does nothing, of `ctas` CTAs. Null, or what the driver says of an error.
const char* launch_nothing(int64_t ctas, void* stream);

}  // namespace freeio::cuda
