#include "cuda/peers.h"

#include <cuda_runtime_api.h>

#include <cctype>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <sstream>
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

// The allocator that XLA was told to use; empty: its default one. As JAX reads the variable.
std::string chosen_allocator() {
  const char* value = std::getenv("XLA_PYTHON_CLIENT_ALLOCATOR");
  std::string name = value != nullptr ? value : "";
  for (char& letter : name) {
    letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  }
  return name == "default" || name == "bfc" ? "" : name;
}

// What to say of memory of a kind that cannot be shared. `why`: the driver's reason, if it has one.
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

}  // namespace

// What a message begins with; both ends are the same program on the same host. Text may follow.
struct Peers::Note {
  enum class Kind : int32_t {
    kBlock,    // a GPU's GPU block; the file is its memory
    kRegion,   // a region of the sender; the file is its memory
    kMapped,   // the sender has mapped the receiver's region
    kRefused,  // the sender could not: text
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

void Peers::send(int process, const Note& note, const std::string& text, int file) {
  std::string bytes(sizeof(note), '\0');
  std::memcpy(bytes.data(), &note, sizeof(note));
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
    Note note;
    note.gpu = own.gpu;
    note.bytes = own.bytes;
    try {
      for (const int process : others) send(process, note, "", file.get());
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
      if (lost_.count(process) != 0) {
        return {Code::kUnavailable, "freeio_jax.initialize: " + lost_.at(process) + "."};
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
  // XLA may have given a region back and got another one at the same place.
  uint64_t identity = 0;
  Status status = identity_of(pointer, identity);
  if (!status.ok()) return not_shareable(status);
  const auto value = reinterpret_cast<uint64_t>(pointer);
  std::unique_lock lock(mutex_);
  Region* region = nullptr;
  for (Region& one : regions_) {
    if (one.contains(value, identity)) region = &one;
  }
  if (region == nullptr) {
    // Where each buffer is an allocation of its own the driver may well export it. But the peers
    // would hold the memory of those that XLA has freed, and the table of regions would soon be
    // full.
    if (!chosen_allocator().empty()) return not_shareable();
    Region fresh;
    fresh.number = kFirstRegion + static_cast<uint32_t>(regions_.size());
    fresh.identity = identity;
    fresh.awaited = others_;
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
    region = &regions_.back();  // a list: it stays there
  }
  const auto deadline = after(timeout);
  while (!region->awaited.empty() && region->refusal.empty()) {
    if (changed_.wait_until(lock, deadline) == std::cv_status::timeout &&
        !region->awaited.empty()) {
      std::ostringstream text;
      text << "freeio_jax: " << pod_.who(*region->awaited.begin()) << " did not map "
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

// With the mutex held: a message to a peer is sent before another thread looks for the region.
Status Peers::publish(const void* pointer, Region& region) {
  Allocation allocation;
  pod::UniqueFd file;
  Status status = range_of(pointer, region.range);
  if (status.ok()) status = Allocation::behind(pointer, allocation);
  if (status.ok()) status = allocation.export_to(file);
  if (!status.ok()) return not_shareable(status);
  // Ranks of this process get the same words as the others.
  status = enter_base(process_, region.number, region.range.base);
  if (!status.ok()) return status;
  Note note;
  note.kind = Note::Kind::kRegion;
  note.region = region.number;
  note.bytes = region.range.bytes;
  try {
    for (const int process : others_) send(process, note, "", file.get());
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
  // The mapping keeps the memory; the handle is not needed any more.
  return status.ok() ? Mapping::make(allocation, bytes, ordinals(), mapping) : status;
}

Status Peers::map_block(const Note& note, const pod::UniqueFd& file) {
  Mapping mapping;
  Status status = map_file(file, note.bytes, mapping);
  if (!status.ok()) return status;
  std::lock_guard lock(mutex_);
  blocks_[note.gpu] = std::move(mapping);
  return {};
}

// Tells all GPUs of this process where they see a region of `process`.
Status Peers::enter_base(int process, uint32_t region, uint64_t base) const {
  Status status;
  for (size_t i = 0; i < own_.size() && status.ok(); ++i) {
    CurrentDevice current(own_[i].ordinal);
    const auto stream = static_cast<cudaStream_t>(streams_[i]);
    for (const auto& [gpu, owner] : processes_) {
      if (owner != process || !status.ok()) continue;
      status = cuda_status(cudaMemcpyAsync(&own_[i].block->region_base[gpu][region], &base,
                                           sizeof(base), cudaMemcpyHostToDevice, stream),
                           "cudaMemcpyAsync");
    }
    if (status.ok()) status = cuda_status(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
  return status;
}

// The peer makes no call with this region before it has the answer, so a kernel that runs here
// meanwhile reads the table's entry only after it is there.
Status Peers::map_region(int process, const Note& note, const pod::UniqueFd& file) {
  if (note.region < kFirstRegion || note.region >= kMaxRegions) {
    return {Code::kInternal, "freeio_jax: a peer's region has an impossible number."};
  }
  Mapping mapping;
  Status status = map_file(file, note.bytes, mapping);
  if (!status.ok()) return status;
  status = enter_base(process, note.region, reinterpret_cast<uint64_t>(mapping.base()));
  if (!status.ok()) return status;
  std::lock_guard lock(mutex_);
  mappings_.push_back(std::move(mapping));
  return {};
}

void Peers::received(int process, std::string_view text, pod::UniqueFd file) {
  RelaxedCapture relaxed;
  std::lock_guard serving(serving_);
  Note note;
  if (released_ || text.size() < sizeof(note)) return;
  std::memcpy(&note, text.data(), sizeof(note));
  switch (note.kind) {
    case Note::Kind::kBlock: {
      const auto owner = processes_.find(note.gpu);
      if (owner == processes_.end() || owner->second != process) return;
      const Status status = map_block(note, file);
      if (!status.ok()) {
        std::lock_guard lock(mutex_);
        failure_ = status.message;
      }
      break;
    }
    case Note::Kind::kRegion: {
      const Status status = map_region(process, note, file);
      Note answer;
      answer.kind = status.ok() ? Note::Kind::kMapped : Note::Kind::kRefused;
      answer.region = note.region;
      try {
        send(process, answer, status.message);
      } catch (const std::exception&) {
        // The process that waits for the answer learns by its time-out that this one gave none.
      }
      break;
    }
    case Note::Kind::kMapped:
    case Note::Kind::kRefused: {
      std::lock_guard lock(mutex_);
      for (Region& region : regions_) {
        if (region.number != note.region) continue;
        if (note.kind == Note::Kind::kMapped) {
          region.awaited.erase(process);
        } else {
          region.refusal = "freeio_jax: " + pod_.who(process) + " cannot map the memory of " +
                           pod_.who(process_) + ": " + std::string(text.substr(sizeof(note)));
        }
      }
      break;
    }
  }
  changed_.notify_all();
}

void Peers::gone(int process, pod::Departure how) {
  const bool is_orderly = how == pod::Departure::kOrderly;
  std::lock_guard serving(serving_);
  if (released_) return;
  {
    std::lock_guard lock(mutex_);
    others_.erase(process);
    lost_[process] =
        pod_.who(process) + (is_orderly ? " has left (freeio_jax.shutdown(), or the end of its "
                                          "program)"
                                        : " has ended");
    for (Region& region : regions_) region.awaited.erase(process);
    for (const auto& [gpu, owner] : processes_) {
      if (owner != process) continue;
      // Partner: the load in look_at_host(), of kernels that wait for that GPU.
      for (const OwnGpu& own : own_) {
        *const_cast<volatile uint32_t*>(&own.host->lost[gpu]) = is_orderly ? kLeft : kDied;
      }
    }
  }
  changed_.notify_all();
}

void Peers::release() {
  std::lock_guard serving(serving_);
  std::lock_guard lock(mutex_);
  released_ = true;
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
