// Words that carry their own flag, and the mailboxes and inboxes in which they lie.
#pragma once

#include "cuda/device/cta.cuh"
#include "cuda/device/memory_order.cuh"
#include "cuda/params.h"

namespace freeio::cuda {

__device__ inline GpuBlock& self(const Exchange& x) { return *x.gpu_block[x.rank]; }

// The GPU block of any lane on the GPU of a rank.
__device__ inline GpuBlock& block_of_lane(const Exchange& x, int rank, int lane) {
  auto* const own = reinterpret_cast<std::byte*>(x.gpu_block[rank]);
  return *reinterpret_cast<GpuBlock*>(own + (lane - x.lane) * x.block_bytes);
}

__device__ inline Word make_word(uint32_t epoch, uint32_t value) {
  return static_cast<Word>(epoch) << 32 | value;
}
__device__ inline bool has_arrived(Word word, uint32_t epoch) { return word >> 32 == epoch; }
__device__ inline uint32_t value_of(Word word) { return static_cast<uint32_t>(word); }

// Which of two mailboxes, or of two arrays of an inbox, this exchange with the peer uses.
__device__ inline uint32_t turn(const CtaState& s, int peer) { return s.epoch[peer] % 2; }

// The mailbox on the peer that this rank writes, and the one here that the peer writes.
__device__ inline Mailbox& mailbox_to(const Exchange& x, const CtaState& s, int peer) {
  return x.gpu_block[peer]->mailbox[x.gpu[x.rank]][turn(s, peer)];
}
__device__ inline Mailbox& mailbox_from(const Exchange& x, const CtaState& s, int peer) {
  return self(x).mailbox[x.gpu[peer]][turn(s, peer)];
}

// The inbox on the peer that this rank writes, and the one here that the peer writes.
__device__ inline Inbox& inbox_to(const Exchange& x, int peer) {
  return x.gpu_block[peer]->inbox[x.gpu[x.rank]];
}
__device__ inline Inbox& inbox_from(const Exchange& x, int peer) {
  return self(x).inbox[x.gpu[peer]];
}

}  // namespace freeio::cuda
