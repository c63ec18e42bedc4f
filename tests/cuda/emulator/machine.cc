#include "machine.h"

#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <sstream>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "network.h"
#include "random.h"
#include "shared_section.h"

#ifdef __x86_64__
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#endif

namespace emulator {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStackBytes = 32 << 10;
constexpr size_t kGuardBytes = 64;  // after the dynamic shared memory
constexpr std::byte kGarbage{0xa5};
constexpr uint64_t kMillisecond = 1'000'000;

struct Cta;

enum class State : uint8_t { kReady, kBarrier, kWarp, kPolls, kDone };

// A copy to shared memory that its thread does not wait for.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  uint64_t group;
};

// A store from shared memory that its thread does not wait for.
struct BulkStore {
  void* to;
  const void* from;  // null: it has been read
  size_t bytes;
  std::vector<std::byte> values;

  void read() {
    if (from == nullptr) return;
    const auto* const begin = static_cast<const std::byte*>(from);
    values.assign(begin, begin + bytes);
    from = nullptr;
  }
};

struct Thread {
  Context context;
  Cta* cta = nullptr;
  int number = 0;
  State state = State::kReady;
  SourceLine where = {};
  // The last load by before_load(); null: the thread has done something else since.
  const void* address = nullptr;
  size_t bytes = 0;
  uint64_t value = 0;
  int free_polls = 0;      // polls that do not sleep, so that the thread comes to look at the clock
  Thread* next = nullptr;  // in the list of the threads that sleep on addresses of one bucket
  std::deque<Copy> copies;
  uint64_t group = 0;  // of the next copy
  std::vector<BulkStore> bulk_stores;
};

struct Warp {
  uint32_t all = 0;
  uint32_t ready = 0;
  uint32_t arrived = 0;
  Together what = Together::kNothing;
  uint32_t network_fences = 0;
  uint64_t arriving[kLanes];
  uint64_t gathered[kLanes];
};

struct RunningKernel;

struct Cta {
  RunningKernel* kernel = nullptr;
  unsigned number = 0;
  uint64_t serial = 0;  // never that of another CTA
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint32_t ready_warps = 0;
  unsigned at_barrier = 0;
  bool any_arriving = false;  // values at the barrier
  bool any = false;           // at the last one
  unsigned live = 0;
  uint32_t priority = 0;
  std::byte* stacks = nullptr;
  std::unique_ptr<std::byte[]> dynamic_memory;
  std::byte* dynamic = nullptr;             // aligned
  std::unique_ptr<std::byte[]> statically;  // its shared variables while another CTA runs
};

struct RunningKernel {
  Launch launch;
  std::vector<std::unique_ptr<Cta>> ctas;  // that have begun
  size_t live = 0;                         // CTAs that have not ended
  uint64_t begun_record = 0;               // of launch.begun
  bool records_begun_late = false;         // when the kernel has ended
};

// What a stream does next: it launches a kernel, records an event, or waits for one.
struct Item {
  Launch launch;
  Event* recorded = nullptr;
  const Event* awaited = nullptr;
  uint64_t record = 0;  // of the event
};

struct LineInFlight {
  uint64_t words[kLineWords];
};

struct WordInFlight {
  uint64_t* address;
  uint64_t value;
  std::shared_ptr<LineInFlight> line;  // null: it is one word
};

class Machine {
 public:
  void seed(uint64_t seed) { random_ = Random(seed); }
  void set_real_time(bool real) { real_time_ = real; }
  void set_patience(uint32_t turns) { patience_ = turns; }
  void set_multiprocessors(unsigned count) {
    for (unsigned& free : free_multiprocessors_) free = count;
  }
  void set_late_events(bool late) { late_events_ = late; }
  void enqueue(int stream, Launch launch) {
    Item item;
    if (launch.begun != nullptr) item.record = ++launch.begun->recorded;
    item.launch = std::move(launch);
    queues_[stream].push_back(std::move(item));
  }
  void record(int stream, Event& event) {
    queues_[stream].push_back({{}, &event, nullptr, ++event.recorded});
  }
  void wait(int stream, const Event& event) {
    queues_[stream].push_back({{}, nullptr, &event, event.recorded});
  }

