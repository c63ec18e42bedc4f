// The channels between processes. On each channel one engine exchanges messages with the same
// engine in the other processes. On kHosts there are no messages: its guest, which knows of PEs,
// only learns which processes have gone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freeio {

enum class Channel : uint32_t { kCpu, kCuda, kHosts };

inline constexpr size_t kNumChannels = 3;

}  // namespace freeio
