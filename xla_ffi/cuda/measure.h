// Measures what the GPUs can do at best. The benchmark compares the engine with a floor that is
// made of these figures.
#pragma once

#include <cstdint>
#include <vector>

namespace freeio::cuda {

// Bytes per second, read and written, of a copy within one GPU.
double memory_bandwidth(int ordinal, int64_t bytes);

// Bytes per second, written, where a GPU sets its own memory and reads none.
double write_bandwidth(int ordinal, int64_t bytes);

// Bytes per second that leave each GPU, and as many enter it, while all GPUs copy to all others at
// once, with `ctas` CTAs on each. `pull`: the CTAs load from the peers. Else they store to them.
double link_bandwidth(const std::vector<int>& ordinals, int64_t bytes, int ctas, bool pull);

// Seconds that a flag needs from one GPU to another.
double flag_trip(int from, int to);

// Launches an empty kernel of `ctas` CTAs. Returns null, or the text of CUDA's error.
const char* launch_empty_kernel(int64_t ctas, void* stream);

}  // namespace freeio::cuda