  std::string run(int stream) {
    draw_policy();
    while (error_.empty() && has_work(stream)) {
      const bool any = start_kernels(false);
      Cta* cta = choose();
      if (cta != nullptr) {
        run_cta(*cta);
      } else if (!any && !start_kernels(true) && !deliver_late() &&
                 !network_.deliver_late(random_) && !wake_changed()) {
        idle();
      }
      if (random_.one_in(4)) deliver_some(random_.below(kMaxGpus));
      if (random_.one_in(8)) network_.deliver_some(random_);
      if (!active_ctas_.empty() && random_.one_in(patience_)) {
        look_at_clock(*active_ctas_[random_.below(static_cast<uint32_t>(active_ctas_.size()))]);
      }
    }
    if (stream < 0) network_.deliver_all();
    return error_;
  }

  Network& network() { return network_; }

  void close() {
    error_ = "emulator: closed";
    for (const auto& [stacks, bytes] : all_stacks_) munmap(stacks, bytes);
    all_stacks_.clear();
  }

  uint64_t steps() const { return steps_; }

  // --- Called on a fiber -------------------------------------------------------------------------

  bool barrier(SourceLine where, bool value) {
    Thread& thread = *current_;
    thread.address = nullptr;
    Cta& cta = *thread.cta;
    cta.any_arriving |= value;
    if (++cta.at_barrier < cta.threads.size()) {
      block(State::kBarrier, where);
    } else {
      cta.at_barrier = 0;
      cta.any = cta.any_arriving;
      cta.any_arriving = false;
      for (Thread& other : cta.threads) {
        if (&other != &thread) ready(other);
      }
    }
    return cta.any;
  }

  const uint64_t* gather(Together what, uint64_t value, uint32_t mask, SourceLine where) {
    Thread& thread = *current_;
    thread.address = nullptr;
    Warp& warp = thread.cta->warps[static_cast<size_t>(thread.number / kLanes)];
    const int lane = thread.number % kLanes;
    if ((mask & warp.all) != warp.all) give_up("names some lanes of the warp only", where);
    if (warp.arrived != 0 && warp.what != what) {
      give_up("meets lanes of its warp in another operation", where);
    }
    warp.what = what;
    warp.arriving[lane] = value;
    warp.arrived |= 1u << lane;
    if (warp.arrived != warp.all) {
      block(State::kWarp, where);
    } else {
      warp.arrived = 0;
      memcpy(warp.gathered, warp.arriving, sizeof(warp.gathered));
      const auto first = static_cast<size_t>(thread.number - lane);
      for (int other = 0; other < kLanes; ++other) {
        if (other != lane && (warp.all >> other & 1) != 0) {
          ready(thread.cta->threads[first + static_cast<size_t>(other)]);
        }
      }
    }
    return warp.gathered;
  }

  void* shared_memory() const { return current_->cta->dynamic; }

  void preempt() {
    current_->address = nullptr;
    maybe_yield();
  }

  void before_load(const void* address, size_t bytes, SourceLine where) {
    Thread& thread = *current_;
    if (thread.free_polls > 0) {
      --thread.free_polls;
      return;
    }
    maybe_yield();
    if (thread.address == address && thread.value == load(address, bytes)) {
      Thread*& bucket = bucket_of(address);
      thread.next = bucket;
      bucket = &thread;
      block(State::kPolls, where);
    }
    thread.address = address;
    thread.bytes = bytes;
    thread.value = load(address, bytes);
  }

  void send_word(uint64_t* address, uint64_t value) {
    preempt();
    in_flight_[gpu()].push_back({address, value, nullptr});
  }

  void send_line(void* address, const uint64_t (&words)[kLineWords]) {
    preempt();
    auto line = std::make_shared<LineInFlight>();
    memcpy(line->words, words, sizeof(words));
    in_flight_[gpu()].push_back({static_cast<uint64_t*>(address), 0, std::move(line)});
  }

  void fence() {
    preempt();
    deliver_all(gpu());
  }

