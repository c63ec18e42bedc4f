// Every operation whose order other GPUs or CTAs rely on, by name.
#pragma once

#include <cstdint>

namespace freeio::cuda {

// Publishes all that this thread wrote or has seen. Partner: load_acquire_system on the peer.
__device__ inline void store_release_system(uint32_t* word, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

// Partner: store_release_system, or store_relaxed_system after a fence, on the peer.
__device__ inline uint32_t load_acquire_system(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// Publishes nothing by itself. After fence_system() it publishes what came before the fence.
__device__ inline void store_relaxed_system(uint32_t* word, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

// In shared memory: publishes all that this thread wrote or has seen. Partner: load_acquire_block
// in the same CTA.
__device__ inline void store_release_block(uint64_t* word, uint64_t value) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(word));
  asm volatile("st.release.cta.shared.u64 [%0], %1;" ::"r"(shared), "l"(value) : "memory");
}

// Partner: store_release_block.
__device__ inline uint64_t load_acquire_block(const uint64_t* word) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(word));
  uint64_t value;
  asm volatile("ld.acquire.cta.shared.u64 %0, [%1];" : "=l"(value) : "r"(shared) : "memory");
  return value;
}

// Counts in shared memory. The last one sees what all others of the CTA wrote before their call.
__device__ inline uint64_t add_acquire_release_block(uint64_t* counter, uint64_t amount) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(counter));
  uint64_t before;
  asm volatile("atom.acq_rel.cta.shared.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "r"(shared), "l"(amount)
               : "memory");
  return before;
}

// Value and flag in one store. Partner: load_word on the peer.
__device__ inline void store_word(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

// Partner: store_word on the peer. Only fences order other things that the peer wrote before.
__device__ inline uint64_t load_word(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

// Two neighbouring words, at a multiple of 16 bytes. Each of them is loaded as one.
struct WordPair {
  uint64_t first;
  uint64_t second;
};
__device__ inline WordPair load_word_pair(const uint64_t* words) {
  WordPair pair;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(pair.first), "=l"(pair.second)
               : "l"(words)
               : "memory");
  return pair;
}

// A lane's part of a line of 128 bytes, stored by all eight lanes of the line with one instruction.
// The line arrives at the peer as one: a reader that sees the new last eight bytes also sees the
// other bytes that were stored with them. (PTX's model promises that of no access wider than 16
// bytes. What this relies on is that NVLink carries what a warp stores to a line in one packet, as
// NCCL's protocol of lines does.) Whole warp. Partner: load_line on the peer.
__device__ inline void store_line(uint4* part, const uint4& value) {
  __syncwarp();  // one instruction for all lanes
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(part), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// Whole warp. Partner: store_line on the peer.
__device__ inline uint4 load_line(const uint4* part) {
  __syncwarp();
  uint4 value;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(part)
               : "memory");
  return value;
}

// As load_word. After it, this thread also sees what the peer wrote before its last fence, or
// before its kernel began. (The start of a kernel is no release in PTX's model. This relies on the
// fact that the kernels before it have ended, so that their writes are in the memory of their GPU.)
__device__ inline uint64_t load_acquire_word(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

// Comes before store_word. A peer that has loaded the word by load_acquire_word sees everything
// that was written before the fence.
__device__ inline void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Counts a CTA in. The last one sees what all others wrote before their call.
__device__ inline uint32_t add_acquire_release_device(uint32_t* counter, uint32_t amount) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(amount)
               : "memory");
  return before;
}

// Adds to a counter of a peer, or of this GPU, and publishes all that this thread wrote or has
// seen. Partner: load_acquire_system where the counter is.
__device__ inline void add_release_system(uint32_t* counter, uint32_t amount) {
  asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(counter), "r"(amount) : "memory");
}

// The same, but it publishes nothing, so it does not wait for earlier stores as a release does. It
// comes after every load whose value this thread, or a thread that it met at a barrier, has used.
// So the peer may overwrite the loaded memory from now on. (PTX's model does not promise this. It
// relies on the fact that a value which has been used has been loaded.)
__device__ inline void add_relaxed_system(uint32_t* counter, uint32_t amount) {
  asm volatile("red.relaxed.sys.global.add.u32 [%0], %1;" ::"l"(counter), "r"(amount) : "memory");
}

// Counts to `last` and starts again at 0. It orders nothing, and the caller does not wait for it.
__device__ inline void count_around_device(uint32_t* counter, uint32_t last) {
  asm volatile("red.relaxed.gpu.global.inc.u32 [%0], %1;" ::"l"(counter), "r"(last) : "memory");
}

// A word of this GPU that its own CTAs or its peers write. The load orders nothing.
__device__ inline uint32_t load_relaxed_device(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// Sleeps about that long, at most 1000 microseconds.
template <uint32_t kMicroseconds>
__device__ inline void sleep_microseconds() {
  asm volatile("nanosleep.u32 %0;" ::"n"(kMicroseconds * 1000));
}

__device__ inline uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

}  // namespace freeio::cuda
