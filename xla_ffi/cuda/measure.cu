#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "cuda/device/memory_order.cuh"
#include "cuda/gpu.h"
#include "cuda/measure.h"

namespace freeio::cuda {
namespace {

constexpr int kCopyThreads = 1024;
constexpr int kRounds = 10;

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("freeio_jax: ") + cudaGetErrorString(error));
  }
}

struct DestroyEvent {
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
using DeviceMemory = std::unique_ptr<void, FreeDevice>;
using Event = std::unique_ptr<CUevent_st, DestroyEvent>;

DeviceMemory allocate(size_t bytes) {
  void* pointer = nullptr;
  check(cudaMalloc(&pointer, bytes));
  DeviceMemory memory(pointer);
  check(cudaMemset(pointer, 1, bytes));
  return memory;
}

Event make_event() {
  cudaEvent_t event;
  check(cudaEventCreate(&event));
  return Event(event);
}

// The shortest of some rounds of what `enqueue` puts on the default stream, in seconds.
template <typename F>
double best_seconds(const F& enqueue) {
  const Event begin = make_event(), end = make_event();
  float best = 0;
  for (int round = 0; round < kRounds; ++round) {
    check(cudaEventRecord(begin.get()));
    check(enqueue());
    check(cudaEventRecord(end.get()));
    check(cudaEventSynchronize(end.get()));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()));
    if (best == 0 || milliseconds < best) best = milliseconds;
  }
  return best * 1e-3;
}

// What one GPU copies: from its own memory to that of each peer, or from theirs to its own.
struct Copies {
  static constexpr int kMaxPeers = kMaxRanks - 1;
  const uint4* from[kMaxPeers];
  uint4* to[kMaxPeers];
  int num_peers;
  int64_t count;  // for each peer
};

__global__ void __launch_bounds__(kCopyThreads, 1) empty_kernel() {}

// Copies for all peers at once: the pieces of a CTA alternate among the peers.
__global__ void copy_kernel(const __grid_constant__ Copies copies) {
  constexpr int kUnroll = 4;
  constexpr int64_t kPiece = kCopyThreads * kUnroll;
  const int64_t pieces = (copies.count + kPiece - 1) / kPiece * copies.num_peers;
  for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const auto peer = static_cast<int>(piece % copies.num_peers);
    const int64_t base = piece / copies.num_peers * kPiece + threadIdx.x;
    const uint4* const from = copies.from[peer];
    uint4* const to = copies.to[peer];
    uint4 values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * kCopyThreads < copies.count) values[u] = from[base + u * kCopyThreads];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * kCopyThreads < copies.count) to[base + u * kCopyThreads] = values[u];
    }
  }
}

// Sends a flag back and forth between two GPUs. Returns if the other GPU never answers.
__global__ void ping_pong_kernel(uint32_t* mine, uint32_t* theirs, bool first, int rounds) {
  for (int round = 1; round <= rounds; ++round) {
    // Partner: the load on the other GPU.
    if (first) store_release_system(theirs, static_cast<uint32_t>(round));
    int polls = 0;
    while (load_acquire_system(mine) < static_cast<uint32_t>(round)) {
      if (++polls > 10'000'000) return;
    }
    if (!first) store_release_system(theirs, static_cast<uint32_t>(round));
  }
}

}  // namespace

double memory_bandwidth(int ordinal, int64_t bytes) {
  check(cudaSetDevice(ordinal));
  const DeviceMemory from = allocate(bytes), to = allocate(bytes);
  return 2 * static_cast<double>(bytes) / best_seconds([&] {
           return cudaMemcpyAsync(to.get(), from.get(), bytes, cudaMemcpyDeviceToDevice);
         });
}

double write_bandwidth(int ordinal, int64_t bytes) {
  check(cudaSetDevice(ordinal));
  const DeviceMemory to = allocate(bytes);
  return static_cast<double>(bytes) /
         best_seconds([&] { return cudaMemsetAsync(to.get(), 0, bytes); });
}