  void network_put(void* symmetric, const void* from, size_t bytes, int gpu) {
    preempt();
    require_heap(network_.put(sender(), symmetric, from, bytes, gpu, random_));
  }

  void network_signal(int kind, uint64_t* symmetric, uint64_t value, int gpu) {
    preempt();
    require_heap(network_.signal(sender(), kind, symmetric, value, gpu));
  }

  void* linked(const void* symmetric, int to) const {
    return network_.linked(symmetric, static_cast<int>(gpu()), to);
  }

  void network_fence() {
    preempt();
    if (!network_.faults().ignores_fences) ++warp_of(*current_).network_fences;
  }

  // Copies at once, or when the thread waits for it. These are the earliest and the latest time.
  void start_copy(void* to, const void* from, size_t bytes) {
    if (random_.one_in(2)) {
      memcpy(to, from, bytes);
    } else {
      memset(to, 0xff, bytes);
      current_->copies.push_back({to, from, bytes, current_->group});
    }
  }

  void commit_copies() { ++current_->group; }

  void wait_for_copies(uint64_t groups) {
    std::deque<Copy>& copies = current_->copies;
    for (; !copies.empty() && copies.front().group + groups < current_->group; copies.pop_front()) {
      memcpy(copies.front().to, copies.front().from, copies.front().bytes);
    }
  }

  // It is read at once, or when the thread waits for that. If it has been read by then, it arrives
  // at once, or when the thread waits for that.
  void start_bulk_store(void* to, const void* from, size_t bytes) {
    constexpr uint64_t kUnit = 16;
    const uint64_t bits = reinterpret_cast<uint64_t>(to) | reinterpret_cast<uint64_t>(from) | bytes;
    if (bytes == 0 || bits % kUnit != 0) error_ = "emulator: a bulk store is empty or not aligned";
    current_->bulk_stores.push_back({to, from, bytes, {}});
    if (random_.one_in(2)) wait_for_bulk_reads();
  }

  void wait_for_bulk_reads() {
    for (BulkStore& store : current_->bulk_stores) store.read();
    if (random_.one_in(2)) wait_for_bulk_stores();
  }

  void wait_for_bulk_stores() {
    for (BulkStore& store : current_->bulk_stores) {
      store.read();
      memcpy(store.to, store.values.data(), store.bytes);
    }
    current_->bulk_stores.clear();
  }

  void stored(const void* address) {
    // Wakes the threads that poll it.
    for (Thread** link = &bucket_of(address); *link != nullptr;) {
      Thread& thread = **link;
      if (thread.address == address && load(address, thread.bytes) != thread.value) {
        *link = thread.next;
        leap_ = kMillisecond;
        ready(thread);
      } else {
        link = &thread.next;
      }
    }
  }

  uint64_t nanoseconds() {
    current_->address = nullptr;
    current_->free_polls = 0;
    if (!real_time_) return now_;
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(time.tv_nsec);
  }

 private:
  // How the next CTA is chosen. Most mistakes show when a CTA sleeps for long while its peers run
  // far ahead. A fair choice hardly ever does that.
  enum class Policy { kFair, kCtaPriority, kGpuPriority };

  Warp& warp_of(const Thread& thread) const {
    return thread.cta->warps[static_cast<size_t>(thread.number / kLanes)];
  }

  Sender sender() const {
    const Thread& thread = *current_;
    const auto warp = thread.cta->serial * 64 + static_cast<uint64_t>(thread.number / kLanes);
    return {thread.cta->kernel->launch.gpu, warp, warp_of(thread).network_fences};
  }

  void require_heap(bool is_in_heap) {
    if (!is_in_heap) error_ = "emulator: something is put outside the symmetric heap";
  }

  static uint64_t load(const void* address, size_t bytes) {
    return bytes == sizeof(uint64_t)
               ? __atomic_load_n(static_cast<const uint64_t*>(address), __ATOMIC_ACQUIRE)
               : __atomic_load_n(static_cast<const uint32_t*>(address), __ATOMIC_ACQUIRE);
  }

