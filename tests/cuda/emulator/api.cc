// The functions that tests call by ctypes. They return errors as text, which is valid until the
// next call. Null: no error.
#include <cuda_runtime_api.h>
#include <string.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "cuda/call.h"
#include "cuda/gpu.h"
#include "cuda/gpus.h"
#include "cuda/operands.h"
#include "cuda/overlap.h"
#include "cuda/plan.h"
#include "cuda/sizes.h"
#include "driver.h"
#include "hosts/call.h"
#include "hosts/plan.h"
#include "machine.h"
#include "pod/pod.h"
#include "runtime.h"

#define EMULATOR_API extern "C" __attribute__((visibility("default")))

using namespace freeio;
using namespace freeio::cuda;

// The buffers of one rank's call, by their names in operand_order.h. emulated.py has a twin.
struct NamedBuffers {
  int32_t count;
  const char* const* names;
  void* const* addresses;
};

// One rank's call, except for its types and buffers. emulated.py has a twin.
struct Site {
  int64_t num_ranks, num_tokens, top_k, num_experts, capacity, alignment, zero_tail;
  const int32_t* gpus;  // by rank: their numbers
  uint32_t mesh_device;
  uint32_t instance;
  int32_t rank;
  // Of a call that only starts its exchange: not 0. `program`, `number` and `run` are its name.
  int32_t is_start;
  int64_t program, number, run;
  int64_t num_sms;         // LaneShare's
  int64_t starts_num_sms;  // LaneShare's
};

namespace {

constexpr int kGarbage = 0xa5;

const char* text(std::string message) {
  static std::string last;
  last = std::move(message);
  return last.empty() ? nullptr : last.c_str();
}

const char* text(const Status& status) {
  constexpr const char* kNames[] = {"OK", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "UNAVAILABLE",
                                    "INTERNAL"};
  if (status.ok()) return nullptr;
  return text(std::string(kNames[static_cast<int>(status.code)]) + ": " + status.message);
}

// In a pod the number of a GPU may differ from its ordinal.
int ordinal_of(int gpu) {
  int count = 0;
  cudaGetDeviceCount(&count);
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    if (gpu_number(ordinal) == gpu) return ordinal;
  }
  return -1;
}

std::vector<int64_t> numbers_of(const DispatchTypes& types) {
  std::vector<int64_t> numbers = {types.routed};
  for (int i = 0; i < types.num_leaves; ++i) {
    numbers.push_back(types.leaves[i].row_bytes);
    numbers.push_back(static_cast<int64_t>(types.leaves[i].row_type));
  }
  return numbers;
}
std::vector<int64_t> numbers_of(const CombineTypes& types) {
  return {types.weighted, static_cast<int64_t>(types.dtype), types.width};
}
std::vector<int64_t> numbers_of(const CombineTransposeTypes& types) {
  return {types.rows, types.weights, static_cast<int64_t>(types.dtype), types.width};
}

Layout layout_of(const Site& site) {
  return {site.num_ranks, site.num_tokens, site.top_k,    site.num_experts,
          site.capacity,  site.alignment,  site.zero_tail};
}

// A visitor of operand_order.h that takes each buffer's address by name.
struct ByName {
  const std::map<std::string, void*>& addresses;
  int32_t num_leaves = 0;
  CallBuffers buffers = {};  // in XLA's order

  template <typename T>
  void argument(const std::string& name, T*& field) {
    field = static_cast<T*>(addresses.at(name));
    buffers.arguments.push_back(field);
  }
  template <typename T>
  void result(const std::string& name, T*& field) {
    field = static_cast<T*>(addresses.at(name));
    buffers.results.push_back(field);
  }
  void rows(const std::string& name, const void*& field) { argument(name, field); }
  void leaves(LeafBuffers (&leaves)[kMaxLeaves]) {
    for (int i = 0; i < num_leaves; ++i) {
      const std::string number = "[" + std::to_string(i) + "]";
      argument("tokens" + number, leaves[i].tokens);
      result("rows" + number, leaves[i].rows);
    }
  }
};

StartName name_of(const Site& site) {
  return {static_cast<uint64_t>(site.program), site.number, site.run};
}

