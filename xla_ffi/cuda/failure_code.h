// How a failure between hosts is recorded in a Failure (cuda/gpu_block.h), which has no room for
// hosts: in its `word`.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace freeio::cuda {

// In signatures, and so in failures and waits: added to the number of the operation.
constexpr uint32_t kBetweenHosts = 4;

// A rank that waits for, or differs from, a rank of another host.
struct FailureCode {
  int rank;  // of the group
  int host;  // of the group, in order of the hosts' first ranks
  int peer;
  int peer_host;
  int word;  // of the signature

  FREEIO_HOST_DEVICE int32_t packed() const {
    return kMark | rank << 22 | host << 16 | peer << 10 | peer_host << 4 | word;
  }
  // False: the failure is one within a host, and its ranks are numbered within the host.
  FREEIO_HOST_DEVICE static bool is_packed(int32_t code) { return (code & kMark) != 0; }
  FREEIO_HOST_DEVICE static FailureCode unpack(int32_t code) {
    return {code >> 22 & 63, code >> 16 & 63, code >> 10 & 63, code >> 4 & 63, code & 15};
  }

 private:
  static constexpr int32_t kMark = 1 << 28;
};

}  // namespace freeio::cuda
