// The channels between the processes of a host. On each of them one engine talks with its like in
// the other processes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freeio {

enum class Channel : uint32_t { kCpu, kCuda };

inline constexpr size_t kNumChannels = 2;

}  // namespace freeio