// The buffers of each start, which XLA gives the call that waits for it, too.
std::map<std::tuple<int, int64_t, int64_t, int64_t>, CallBuffers> buffers_of_starts;

int32_t num_leaves_of(const DispatchTypes& types) { return types.num_leaves; }
template <typename Types>
int32_t num_leaves_of(const Types&) {
  return 0;
}

// Fills the operands, and returns the buffers in XLA's order.
template <typename Operands>
CallBuffers read_buffers(const typename Operands::Types& types, const NamedBuffers& buffers,
                         Operands& operands) {
  std::map<std::string, void*> addresses;
  for (int i = 0; i < buffers.count; ++i) addresses[buffers.names[i]] = buffers.addresses[i];
  operands.device = static_cast<const uint32_t*>(addresses.at("device"));
  ByName by_name{addresses, num_leaves_of(types)};
  by_name.buffers.arguments.push_back(operands.device);
  visit_buffers(types, operands, by_name);
  return by_name.buffers;
}

// Calls with equal keys are equal.
template <typename Types>
std::vector<int64_t> key_of(const Site& site, const Types& types) {
  std::vector<int64_t> key = numbers_of(types);
  key.insert(key.end(), {site.num_ranks, site.num_tokens, site.top_k, site.num_experts,
                         site.capacity, site.alignment, site.zero_tail, site.rank, site.mesh_device,
                         site.instance, site.is_start, site.num_sms, site.starts_num_sms});
  key.insert(key.end(), site.gpus, site.gpus + site.num_ranks);
  return key;
}

// The symmetric memory of the GPUs: one for each way to share them out among hosts.
std::map<std::vector<int64_t>, Landings> all_landings;
const Landings* landings = nullptr;  // in use

// As run_call(), for a group that spans hosts.
template <typename Operands>
const char* run_between_hosts(Operation operation, const Site& site,
                              const typename Operands::Types& types, const NamedBuffers& buffers) {
  Operands operands = {};
  read_buffers(types, buffers, operands);
  static std::map<std::vector<int64_t>, HostsCall<Operands>> calls;
  const int gpu = site.gpus[site.rank];
  HostsMember member{{site.gpus, site.gpus + site.num_ranks}, {}, site.rank, site.mesh_device};
  for (const int other : member.pes) {
    if (landings->host_of_pe[other] == landings->host_of_pe[gpu]) member.gpus.push_back(other);
  }
  std::vector<int64_t> key = key_of(site, types);
  key.push_back(reinterpret_cast<int64_t>(landings));
  auto [found, is_new] =
      calls.try_emplace(std::move(key), CallSite{operation, layout_of(site), {}, site.instance, {}},
                        std::move(member), *landings, types);
  cudaSetDevice(ordinal_of(gpu));
  return text(found->second.run(operands, nullptr));
}

// Runs the call on the rank's GPU, and keeps its Call, as XLA keeps a custom call. So a later run
// of an equal call is not its first run.
template <typename Operands>
const char* run_call(Operation operation, const Site& site, const typename Operands::Types& types,
                     const NamedBuffers& buffers) {
  if (landings != nullptr) return run_between_hosts<Operands>(operation, site, types, buffers);
  Operands operands = {};
  const CallBuffers in_order = read_buffers(types, buffers, operands);
  static std::map<std::vector<int64_t>, Call<Operands>> calls;
  const Layout layout = layout_of(site);
  GroupMember member{{site.gpus, site.gpus + site.num_ranks}, site.rank, site.mesh_device};
  std::vector<int64_t> key = key_of(site, types);
  auto [found, is_new] =
      calls.try_emplace(std::move(key),
                        CallSite{operation, layout, std::move(member), site.instance,
                                 LaneShare{site.is_start != 0 ? kOverlap : kSynchronous,
                                           site.num_sms, site.starts_num_sms}},
                        types);
  const int gpu = site.gpus[site.rank];
  cudaSetDevice(ordinal_of(gpu));
  if (site.is_start == 0) return text(found->second.run(operands, nullptr));
  buffers_of_starts[{gpu, site.program, site.number, site.run}] = in_order;
  return text(found->second.start(operands, name_of(site), in_order, nullptr));
}

}  // namespace

