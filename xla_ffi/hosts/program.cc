#include "hosts/program.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "core/channels.h"
#include "cuda/current_device.h"
#include "cuda/gpu.h"
#include "cuda/peers.h"
#include "hosts/kernels.h"
#include "hosts/nvshmem.h"
#include "hosts/sources.h"

namespace freeio::cuda {
namespace {

class NetworkSources final : public Sources {
 public:
  explicit NetworkSources(const Nvshmem& nvshmem) : nvshmem_(nvshmem) {}

 private:
  Status expose_region(void* base, size_t bytes) override { return nvshmem_.expose(base, bytes); }
  void hide_region(void* base) override { nvshmem_.hide(base); }

  const Nvshmem nvshmem_;
};

// Tells the GPU of this process which PEs have gone. All that this takes is made beforehand: a call
// that allocates may wait for the kernels, and these may wait for the word.
class Departures final : public pod::Guest {
 public:
  // Makes all that a word takes, on the thread's GPU. `joined` must outlive it.
  static Status make(const JoinedHosts& joined, std::unique_ptr<Departures>& made) {
    auto departures = std::unique_ptr<Departures>(new Departures(joined));
    void* words = nullptr;
    Status status =
        cuda_status(cudaHostAlloc(&words, joined.program.host_of_pe.size() * sizeof(uint32_t),
                                  cudaHostAllocPortable),
                    "cudaHostAlloc");
    if (!status.ok()) return status;
    departures->words_.reset(static_cast<uint32_t*>(words));
    status = cuda_status(cudaStreamCreateWithFlags(&departures->stream_, cudaStreamNonBlocking),
                         "cudaStreamCreateWithFlags");
    if (status.ok()) made = std::move(departures);
    return status;
  }

  ~Departures() override {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  Departures(const Departures&) = delete;
  Departures& operator=(const Departures&) = delete;

  // Whether some process has gone without a word.
  bool has_loss() const { return has_loss_; }

  void received(int process, std::string_view, pod::UniqueFd) override {
    throw std::runtime_error("freeio_jax: process " + std::to_string(process) +
                             " sent a message on the channel of hosts, which has none");
  }

  void gone(int process, pod::Departure how) override {
    const HostsProgram& program = joined_.program;
    if (static_cast<size_t>(process) >= program.host_of_pe.size()) return;
    if (how != pod::Departure::kOrderly) has_loss_ = true;
    RelaxedCapture relaxed;
    CurrentDevice current(program.ordinal);
    words_[process] = why_gone(how);
    uint32_t* const word =
        &joined_.landings.layout.mail_of_pe(joined_.landings.address[program.pe], process).why_gone;
    // Partner: the load in may_wait_for_host(). If this fails, kernels wait until the time-out. The
    // memory need not be the GPU's: NVSHMEM_HEAP_KIND=SYSMEM.
    cudaMemcpyAsync(word, &words_[process], sizeof(*word), cudaMemcpyDefault, stream_);
  }

 private:
  explicit Departures(const JoinedHosts& joined) : joined_(joined) {}

  const JoinedHosts& joined_;
  std::unique_ptr<uint32_t[], FreeHost> words_;  // pinned, one for each PE
  cudaStream_t stream_ = nullptr;  // of its own: the kernel that waits for the PE holds XLA's
  std::atomic<bool> has_loss_{false};
};

struct State {
  std::mutex mutex;
  const JoinedHosts* joined = nullptr;
  // Calls that were prepared before leave_hosts() may still read these.
  std::vector<std::unique_ptr<JoinedHosts>> all;
  std::vector<std::unique_ptr<Departures>> all_departures;  // their pods may still call them
  std::unique_ptr<NetworkSources> sources;
  bool is_bound = false;  // NVSHMEM knows of the kernels' module
  std::byte* memory = nullptr;
  int64_t bytes = 0;

