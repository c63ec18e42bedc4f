// What tells builds apart whose processes would misunderstand each other.
#pragma once

namespace freeio {

// Processes connect only if they have the same number. Give it a new one with each change of what
// they send each other, or of memory that another process reads or writes: frames (pod/pod.cc),
// messages (cpu/wire.cc, cuda/peers.cc), control blocks (cpu/peer_memory.h), GPU blocks and the
// exchanges over them (cuda/gpu_block.h, cuda/device), symmetric memory (hosts/landing.h,
// hosts/device).
inline constexpr int kProtocol = 1;

}  // namespace freeio