EMULATOR_API void emulator_set_devices(int count, int multiprocessors) {
  emulator::set_devices(count, multiprocessors);
}
EMULATOR_API void emulator_set_shared_bytes(int64_t bytes) {
  emulator::set_shared_bytes(static_cast<size_t>(bytes));
}
EMULATOR_API int64_t emulator_shared_bytes_of_last_launch() {
  return static_cast<int64_t>(emulator::shared_bytes_of_last_launch());
}
EMULATOR_API void emulator_set_seed(uint64_t seed) { emulator::set_seed(seed); }
EMULATOR_API void emulator_set_real_time(int real) { emulator::set_real_time(real != 0); }
// Launches a kernel on XLA's stream that waits for nobody, with CTAs that run for `turns` turns.
EMULATOR_API void emulator_compute(int ordinal, uint32_t ctas, int64_t turns) {
  emulator::Launch compute;
  compute.gpu = ordinal;
  compute.ctas = ctas;
  compute.call = [=] {
    for (int64_t i = 0; i < turns; ++i) emulator::preempt();
  };
  emulator::enqueue(ordinal, std::move(compute));
}
// A copy on XLA's stream of the GPU, as something that takes no multiprocessor.
static void copy_on_stream(int ordinal, std::function<void()> copy) {
  emulator::Launch launch;
  launch.gpu = ordinal;
  launch.takes_multiprocessors = false;
  launch.call = std::move(copy);
  emulator::enqueue(ordinal, std::move(launch));
}
// Fills the buffer when XLA's stream comes here, as if a program had just computed it.
EMULATOR_API void emulator_fill(int ordinal, void* buffer, size_t bytes, const void* contents) {
  copy_on_stream(ordinal, [=] { memcpy(buffer, contents, bytes); });
}
// Copies the buffer when XLA's stream comes here. `dead`: then also fills it with garbage.
EMULATOR_API void emulator_retire(int ordinal, void* buffer, size_t bytes, void* copy, int dead) {
  copy_on_stream(ordinal, [=] {
    memcpy(copy, buffer, bytes);
    if (dead != 0) memset(buffer, kGarbage, bytes);
  });
}
EMULATOR_API void emulator_set_late_events(int late) { emulator::set_late_events(late != 0); }
EMULATOR_API void emulator_set_patience(uint32_t turns) { emulator::set_patience(turns); }
EMULATOR_API void emulator_set_capturing(int capturing) { emulator::set_capturing(capturing != 0); }
EMULATOR_API void emulator_set_native_atomics(int native) {
  emulator::set_native_atomics(native != 0);
}
EMULATOR_API void* emulator_driver_function(const char* name) {
  return emulator::find_driver_function(name);
}
EMULATOR_API void emulator_close() { emulator::close(); }
EMULATOR_API uint64_t emulator_steps() { return emulator::steps(); }
EMULATOR_API const char* emulator_synchronize() { return text(emulator::synchronize()); }

// From now on these GPUs are on hosts of `per_host` each, with windows of so many bytes, and calls
// are those of groups that span hosts. 0: all are on one host.
EMULATOR_API void emulator_set_hosts(int num_gpus, int per_host, int64_t window_bytes,
                                     int are_linked) {
  landings = nullptr;
  emulator::set_linked(are_linked != 0);
  if (per_host == 0) return;
  Landings& made = all_landings[{num_gpus, per_host, window_bytes}];
  landings = &made;
  if (made.address.empty()) {
    made.layout = {num_gpus, (num_gpus + per_host - 1) / per_host, window_bytes};
    const auto bytes = static_cast<size_t>(made.layout.bytes());
    for (int gpu = 0; gpu < num_gpus; ++gpu) {
      made.host_of_pe.push_back(gpu / per_host);
      void* memory = nullptr;
      cudaMalloc(&memory, bytes);
      cudaMemset(memory, 0, static_cast<size_t>(made.layout.window_at(0, 0, kRequests)));
      made.address.push_back(static_cast<std::byte*>(memory));
    }
  }
  for (int gpu = 0; gpu < num_gpus; ++gpu) {
    cudaSetDevice(ordinal_of(gpu));
    int shared_bytes = 0;
    cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal_of(gpu));
    for_each_hosts_kernel([&](const Kernel& kernel, auto) { load_kernel(kernel, shared_bytes); });
    emulator::set_heap(gpu, made.address[gpu], static_cast<size_t>(made.layout.bytes()));
  }
}
// As if the process of a PE had gone, and this GPU's process knew.
EMULATOR_API void emulator_set_gone(int gpu, int pe, uint32_t why) {
  landings->layout.mail_of_pe(landings->address[gpu], pe).why_gone = why;
}
EMULATOR_API void emulator_set_network_faults(int ignores_fences, uint32_t lost_kinds,
                                              uint32_t unawaited_kinds) {
  emulator::set_network_faults({ignores_fences != 0, lost_kinds, unawaited_kinds});
}
EMULATOR_API int64_t emulator_network_bytes() {
  return static_cast<int64_t>(emulator::network_bytes());
}

