// The channels between the processes of a host. On each channel one engine exchanges messages with
// the same engine in the other processes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freeio {

enum class Channel : uint32_t { kCpu, kCuda };

inline constexpr size_t kNumChannels = 2;

}  // namespace freeio