double link_bandwidth(const std::vector<int>& ordinals, int64_t bytes, int ctas, bool pull) {
  const size_t num_gpus = ordinals.size();
  if (num_gpus < 2 || num_gpus > Copies::kMaxPeers + 1) {
    throw std::invalid_argument("freeio_jax: link_bandwidth takes 2 to " +
                                std::to_string(kMaxRanks) + " GPUs");
  }
  const int64_t share = bytes / (static_cast<int64_t>(num_gpus) - 1) / 16;
  std::vector<DeviceMemory> local(num_gpus), shared(num_gpus);
  std::vector<Event> begins(num_gpus), ends(num_gpus);
  for (size_t i = 0; i < num_gpus; ++i) {
    check(cudaSetDevice(ordinals[i]));
    local[i] = allocate(bytes);
    shared[i] = allocate(bytes);
    begins[i] = make_event();
    ends[i] = make_event();
  }
  float longest = 0;
  for (const bool timed : {false, true}) {
    for (size_t i = 0; i < num_gpus; ++i) {
      check(cudaSetDevice(ordinals[i]));
      check(cudaEventRecord(begins[i].get()));
      Copies copies = {};
      copies.count = share;
      for (size_t step = 1; step < num_gpus; ++step) {
        const int64_t offset = static_cast<int64_t>(step - 1) * share;
        auto* remote = static_cast<uint4*>(shared[(i + step) % num_gpus].get()) + offset;
        auto* own = static_cast<uint4*>(local[i].get()) + offset;
        copies.from[copies.num_peers] = pull ? remote : own;
        copies.to[copies.num_peers++] = pull ? own : remote;
      }
      for (int round = 0; round < kRounds; ++round) {
        copy_kernel<<<ctas, kCopyThreads>>>(copies);
        check(cudaGetLastError());
      }
      check(cudaEventRecord(ends[i].get()));
    }
    for (size_t i = 0; i < num_gpus; ++i) {
      check(cudaSetDevice(ordinals[i]));
      check(cudaEventSynchronize(ends[i].get()));
      float milliseconds = 0;
      check(cudaEventElapsedTime(&milliseconds, begins[i].get(), ends[i].get()));
      if (timed) longest = std::max(longest, milliseconds);
    }
  }
  return static_cast<double>(share) * 16 * (static_cast<double>(num_gpus) - 1) * kRounds /
         (longest * 1e-3);
}

double flag_trip(int from, int to) {
  constexpr int kTrips = 2000;
  const int ordinals[2] = {from, to};
  DeviceMemory flags[2];
  Event begins[2], ends[2];
  for (int i = 0; i < 2; ++i) {
    check(cudaSetDevice(ordinals[i]));
    flags[i] = allocate(sizeof(uint32_t));
    begins[i] = make_event();
    ends[i] = make_event();
  }
  float milliseconds = 0;
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (int i = 0; i < 2; ++i) {
      check(cudaSetDevice(ordinals[i]));
      check(cudaMemset(flags[i].get(), 0, sizeof(uint32_t)));
      check(cudaDeviceSynchronize());
    }
    for (int i = 0; i < 2; ++i) {
      check(cudaSetDevice(ordinals[i]));
      check(cudaEventRecord(begins[i].get()));
      ping_pong_kernel<<<1, 1>>>(static_cast<uint32_t*>(flags[i].get()),
                                 static_cast<uint32_t*>(flags[1 - i].get()), i == 0, kTrips);
      check(cudaGetLastError());
      check(cudaEventRecord(ends[i].get()));
    }
    for (int i = 0; i < 2; ++i) {
      check(cudaSetDevice(ordinals[i]));
      check(cudaEventSynchronize(ends[i].get()));
    }
    check(cudaEventElapsedTime(&milliseconds, begins[1].get(), ends[1].get()));
  }
  return milliseconds * 1e-3 / (2 * kTrips);
}

const char* launch_empty_kernel(int64_t ctas, void* stream) {
  empty_kernel<<<static_cast<unsigned>(ctas), kCopyThreads, 0,
                 static_cast<cudaStream_t>(stream)>>>();
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace freeio::cuda