EMULATOR_API void engine_set_timeout(double seconds) { set_timeout(seconds); }
EMULATOR_API void engine_set_num_sms(int64_t num_sms) { set_num_sms(num_sms); }
EMULATOR_API void engine_set_overlap_num_sms(int64_t num_sms) { set_overlap_num_sms(num_sms); }
EMULATOR_API int32_t engine_max_in_flight() { return kMaxInFlight; }
EMULATOR_API void engine_set_few_ctas(int32_t ctas) { set_few_ctas(ctas); }

EMULATOR_API void engine_set_most_sent(int64_t routes, int64_t slices) {
  set_most_sent(routes, slices);
}
// Sets the epochs of these GPUs, which are all in this process, as if each two of them had made
// `epoch` exchanges.
EMULATOR_API const char* engine_set_epochs(const int32_t* gpus, int count, uint32_t epoch) {
  Exchange exchange = {};
  Connection connection;
  const Status status = find_group({count, 1, 1, count, 1, 1}, {{gpus, gpus + count}, 0, 0}, {},
                                   exchange, connection);
  for (int rank = 0; status.ok() && rank < count; ++rank) {
    for (int lane = 0; lane < kLanes; ++lane) {
      GpuBlock* const block = block_of_lane(exchange.gpu_block[rank], lane, exchange.block_bytes);
      for (int peer = 0; peer < count; ++peer) block->epoch[gpus[peer]] = epoch;
    }
  }
  return text(status);
}
EMULATOR_API int32_t engine_quotient(int32_t n, int32_t d) { return Divisor(d).quotient(n); }
EMULATOR_API int32_t engine_remainder(int32_t n, int32_t d) { return Divisor(d).remainder(n); }
EMULATOR_API const char* engine_start(const int32_t* ordinals, int count) {
  return text(start(std::vector<int>(ordinals, ordinals + count)));
}

// A process of a pod, its peers, and the GPUs of all. emulated.py has a twin.
struct Place {
  int32_t process, num_peers;
  const int32_t *peers, *pids, *sockets;
  int32_t num_gpus;
  const int32_t *gpus, *owners, *ordinals;
};

EMULATOR_API const char* engine_join(const Place* place) {
  std::vector<pod::Pod::Member> members;
  for (int i = 0; i < place->num_peers; ++i) {
    members.push_back({{place->peers[i], place->pids[i], ""}, pod::UniqueFd(place->sockets[i])});
  }
  std::vector<PodGpu> gpus;
  for (int i = 0; i < place->num_gpus; ++i) {
    gpus.push_back({place->gpus[i], place->owners[i], place->ordinals[i]});
  }
  pod::Pod& pod = pod::Pod::start(std::make_unique<pod::Pod>(place->process, std::move(members)));
  return text(join(pod, place->process, gpus));
}
EMULATOR_API const char* engine_leave() {
  const char* error = text(leave());
  pod::Pod::current()->leave();
  return error;
}
// What freeio_check finds before each run of a program that exchanges rows among these GPUs.
EMULATOR_API const char* engine_state_of(const int64_t* gpus, int count) {
  return text(state_of(std::vector<int64_t>(gpus, gpus + count)));
}
#ifdef FREEIO_STAMPS
// Fills `timelines`, which has room for one of each multiprocessor, and `count`.
EMULATOR_API const char* engine_take_timelines(int gpu, Timeline* timelines, int32_t* count) {
  std::vector<Timeline> taken;
  const Status status = take_timelines(ordinal_of(gpu), taken);
  std::copy(taken.begin(), taken.end(), timelines);
  *count = static_cast<int32_t>(taken.size());
  return text(status);
}
EMULATOR_API const char* engine_phase_name(int number) {
  return number < kPhases ? kPhaseNames[number] : nullptr;
}
#endif
EMULATOR_API const char* engine_take_failure() { return text(take_failure()); }
EMULATOR_API const char* engine_take_note() { return text(take_note()); }
EMULATOR_API int64_t engine_mapped_bytes() { return memory_use().mapped_bytes; }