  Thread*& bucket_of(const void* address) {
    const uint64_t bits = reinterpret_cast<uint64_t>(address) >> 2;
    return sleeping_[(bits ^ bits >> 12) % std::size(sleeping_)];
  }

  size_t gpu() const { return static_cast<size_t>(current_->cta->kernel->launch.gpu); }

  void draw_policy() {
    policy_ = static_cast<Policy>(random_.below(3));
    yield_interval_ = 1u << random_.below(14);
    until_yield_ = 1 + random_.below(2 * yield_interval_);
    for (uint32_t& priority : gpu_priority_) priority = random_.next();
    network_.draw_slow_gpus(random_);
    for (auto& [stream, kernel] : running_) {
      for (auto& cta : kernel->ctas) cta->priority = random_.next();
    }
  }

  bool has_work(int stream) const {
    const auto busy = [&](int which) {
      const auto queue = queues_.find(which);
      return running_.count(which) != 0 || (queue != queues_.end() && !queue->second.empty());
    };
    if (stream >= 0) return busy(stream);
    return !running_.empty() || std::any_of(queues_.begin(), queues_.end(),
                                            [](const auto& q) { return !q.second.empty(); });
  }

  // Does what the streams come to: `all` of it, or a random choice, so that a GPU may be late.
  // Returns whether there was anything.
  bool start_kernels(bool all) {
    bool any = false;
    for (auto& [stream, queue] : queues_) {
      if (queue.empty() || running_.count(stream) != 0) continue;
      if (!all && random_.one_in(2)) continue;
      any |= take_item(stream, queue);
    }
    return start_ctas(all) || any;
  }

  // False: the stream waits.
  bool take_item(int stream, std::deque<Item>& queue) {
    Item& item = queue.front();
    if (item.awaited != nullptr && item.awaited->happened < item.record) return false;
    if (item.recorded != nullptr) happens(*item.recorded, item.record);
    if (item.recorded == nullptr && item.awaited == nullptr) {
      auto kernel = std::make_unique<RunningKernel>();
      kernel->launch = std::move(item.launch);
      kernel->live = kernel->launch.ctas;
      kernel->begun_record = item.record;
      kernel->records_begun_late = late_events_ && random_.one_in(4);
      running_[stream] = std::move(kernel);
    }
    queue.pop_front();
    return true;
  }

  static void happens(Event& event, uint64_t record) {
    event.happened = std::max(event.happened, record);
  }

  // Starts CTAs for which there are multiprocessors, those with priority first.
  bool start_ctas(bool all) {
    bool any = false;
    for (const bool has_priority : {true, false}) {
      for (auto& [stream, kernel] : running_) {
        if (kernel->launch.has_priority != has_priority) continue;
        while (kernel->ctas.size() < kernel->launch.ctas && start_cta(*kernel)) any = true;
        if (!all && random_.one_in(2)) break;
      }
    }
    return any;
  }

  // False: no multiprocessor is free.
  bool start_cta(RunningKernel& kernel) {
    const Launch& it = kernel.launch;
    unsigned& free = free_multiprocessors_[it.gpu];
    if (it.takes_multiprocessors && free == 0) return false;
    if (it.takes_multiprocessors) --free;
    auto cta = std::make_unique<Cta>();
    cta->kernel = &kernel;
    cta->number = static_cast<unsigned>(kernel.ctas.size());
    cta->serial = ++ctas_so_far_;
    cta->live = it.threads;
    cta->priority = random_.next();
    cta->stacks = new_stacks(it.threads);
    const size_t shared_bytes = it.shared_bytes + kGuardBytes;
    cta->dynamic_memory = std::make_unique<std::byte[]>(shared_bytes + 16);
    cta->dynamic =
        cta->dynamic_memory.get() + 16 - reinterpret_cast<uint64_t>(cta->dynamic_memory.get()) % 16;
    std::fill_n(cta->dynamic, shared_bytes, kGarbage);
    cta->statically = std::make_unique<std::byte[]>(section_bytes());
    std::fill_n(cta->statically.get(), section_bytes(), kGarbage);
    cta->threads.resize(it.threads);
    cta->warps.resize((it.threads + kLanes - 1) / kLanes);
    for (unsigned i = 0; i < it.threads; ++i) {
      Thread& thread = cta->threads[i];
      thread.cta = cta.get();
      thread.number = static_cast<int>(i);
      make_context(thread.context, stack_of(thread), stack_bytes(thread), &run_thread);
      cta->warps[i / kLanes].all |= 1u << i % kLanes;
      ready(thread);
    }
    active_ctas_.push_back(cta.get());
    kernel.ctas.push_back(std::move(cta));
    const bool all_have_begun = kernel.ctas.size() == it.ctas;
    if (all_have_begun && it.begun != nullptr && !kernel.records_begun_late) {
      happens(*it.begun, kernel.begun_record);
    }
    return true;
  }

