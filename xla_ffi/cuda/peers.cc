#include "cuda/peers.h"

#include <cuda_runtime_api.h>

#include <cctype>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "core/channels.h"
#include "cuda/current_device.h"

namespace freeio::cuda {
namespace {

std::chrono::steady_clock::time_point after(double seconds) {
  return std::chrono::steady_clock::now() +
         std::chrono::duration_cast<std::chrono::steady_clock::duration>(
             std::chrono::duration<double>(seconds));
}

// The allocator that the user chose for XLA; empty: the default. Reads the variable as JAX does.
std::string chosen_allocator() {
  const char* value = std::getenv("XLA_PYTHON_CLIENT_ALLOCATOR");
  std::string name = value != nullptr ? value : "";
  for (char& letter : name) {
    letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  }
  return name == "default" || name == "bfc" ? "" : name;
}

// The error for memory that cannot be shared. `why`: the driver's error, if there is one.
Status not_shareable(const Status& why = {}) {
  const std::string allocator = chosen_allocator();
  std::string text =
      "freeio_jax: XLA's memory on this process's GPU cannot be shared with the other processes of "
      "the host. Several processes need XLA's default allocator: ";
  text += !allocator.empty()
              ? "unset XLA_PYTHON_CLIENT_ALLOCATOR, which is " + allocator + " now."
              : "XLA_PYTHON_CLIENT_ALLOCATOR must not be set, and XLA_FLAGS must leave its memory "
                "pool as it is.";
  if (!why.ok()) text += " (" + why.message + ")";
  return {Code::kInternal, text};
}

const char* text_of(pod::Departure how) {
  switch (how) {
    case pod::Departure::kOrderly:
      return " has left (freeio_jax.shutdown(), or the end of its program)";
    case pod::Departure::kDeath:
      return " has ended";
    case pod::Departure::kGarbage:
      return " has sent bytes that are no message of this engine";
  }
  return "";
}

}  // namespace

WhyGone why_gone(pod::Departure how) {
  switch (how) {
    case pod::Departure::kOrderly:
      return kLeft;
    case pod::Departure::kDeath:
      return kDied;
    case pod::Departure::kGarbage:
      return kSentGarbage;
  }
  return kDied;
}

// The beginning of every message. It travels as it lies in memory, because sender and receiver are
// the same program on the same host.
struct Peers::Message {
  enum class Kind : int32_t {
    kBlock,    // the GPU blocks of `gpu`, of `bytes`; the file is their memory
    kRegion,   // the sender's region with the number `region`; the file is its memory
    kMapped,   // the sender has mapped the receiver's region
    kRefused,  // the sender cannot map the receiver's region; the reason follows as text
  };
  Kind kind = Kind::kBlock;
  int32_t gpu = 0;
  uint32_t region = 0;
  uint64_t bytes = 0;
};

Peers::Peers(pod::Pod& pod, int process, std::map<int, int> processes, std::vector<OwnGpu> own)
    : pod_(pod), process_(process), processes_(std::move(processes)), own_(std::move(own)) {
  for (const auto& [gpu, owner] : processes_) {
    if (owner != process_) others_.insert(owner);
  }
}

Peers::~Peers() {
  for (void* stream : streams_) cudaStreamDestroy(static_cast<cudaStream_t>(stream));
}

std::vector<int> Peers::ordinals() const {
  std::vector<int> ordinals;
  for (const OwnGpu& own : own_) ordinals.push_back(own.ordinal);
  return ordinals;
}

std::string Peers::who(int gpu) const {
  const auto found = processes_.find(gpu);
  return found == processes_.end() || found->second == process_ ? "" : pod_.who(found->second);
}

void Peers::send(int process, const Message& message, const std::string& text, int file) {
  std::string bytes(sizeof(message), '\0');
  std::memcpy(bytes.data(), &message, sizeof(message));
  pod_.send(process, Channel::kCuda, bytes + text, file);
}

Status Peers::connect(double timeout) {
  for (const OwnGpu& own : own_) {
    CurrentDevice current(own.ordinal);
    cudaStream_t stream = nullptr;
    Status status = cuda_status(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
                                "cudaStreamCreateWithFlags");
    if (!status.ok()) return status;
    streams_.push_back(stream);
  }
  pod_.admit(Channel::kCuda, *this);
  std::set<int> others;
  {
    std::lock_guard lock(mutex_);
    others = others_;
  }
  for (const OwnGpu& own : own_) {
    pod::UniqueFd file;
    Status status = own.allocation->export_to(file);
    if (!status.ok()) return status;
    Message message;
    message.gpu = own.gpu;
    message.bytes = own.bytes;
    try {
      for (const int process : others) send(process, message, "", file.get());
    } catch (const std::exception& error) {
      return {Code::kInternal, std::string("freeio_jax.initialize: ") + error.what()};
    }
  }
  std::unique_lock lock(mutex_);
  const auto missing = [this] {
    std::set<int> processes;
    for (const auto& [gpu, owner] : processes_) {
      if (owner != process_ && blocks_.count(gpu) == 0) processes.insert(owner);
    }
    return processes;
  };
  const auto deadline = after(timeout);
  while (true) {
    const std::set<int> processes = missing();
    if (processes.empty()) return {};
    if (!failure_.empty()) return {Code::kInternal, "freeio_jax.initialize: " + failure_};
    for (const int process : processes) {
      if (departures_.count(process) != 0) {
        return {Code::kUnavailable, "freeio_jax.initialize: " + departures_.at(process) + "."};
      }
    }
    if (changed_.wait_until(lock, deadline) == std::cv_status::timeout && !missing().empty()) {
      std::ostringstream text;
      text << "freeio_jax.initialize: " << pod_.who(process_) << " waited " << timeout
           << " s for the GPUs of " << pod_.who(*missing().begin())
           << ". Every process must call freeio_jax.initialize().";
      return {Code::kDeadlineExceeded, text.str()};
    }
  }
}

GpuBlock* Peers::block(int gpu) const {
  std::lock_guard lock(mutex_);
  const auto found = blocks_.find(gpu);
  return found == blocks_.end() ? nullptr : static_cast<GpuBlock*>(found->second.base());
}

Status Peers::share(const void* pointer, double timeout, SharedRegion& shared) {
  RelaxedCapture relaxed;  // XLA may be capturing the launch that this is for
  // XLA may have freed a region and then got another one at the same addresses.
  uint64_t allocation_id = 0;
  Status status = allocation_id_of(pointer, allocation_id);
  if (!status.ok()) return not_shareable(status);
  const auto value = reinterpret_cast<uint64_t>(pointer);
  std::unique_lock lock(mutex_);
  Region* region = nullptr;
  for (Region& one : regions_) {
    if (one.contains(value, allocation_id)) region = &one;
  }
  if (region == nullptr) {
    // Some allocators make an allocation for each buffer. The driver may be able to export these.
    // But the peers would keep the memory of buffers that XLA has freed, and the table of regions
    // would soon be full.
    if (!chosen_allocator().empty()) return not_shareable();
    Region fresh;
    fresh.number = kFirstRegion + static_cast<uint32_t>(regions_.size());
    fresh.allocation_id = allocation_id;
    fresh.pending = others_;
    if (fresh.number >= kMaxRegions) {
      return {Code::kInternal,
              "freeio_jax: XLA's memory on this process's GPUs lies in more than " +
                  std::to_string(kMaxRegions - kFirstRegion) +
                  " allocations, and the peers have room for no more. Let XLA take its memory at "
                  "once: XLA_PYTHON_CLIENT_PREALLOCATE=true."};
    }
    status = publish(pointer, fresh);
    if (!status.ok()) return status;
    regions_.push_back(std::move(fresh));
    region = &regions_.back();  // valid while other regions are added, as this is a list
  }
  const auto deadline = after(timeout);
  while (!region->pending.empty() && region->refusal.empty()) {
    if (changed_.wait_until(lock, deadline) == std::cv_status::timeout &&
        !region->pending.empty()) {
      std::ostringstream text;
      text << "freeio_jax: " << pod_.who(*region->pending.begin()) << " did not map "
           << region->range.bytes << " bytes of " << pod_.who(process_) << " within " << timeout
           << " s. It may be stopped, or very slow: allow more time with "
              "freeio_jax.config(timeout=seconds) or FREEIO_TIMEOUT.";
      return {Code::kDeadlineExceeded, text.str()};
    }
  }
  if (!region->refusal.empty()) return {Code::kInternal, region->refusal};
  shared = *region;
  return {};
}

// The caller holds the mutex. So no other thread finds the region before the peers get its message.
Status Peers::publish(const void* pointer, Region& region) {
  Allocation allocation;
  pod::UniqueFd file;
  Status status = range_of(pointer, region.range);
  if (status.ok()) status = Allocation::behind(pointer, allocation);
  if (status.ok()) status = allocation.export_to(file);
  if (!status.ok()) return not_shareable(status);
  // Ranks of this process read the same words as the peers, so they need a table entry, too.
  status = enter_base(process_, region.number, region.range.base);
  if (!status.ok()) return status;
  Message message;
  message.kind = Message::Kind::kRegion;
  message.region = region.number;
  message.bytes = region.range.bytes;
  try {
    for (const int process : others_) send(process, message, "", file.get());
  } catch (const std::exception& error) {
    return {Code::kInternal, std::string("freeio_jax: ") + error.what()};
  }
  return {};
}

Status Peers::map_file(const pod::UniqueFd& file, size_t bytes, Mapping& mapping) const {
  if (file.get() < 0) return {Code::kInternal, "freeio_jax: a peer's message lacks its file."};
  CurrentDevice current(own_.front().ordinal);
  Allocation allocation;
  Status status = Allocation::import(file, allocation);
  // The mapping keeps the memory after the handle of `allocation` is released.
  return status.ok() ? Mapping::make(allocation, bytes, ordinals(), mapping) : status;
}

Status Peers::map_block(int process, const Message& message, const pod::UniqueFd& file) {
  // The size follows from the build and from the number of GPUs, which all processes know alike.
  if (message.bytes != own_.front().bytes) {
    return {Code::kInternal,
            pod_.who(process) + " has GPU blocks of " + std::to_string(message.bytes) +
                " bytes, and " + pod_.who(process_) + " has GPU blocks of " +
                std::to_string(own_.front().bytes) +
                " bytes. All processes need the same build of freeio_jax: one version, "
                "and one FREEIO_MAX_RANKS"};
  }
  Mapping mapping;
  Status status = map_file(file, message.bytes, mapping);
  if (!status.ok()) return status;
  std::lock_guard lock(mutex_);
  blocks_[message.gpu] = std::move(mapping);
  return {};
}

// Enters in the tables of all GPUs of this process where they see a region of `process`.
Status Peers::enter_base(int process, uint32_t region, uint64_t base) const {
  Status status;
  for (size_t i = 0; i < own_.size() && status.ok(); ++i) {
    CurrentDevice current(own_[i].ordinal);
    const auto stream = static_cast<cudaStream_t>(streams_[i]);
    for (const auto& [gpu, owner] : processes_) {
      if (owner != process || !status.ok()) continue;
      for (int lane = 0; lane < kLanes && status.ok(); ++lane) {
        uint64_t* const entry = &own_[i].block_of(lane)->region_base[gpu][region];
        status =
            cuda_status(cudaMemcpyAsync(entry, &base, sizeof(base), cudaMemcpyHostToDevice, stream),
                        "cudaMemcpyAsync");
      }
    }
    if (status.ok()) status = cuda_status(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
  return status;
}

// The peer makes no call with this region before it has the answer. So no kernel here needs the
// table entry before it is written.
Status Peers::map_region(int process, const Message& message, const pod::UniqueFd& file) {
  if (message.region < kFirstRegion || message.region >= kMaxRegions) {
    return {Code::kInternal, "freeio_jax: a peer's region has an impossible number."};
  }
  Mapping mapping;
  Status status = map_file(file, message.bytes, mapping);
  if (!status.ok()) return status;
  status = enter_base(process, message.region, reinterpret_cast<uint64_t>(mapping.base()));
  if (!status.ok()) return status;
  std::lock_guard lock(mutex_);
  mappings_.push_back(std::move(mapping));
  return {};
}

void Peers::received(int process, std::string_view text, pod::UniqueFd file) {
  RelaxedCapture relaxed;
  std::lock_guard serving(serving_);
  if (has_released_) return;
  Message message;
  if (text.size() < sizeof(message)) {
    throw std::runtime_error("freeio_jax: " + pod_.who(process) + " sent " +
                             std::to_string(text.size()) +
                             " bytes to the CUDA engine, whose messages have at least " +
                             std::to_string(sizeof(message)));
  }
  std::memcpy(&message, text.data(), sizeof(message));
  switch (message.kind) {
    case Message::Kind::kBlock: {
      const auto owner = processes_.find(message.gpu);
      if (owner == processes_.end() || owner->second != process) {
        throw std::runtime_error("freeio_jax: " + pod_.who(process) +
                                 " sent the GPU block of GPU " + std::to_string(message.gpu) +
                                 ", which is not its own");
      }
      const Status status = map_block(process, message, file);
      if (!status.ok()) {
        std::lock_guard lock(mutex_);
        failure_ = status.message;
      }
      break;
    }
    case Message::Kind::kRegion: {
      const Status status = map_region(process, message, file);
      Message answer;
      answer.kind = status.ok() ? Message::Kind::kMapped : Message::Kind::kRefused;
      answer.region = message.region;
      try {
        send(process, answer, status.message);
      } catch (const std::exception&) {
        // The process that waits for the answer gets an error at its time-out, which names this
        // one.
      }
      break;
    }
    case Message::Kind::kMapped:
    case Message::Kind::kRefused: {
      std::lock_guard lock(mutex_);
      for (Region& region : regions_) {
        if (region.number != message.region) continue;
        if (message.kind == Message::Kind::kMapped) {
          region.pending.erase(process);
        } else {
          region.refusal = "freeio_jax: " + pod_.who(process) + " cannot map the memory of " +
                           pod_.who(process_) + ": " + std::string(text.substr(sizeof(message)));
        }
      }
      break;
    }
    default:
      throw std::runtime_error("freeio_jax: " + pod_.who(process) +
                               " sent the CUDA engine a message of the unknown kind " +
                               std::to_string(static_cast<int32_t>(message.kind)));
  }
  changed_.notify_all();
}

void Peers::gone(int process, pod::Departure how) {
  std::lock_guard serving(serving_);
  if (has_released_) return;
  {
    std::lock_guard lock(mutex_);
    others_.erase(process);
    departures_[process] = pod_.who(process) + text_of(how);
    for (Region& region : regions_) region.pending.erase(process);
    for (const auto& [gpu, owner] : processes_) {
      if (owner != process) continue;
      // Partner: the load in look_at_host(), of kernels that wait for that GPU.
      for (const OwnGpu& own : own_) {
        *const_cast<volatile uint32_t*>(&own.host->why_gone[gpu]) = why_gone(how);
      }
    }
  }
  changed_.notify_all();
}

void Peers::release() {
  std::lock_guard serving(serving_);
  std::lock_guard lock(mutex_);
  has_released_ = true;
  blocks_.clear();
  mappings_.clear();
  regions_.clear();
}

size_t Peers::mapped_bytes() const {
  std::lock_guard lock(mutex_);
  size_t bytes = 0;
  for (const auto& [gpu, mapping] : blocks_) bytes += mapping.bytes();
  for (const Mapping& mapping : mappings_) bytes += mapping.bytes();
  return bytes;
}

}  // namespace freeio::cuda