// The name of the dtype with this number; null: there is none.
EMULATOR_API const char* engine_dtype_name(int number) {
  return static_cast<size_t>(number) < std::size(kDTypeNames) ? kDTypeNames[number] : nullptr;
}

// Elements of the scratch buffers, in their order.
EMULATOR_API void engine_scratch(const Site* site, int64_t width, int64_t (&elements)[3]) {
  const Layout layout = layout_of(*site);
  const CombineScratch of_combine = combine_scratch(layout, width);
  elements[0] = dispatch_scratch(layout);
  elements[1] = of_combine.partial_sums * width;
  elements[2] = of_combine.flags;
}

// The sizes of structs, for a test that compares them with their twins in emulated.py.
EMULATOR_API int64_t engine_bytes_of(const char* name) {
  static const std::map<std::string, size_t> bytes = {
      {"Site", sizeof(Site)},
      {"Place", sizeof(Place)},
      {"NamedBuffers", sizeof(NamedBuffers)},
      {"DispatchTypes", sizeof(DispatchTypes)},
      {"CombineTypes", sizeof(CombineTypes)},
      {"CombineTransposeTypes", sizeof(CombineTransposeTypes)},
  };
  return static_cast<int64_t>(bytes.at(name));
}

EMULATOR_API const char* engine_dispatch(const Site* site, const DispatchTypes* types,
                                         const NamedBuffers* buffers) {
  return run_call<DispatchOperands>(
      types->routed ? Operation::kDispatch : Operation::kDispatchAlong, *site, *types, *buffers);
}
// The custom call that waits for a start, which has the same site. `scratch`: how many of the
// start's results it does not return. `copied`: XLA has copied the first result before.
EMULATOR_API const char* engine_done(const Site* site, int scratch, int copied) {
  static std::map<std::tuple<int, int64_t, int64_t>, WaitingCall> calls;
  const int gpu = site->gpus[site->rank];
  const CallBuffers& start = buffers_of_starts[{gpu, site->program, site->number, site->run}];
  CallBuffers buffers = start;
  buffers.arguments.insert(buffers.arguments.end(), start.results.begin(), start.results.end());
  buffers.results.resize(start.results.size() - static_cast<size_t>(scratch));
  if (copied != 0) buffers.results[0] = &buffers;
  const int ordinal = ordinal_of(gpu);
  cudaSetDevice(ordinal);
  return text(
      calls[{gpu, site->program, site->number}].run(ordinal, name_of(*site), buffers, nullptr));
}
// Whether a program that has these custom calls, in this order ('s' or 'd'), has both of a pair:
// for each start in order '1' or '0'.
EMULATOR_API const char* engine_pairs(int64_t program, const char* calls) {
  std::vector<std::shared_ptr<StartPair>> starts, waits;
  for (const char* call = calls; *call != 0; ++call) {
    if (*call == 's') starts.push_back(pair_start(static_cast<uint64_t>(program), 1));
    if (*call == 'd') waits.push_back(pair_wait(static_cast<uint64_t>(program), 1));
  }
  std::string found;
  for (const auto& start : starts) found += start->has_wait ? '1' : '0';
  return text(found);
}

EMULATOR_API const char* engine_combine(const Site* site, const CombineTypes* types,
                                        const NamedBuffers* buffers) {
  return run_call<CombineOperands>(Operation::kCombine, *site, *types, *buffers);
}
EMULATOR_API const char* engine_combine_transpose(const Site* site,
                                                  const CombineTransposeTypes* types,
                                                  const NamedBuffers* buffers) {
  return run_call<CombineTransposeOperands>(Operation::kCombineTranspose, *site, *types, *buffers);
}