  void end_cta(Cta& cta) {
    const std::byte* guard = cta.dynamic + cta.kernel->launch.shared_bytes;
    if (std::any_of(guard, guard + kGuardBytes, [](std::byte b) { return b != kGarbage; })) {
      error_ = "emulator: a CTA wrote behind its shared memory";
    }
    free_stacks_[cta.threads.size()].push_back(cta.stacks);
    cta.stacks = nullptr;
    if (loaded_ == &cta) loaded_ = nullptr;
    active_ctas_.erase(std::find(active_ctas_.begin(), active_ctas_.end(), &cta));
    RunningKernel& kernel = *cta.kernel;
    if (kernel.launch.takes_multiprocessors) ++free_multiprocessors_[kernel.launch.gpu];
    if (--kernel.live > 0) return;
    if (kernel.launch.begun != nullptr) happens(*kernel.launch.begun, kernel.begun_record);
    deliver_all(static_cast<size_t>(kernel.launch.gpu));
    for (auto it = running_.begin(); it != running_.end(); ++it) {
      if (it->second.get() != &kernel) continue;
      running_.erase(it);
      break;
    }
  }

  std::byte* new_stacks(unsigned threads) {
    auto& free = free_stacks_[threads];
    if (!free.empty()) {
      std::byte* stacks = free.back();
      free.pop_back();
      return stacks;
    }
    void* memory = mmap(nullptr, threads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    // Each thread touches a page or two.
    madvise(memory, threads * kStackBytes, MADV_NOHUGEPAGE);
    all_stacks_.emplace_back(memory, threads * kStackBytes);
    return static_cast<std::byte*>(memory);
  }

  static std::byte* stack_of(const Thread& thread) {
    return thread.cta->stacks + static_cast<size_t>(thread.number) * kStackBytes;
  }
  // Stacks begin at different offsets. Otherwise the hot lines of all would share a few cache sets.
  static size_t stack_bytes(const Thread& thread) {
    return kStackBytes - static_cast<size_t>(thread.number) % 61 * 128;
  }

  static std::byte* section() { return emulator_shared_begin + sizeof(emulator_shared_begin); }
  static size_t section_bytes() { return static_cast<size_t>(emulator_shared_end - section()); }

  static void ready(Thread& thread) {
    thread.state = State::kReady;
    Cta& cta = *thread.cta;
    const int warp = thread.number / kLanes;
    cta.warps[static_cast<size_t>(warp)].ready |= 1u << thread.number % kLanes;
    cta.ready_warps |= 1u << warp;
  }

  uint32_t priority_of(const Cta& cta) const {
    constexpr uint32_t kHigh = 0xffff0000u;
    const uint32_t of_gpu = gpu_priority_[cta.kernel->launch.gpu];
    return policy_ == Policy::kGpuPriority ? (of_gpu & kHigh) | cta.priority >> 16 : cta.priority;
  }

  // A CTA with threads that are ready; null: there is none.
  Cta* choose() {
    if (active_ctas_.empty()) return nullptr;
    const size_t first = random_.below(static_cast<uint32_t>(active_ctas_.size()));
    if (random_.one_in(64)) active_ctas_[first]->priority = random_.next();
    if (random_.one_in(512)) draw_policy();
    Cta* best = nullptr;
    for (size_t i = 0; i < active_ctas_.size(); ++i) {
      Cta* cta = active_ctas_[(first + i) % active_ctas_.size()];
      if (cta->ready_warps == 0) continue;
      if (policy_ == Policy::kFair) return cta;
      if (best == nullptr || priority_of(*cta) > priority_of(*best)) best = cta;
    }
    return best;
  }

  void load_cta(Cta& cta) {
    if (loaded_ == &cta) return;
    if (loaded_ != nullptr) {
      memcpy(loaded_->statically.get(), section(), section_bytes());
    }
    memcpy(section(), cta.statically.get(), section_bytes());
    loaded_ = &cta;
    block_index.x = cta.number;
    block_size.x = cta.kernel->launch.threads;
    grid_size.x = cta.kernel->launch.ctas;
  }

  void run_cta(Cta& cta) {
    load_cta(cta);
    for (int warp = -1; cta.ready_warps != 0;) {
      if (warp < 0 || (cta.ready_warps >> warp & 1) == 0 || random_.one_in(64)) {
        warp = random_.bit_of(cta.ready_warps);
      }
      Warp& it = cta.warps[static_cast<size_t>(warp)];
      const int lane = random_.bit_of(it.ready);
      it.ready &= ~(1u << lane);
      if (it.ready == 0) cta.ready_warps &= ~(1u << warp);
      resume(cta.threads[static_cast<size_t>(warp * kLanes + lane)]);
      if (!error_.empty()) return;
      if (cta.live == 0) return end_cta(cta);
      if (yielded_ && random_.one_in(2)) return;
    }
  }

  void resume(Thread& thread) {
    current_ = &thread;
    thread_index.x = static_cast<unsigned>(thread.number);
    yielded_ = false;
    ++steps_;
    now_ += 20;
    switch_context(scheduler_, thread.context);
    if (thread.state != State::kDone && overflows(thread.context, stack_of(thread))) {
      error_ = "emulator: a thread's stack is too small";
    }
  }

  static void run_thread();

  void leave() { switch_context(current_->context, scheduler_); }

  void block(State state, SourceLine where) {
    current_->state = state;
    current_->where = where;
    leave();
  }

  void maybe_yield() {
    if (--until_yield_ != 0) return;
    until_yield_ = 1 + random_.below(2 * yield_interval_);
    ready(*current_);
    yielded_ = true;
    leave();
  }

  [[noreturn]] void give_up(const char* what, SourceLine where) {
    std::ostringstream text;
    text << "emulator: " << name_of(*current_) << " at " << name_of(where) << " " << what;
    error_ = text.str();
    leave();
    abort();
  }

  void deliver(size_t gpu, size_t index) {
    auto& words = in_flight_[gpu];
    const WordInFlight word = words[index];
    // Words for one address stay in order.
    for (size_t i = 0; i < index; ++i) {
      if (words[i].address == word.address) return;
    }
    words.erase(words.begin() + static_cast<ptrdiff_t>(index));
    arrive(word);
  }

  void arrive(const WordInFlight& word) {
    if (word.line == nullptr) {
      __atomic_store_n(word.address, word.value, __ATOMIC_RELAXED);
      stored(word.address);
      return;
    }
    // The last word is stored last, because another process may look at it first.
    constexpr int kLast = kLineWords - 1;
    memcpy(word.address, word.line->words, kLast * sizeof(uint64_t));
    __atomic_store_n(word.address + kLast, word.line->words[kLast], __ATOMIC_RELEASE);
    stored(word.address + kLast);
  }

  void deliver_some(size_t gpu) {
    const size_t words = in_flight_[gpu].size();
    if (words == 0) return;
    // One by one would take long where there are thousands.
    for (size_t i = 0; i < 1 + words / 8; ++i) {
      deliver(gpu, random_.below(static_cast<uint32_t>(in_flight_[gpu].size())));
    }
  }

  void deliver_all(size_t gpu) {
    std::vector<WordInFlight> words;
    words.swap(in_flight_[gpu]);
    for (const WordInFlight& word : words) arrive(word);
  }

  // Called when no thread can go on. Delivers some words of one GPU, so that words that were sent
  // together still arrive at different times. False: there were none.
  bool deliver_late() {
    std::vector<size_t> gpus;
    for (size_t gpu = 0; gpu < kMaxGpus; ++gpu) {
      if (!in_flight_[gpu].empty()) gpus.push_back(gpu);
    }
    if (gpus.empty()) return false;
    deliver_some(gpus[random_.below(static_cast<uint32_t>(gpus.size()))]);
    return true;
  }

  // Wakes the sleeping threads whose values other processes or plain stores have changed.
  bool wake_changed() {
    bool any = false;
    for (Thread*& bucket : sleeping_) {
      for (Thread** link = &bucket; *link != nullptr;) {
        Thread& thread = **link;
        if (load(thread.address, thread.bytes) != thread.value) {
          *link = thread.next;
          ready(thread);
          any = true;
        } else {
          link = &thread.next;
        }
      }
    }
    return any;
  }

  // Lets the threads of the CTA that poll go on until they look at the clock. Whether there are
  // any.
  bool look_at_clock(Cta& cta) {
    constexpr int kPollsBetweenLooks = 2048;
    bool any = false;
    for (Thread& thread : cta.threads) {
      if (thread.state != State::kPolls) continue;
      Thread** link = &bucket_of(thread.address);
      while (*link != &thread) link = &(*link)->next;
      *link = thread.next;
      thread.free_polls = kPollsBetweenLooks;
      ready(thread);
      any = true;
    }
    return any;
  }

  // Called when no thread can go on. Lets time pass, and then all threads that poll look at the
  // clock.
  void idle() {
    if (real_time_) {
      const timespec pause = {0, 50'000};
      nanosleep(&pause, nullptr);
      if (++pauses_ % 64 != 0) return;
    }
    now_ += leap_;
    leap_ *= 8;
    bool any = false;
    for (Cta* cta : active_ctas_) any |= look_at_clock(*cta);
    if (!any) report_deadlock();
  }

  static std::string name_of(const Thread& thread) {
    const Launch& launch = thread.cta->kernel->launch;
    return "GPU " + std::to_string(launch.gpu) + ", CTA " + std::to_string(thread.cta->number) +
           ", thread " + std::to_string(thread.number);
  }
  static std::string name_of(const SourceLine& where) {
    const char* slash = strrchr(where.file, '/');
    return std::string(slash == nullptr ? where.file : slash + 1) + ":" +
           std::to_string(where.line);
  }

  void report_deadlock() {
    std::map<std::string, std::pair<int, const Thread*>> waits;
    for (const Cta* cta : active_ctas_) {
      for (const Thread& thread : cta->threads) {
        if (thread.state == State::kDone) continue;
        const char* what = thread.state == State::kBarrier ? "the CTA's barrier" : "its warp";
        auto& [count, example] = waits[std::string(what) + " at " + name_of(thread.where)];
        ++count;
        example = &thread;
      }
    }
    std::ostringstream text;
    text << "emulator: deadlock.";
    for (const auto& [stream, queue] : queues_) {
      if (running_.count(stream) != 0 || queue.empty()) continue;
      text << " Stream " << stream << " waits for an event that does not happen.";
    }
    for (const auto& [where, who] : waits) {
      text << " " << who.first << " threads wait for " << where << ": " << name_of(*who.second)
           << ".";
    }
    error_ = text.str();
  }

  Random random_{0};
  Policy policy_ = Policy::kFair;
  uint32_t yield_interval_ = 64;
  uint32_t until_yield_ = 64;
  uint32_t gpu_priority_[kMaxGpus] = {};
  unsigned free_multiprocessors_[kMaxGpus] = {};
  bool real_time_ = false;
  bool late_events_ = true;
  uint32_t patience_ = 1000;
  uint64_t now_ = 1'000'000'000;
  uint64_t leap_ = kMillisecond;
  uint64_t pauses_ = 0;
  uint64_t steps_ = 0;
  uint64_t ctas_so_far_ = 0;
  std::string error_;
  Network network_{[this](const void* address) { stored(address); }};

  std::map<int, std::deque<Item>> queues_;  // by stream
  std::map<int, std::unique_ptr<RunningKernel>> running_;
  std::vector<Cta*> active_ctas_;
  Cta* loaded_ = nullptr;  // whose static shared memory is in the section
  Thread* current_ = nullptr;
  bool yielded_ = false;
  Context scheduler_;
  Thread* sleeping_[1 << 12] = {};
  std::vector<WordInFlight> in_flight_[kMaxGpus];
  std::vector<std::pair<void*, size_t>> all_stacks_;
  std::unordered_map<size_t, std::vector<std::byte*>> free_stacks_;  // by threads of a CTA
};

// Never destroyed, because some fibers may not have ended.
Machine& machine() {
  static Machine* const instance = std::make_unique<Machine>().release();
  return *instance;
}

void Machine::run_thread() {
  Thread& thread = *machine().current_;
  thread.cta->kernel->launch.call();
  if (!thread.bulk_stores.empty()) machine().error_ = "emulator: a thread left its bulk stores";
  thread.state = State::kDone;
  --thread.cta->live;
  machine().leave();
  abort();
}

}  // namespace

void set_seed(uint64_t seed) { machine().seed(seed); }
void set_real_time(bool real) { machine().set_real_time(real); }
void set_patience(uint32_t turns) { machine().set_patience(turns); }
void set_multiprocessors(unsigned count) { machine().set_multiprocessors(count); }
void set_late_events(bool late) { machine().set_late_events(late); }
void enqueue(int stream, Launch launch) { machine().enqueue(stream, std::move(launch)); }
void record(int stream, Event& event) { machine().record(stream, event); }
void wait(int stream, const Event& event) { machine().wait(stream, event); }
std::string run(int stream) { return machine().run(stream); }
void set_heap(int gpu, void* base, size_t bytes) { machine().network().set_heap(gpu, base, bytes); }
void set_linked(bool are_linked) { machine().network().set_linked(are_linked); }
void set_network_faults(const NetworkFaults& faults) { machine().network().set_faults(faults); }
uint64_t network_bytes() { return machine().network().bytes(); }
void close() { machine().close(); }
uint64_t steps() { return machine().steps(); }
bool barrier(SourceLine where, bool value) { return machine().barrier(where, value); }
const uint64_t* gather(Together what, uint64_t value, uint32_t mask, SourceLine where) {
  return machine().gather(what, value, mask, where);
}
void* shared_memory() { return machine().shared_memory(); }
void preempt() { machine().preempt(); }
void before_load(const void* address, size_t bytes, SourceLine where) {
  machine().before_load(address, bytes, where);
}
void send_word(uint64_t* address, uint64_t value) { machine().send_word(address, value); }
void send_line(void* address, const uint64_t (&words)[kLineWords]) {
  machine().send_line(address, words);
}
void fence() { machine().fence(); }
void network_put(void* symmetric, const void* from, size_t bytes, int gpu) {
  machine().network_put(symmetric, from, bytes, gpu);
}
void network_signal(int kind, uint64_t* symmetric, uint64_t value, int gpu) {
  machine().network_signal(kind, symmetric, value, gpu);
}
void network_fence() { machine().network_fence(); }
void* linked(const void* symmetric, int gpu) { return machine().linked(symmetric, gpu); }
bool is_unawaited(int kind) {
  return (machine().network().faults().unawaited_kinds >> kind & 1) != 0;
}
void start_copy(void* shared, const void* global, size_t bytes) {
  machine().start_copy(shared, global, bytes);
}
void commit_copies() { machine().commit_copies(); }
void start_bulk_store(void* global, const void* shared, size_t bytes) {
  machine().start_bulk_store(global, shared, bytes);
}
void wait_for_bulk_reads() { machine().wait_for_bulk_reads(); }
void wait_for_bulk_stores() { machine().wait_for_bulk_stores(); }
void wait_for_copies(uint64_t groups) { machine().wait_for_copies(groups); }
void stored(const void* address) { machine().stored(address); }
uint64_t nanoseconds() { return machine().nanoseconds(); }

}  // namespace emulator