  // In any of the pods: a PE that is lost does not come back.
  bool has_loss() const {
    return std::any_of(all_departures.begin(), all_departures.end(),
                       [](const auto& departures) { return departures->has_loss(); });
  }
};

// Lives until the process ends, as the engine does.
State& state() {
  static State* const instance = std::make_unique<State>().release();
  return *instance;
}

// With the state locked. Symmetric memory of this size, as it was when it was new. The PEs agree on
// the size, so they agree on what to call.
Status allocate(const Nvshmem& nvshmem, int64_t bytes) {
  if (state().bytes != bytes) {
    if (state().memory != nullptr) nvshmem.free(state().memory);
    state().memory = nullptr;
    state().bytes = 0;
    void* memory = nullptr;
    Status status = nvshmem.allocate(kWindowAlignment, static_cast<size_t>(bytes), memory);
    if (!status.ok()) return status;
    state().memory = static_cast<std::byte*>(memory);
    state().bytes = bytes;
  }
  Status status =
      cuda_status(cudaMemset(state().memory, 0, static_cast<size_t>(bytes)), "cudaMemset");
  if (status.ok()) status = cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return status;
}

// Loads every kernel: one that CUDA loads lazily waits for the kernels that run, and these may wait
// for it.
Status load_kernels(int ordinal) {
  int of_gpu = 0;
  Status status =
      cuda_status(cudaDeviceGetAttribute(&of_gpu, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal),
                  "cudaDeviceGetAttribute");
  for_each_hosts_kernel([&](const Kernel& kernel, auto) {
    if (status.ok()) status = load_kernel(kernel, of_gpu);
  });
  return status;
}

}  // namespace

Status join_hosts(pod::Pod& pod, HostsProgram program) {
  RelaxedCapture relaxed;
  CurrentDevice current(program.ordinal);
  Status status = cuda_status(current.error(), "cudaSetDevice");
  if (!status.ok()) return status;
  Nvshmem nvshmem;
  status = Nvshmem::find(nvshmem);
  if (status.ok()) status = nvshmem.check_started();
  if (!status.ok()) return status;
  std::lock_guard lock(state().mutex);
  const auto num_pes = static_cast<int>(program.host_of_pe.size());
  auto joined = std::make_unique<JoinedHosts>();
  Landings& landings = joined->landings;
  landings.layout.num_pes = num_pes;
  landings.layout.num_hosts =
      *std::max_element(program.host_of_pe.begin(), program.host_of_pe.end()) + 1;
  landings.layout.part_bytes = program.part_bytes;
  landings.host_of_pe = program.host_of_pe;
  status = allocate(nvshmem, landings.layout.bytes());
  if (!status.ok()) return status;
  landings.address.resize(num_pes, nullptr);
  bool needs_network = false;
  for (int pe = 0; pe < num_pes; ++pe) {
    void* const address =
        pe == program.pe ? state().memory : nvshmem.address_on(state().memory, pe);
    landings.address[pe] = static_cast<std::byte*>(address);
    needs_network |= address == nullptr;
    if (address == nullptr && program.gpu_of_pe[pe] >= 0) {
      return {Code::kInternal,
              "freeio_jax: NVSHMEM does not map the memory of PE " + std::to_string(pe) +
                  ", which is on the same host, so the ranks of a host cannot share what comes "
                  "from other hosts. NVSHMEM_DISABLE_P2P must not be set where a host has several "
                  "GPUs."};
    }
  }
  // By itself a GPU reads all of its memory. The network has to be told of it.
  if (needs_network) {
    if (state().sources == nullptr) state().sources = std::make_unique<NetworkSources>(nvshmem);
    landings.sources = state().sources.get();
  }
  if (!state().is_bound) {
    status = nvshmem.bind(hosts_dispatch_along());
    if (!status.ok()) return status;
    state().is_bound = true;
  }
  status = load_kernels(program.ordinal);
  if (!status.ok()) return status;
  joined->program = std::move(program);
  std::unique_ptr<Departures> departures;
  status = Departures::make(*joined, departures);
  if (!status.ok()) return status;
  state().all_departures.push_back(std::move(departures));
  pod.admit(Channel::kHosts, *state().all_departures.back());
  state().joined = joined.get();
  state().all.push_back(std::move(joined));
  return {};
}

Status try_network(const void* memory_of_xla, size_t bytes) {
  const JoinedHosts* const joined = joined_hosts();
  if (joined == nullptr || joined->landings.sources == nullptr) return {};
  CurrentDevice current(joined->program.ordinal);
  Nvshmem nvshmem;
  Status status = Nvshmem::find(nvshmem);
  if (status.ok()) status = joined->landings.sources->expose(memory_of_xla);
  if (!status.ok()) return status;
  const LandingLayout& layout = joined->landings.layout;
  const int host = joined->program.host_of_pe[joined->program.pe];
  std::byte* const window =
      layout.window(joined->landings.address[joined->program.pe], host, 0, kRequests);
  const auto most = std::min(bytes, static_cast<size_t>(layout.part_bytes));
  for (int pe = 0; pe < layout.num_pes; ++pe) {
    if (joined->landings.address[pe] != nullptr) continue;
    for (const size_t size : {size_t{8}, most / 64, most / 64, most}) {
      nvshmem.put(window, memory_of_xla, size, pe);
    }
  }
  return {};
}

bool leave_hosts() {
  std::lock_guard lock(state().mutex);
  state().joined = nullptr;
  return !state().has_loss();
}

const JoinedHosts* joined_hosts() {
  std::lock_guard lock(state().mutex);
  return state().joined;
}

Reach reach_of(const JoinedHosts& joined) {
  Reach reach;
  for (int pe = 0; pe < joined.landings.layout.num_pes; ++pe) {
    if (joined.program.gpu_of_pe[pe] >= 0) continue;
    (joined.landings.address[pe] != nullptr ? reach.by_link : reach.by_network).push_back(pe);
  }
  reach.symmetric_bytes = joined.landings.layout.bytes();
  return reach;
}

}  // namespace freeio::cuda
