// What the tests call, by ctypes. Errors are returned as text, none as null; a text is good until
// the next call.
#include <cuda_runtime_api.h>
#include <string.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "cuda/gpus.h"
#include "cuda/plan.h"
#include "driver.h"
#include "host/pod.h"
#include "machine.h"
#include "runtime.h"

#define EMULATOR_API extern "C" __attribute__((visibility("default")))

using namespace freeio;
using namespace freeio::cuda;

// One rank's call. As in emulated.py.
struct Call {
  int64_t num_ranks, num_tokens, top_k, num_experts, capacity, alignment;
  const int32_t* gpus;  // by rank: their numbers
  const uint32_t* device;
  uint32_t mesh_device;
  uint32_t instance;
  int32_t rank;
  int32_t dtype;  // of the rows that are summed
  int64_t width;
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

// In one process a GPU's number is its ordinal; in several it is not.
int ordinal_of(int gpu) {
  int count = 0;
  cudaGetDeviceCount(&count);
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    if (gpu_number(ordinal) == gpu) return ordinal;
  }
  return -1;
}

// Describes the exchange, lets `complete` fill the rest, and launches on the rank's GPU.
template <typename Params, typename Complete>
const char* launch_call(const Call& call, Params& params, const Complete& complete) {
  const Layout layout{call.num_ranks,   call.num_tokens, call.top_k,
                      call.num_experts, call.capacity,   call.alignment};
  const Member member{std::vector<int>(call.gpus, call.gpus + call.num_ranks), call.rank,
                      call.mesh_device, call.device};
  Status status = describe(layout, member, params.exchange);
  if (!status.ok()) return text(status);
  params.exchange.signature[kInstance] = call.instance;
  const Kernel kernel = complete();
  cudaSetDevice(ordinal_of(call.gpus[call.rank]));
  return text(launch(kernel.function, params.exchange, &params, kernel.shared_bytes, nullptr));
}

RowType row_type(const Call& call) { return {static_cast<DType>(call.dtype), call.width}; }

}  // namespace

EMULATOR_API void emulator_set_devices(int count, int multiprocessors) {
  emulator::set_devices(count, multiprocessors);
}
EMULATOR_API void emulator_set_shared_bytes(int64_t bytes) {
  emulator::set_shared_bytes(static_cast<size_t>(bytes));
}
EMULATOR_API void emulator_set_seed(uint64_t seed) { emulator::set_seed(seed); }
EMULATOR_API void emulator_set_real_time(int real) { emulator::set_real_time(real != 0); }
// Once what was launched on the GPU has run: copies the buffer, and fills it with garbage if it is
// `dead` from then on.
EMULATOR_API void emulator_retire(int gpu, void* buffer, size_t bytes, void* copy, int dead) {
  emulator::Launch retire;
  retire.gpu = gpu;
  retire.call = [=] {
    memcpy(copy, buffer, bytes);
    if (dead != 0) memset(buffer, kGarbage, bytes);
  };
  emulator::enqueue(gpu, std::move(retire));
}
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

EMULATOR_API void engine_set_timeout(double seconds) { set_timeout(seconds); }
EMULATOR_API void engine_set_num_sms(int64_t num_sms) { set_num_sms(num_sms); }
EMULATOR_API void engine_set_most_sent(int64_t assignments, int64_t routes, int64_t slices) {
  set_most_sent(assignments, routes, slices);
}
// As if each two of these GPUs, all of this process, had made so many exchanges.
EMULATOR_API const char* engine_set_epochs(const int32_t* gpus, int count, uint32_t epoch) {
  Exchange exchange;
  const Status status = describe({count, 1, 1, count, 1, 1},
                                 {std::vector<int>(gpus, gpus + count), 0, 0, nullptr}, exchange);
  for (int rank = 0; status.ok() && rank < count; ++rank) {
    for (int peer = 0; peer < count; ++peer) exchange.control[rank]->epoch[gpus[peer]] = epoch;
  }
  return text(status);
}
EMULATOR_API int32_t engine_quotient(int32_t n, int32_t d) { return Divisor(d).quotient(n); }
EMULATOR_API int32_t engine_remainder(int32_t n, int32_t d) { return Divisor(d).remainder(n); }
EMULATOR_API const char* engine_start(const int32_t* ordinals, int count) {
  return text(start(std::vector<int>(ordinals, ordinals + count)));
}

// A process of a pod, its peers, and the GPUs of all. As in emulated.py.
struct Place {
  int32_t process, num_peers;
  const int32_t *peers, *pids, *sockets;
  int32_t num_gpus;
  const int32_t *gpus, *owners, *ordinals;
};

EMULATOR_API const char* engine_join(const Place* place) {
  std::vector<host::Pod::Member> members;
  for (int i = 0; i < place->num_peers; ++i) {
    members.push_back({place->peers[i], place->pids[i], 0, 0, place->sockets[i]});
  }
  std::vector<PodGpu> gpus;
  for (int i = 0; i < place->num_gpus; ++i) {
    gpus.push_back({place->gpus[i], place->owners[i], place->ordinals[i]});
  }
  host::Pod::join(place->process, members, {}, false);
  return text(join(*host::Pod::current(), place->process, gpus));
}
EMULATOR_API const char* engine_leave() {
  const char* error = text(leave());
  host::Pod::current()->leave();
  return error;
}
// What a program that exchanges rows among these GPUs is told before it runs.
EMULATOR_API const char* engine_state_of(const int64_t* gpus, int count) {
  return text(state_of(std::vector<int64_t>(gpus, gpus + count)));
}
EMULATOR_API const char* engine_take_failure() { return text(take_failure()); }
EMULATOR_API int64_t engine_mapped_bytes() { return memory().mapped_bytes; }

struct DispatchBuffers {
  int32_t routed;
  int32_t num_leaves;
  const void* const* tokens;
  void* const* rows;
  const int64_t* row_bytes;
  const uint64_t* row_types;
  const int32_t* topk_idx;
  int32_t *dest_rank, *dest_row, *row_source;
  int32_t *group_sizes, *expert_load, *num_dropped, *num_invalid;
  uint64_t* routes;
};

EMULATOR_API const char* engine_dispatch(const Call* call, const DispatchBuffers* buffers) {
  DispatchParams params = {};
  return launch_call(*call, params, [&] {
    params.topk_idx = buffers->topk_idx;
    params.dest_rank = buffers->dest_rank;
    params.dest_row = buffers->dest_row;
    params.row_source = buffers->row_source;
    params.group_sizes = buffers->group_sizes;
    params.expert_load = buffers->expert_load;
    params.num_dropped = buffers->num_dropped;
    params.num_invalid = buffers->num_invalid;
    params.routes = buffers->routes;
    for (int i = 0; i < buffers->num_leaves; ++i) {
      add_leaf(buffers->tokens[i], buffers->rows[i], buffers->row_bytes[i], buffers->row_types[i],
               params);
    }
    return complete_dispatch(buffers->routed != 0, params);
  });
}

struct CombineBuffers {
  const int32_t *dest_rank, *dest_row;
  const void *expert_out, *weights;
  void *sums, *partial_sums;
  uint32_t* flags;
};

EMULATOR_API const char* engine_combine(const Call* call, const CombineBuffers* buffers) {
  CombineParams params = {};
  return launch_call(*call, params, [&] {
    params.dest_rank = buffers->dest_rank;
    params.dest_row = buffers->dest_row;
    params.expert_out = buffers->expert_out;
    params.weights = buffers->weights;
    params.sums = buffers->sums;
    params.partial_sums = buffers->partial_sums;
    params.flags = buffers->flags;
    return complete_combine(row_type(*call), buffers->weights != nullptr, params);
  });
}

struct CombineTransposeBuffers {
  const int32_t *dest_rank, *dest_row, *row_source;
  const void *tokens, *expert_out, *weights;
  void *rows, *weight_grads;
};

EMULATOR_API const char* engine_combine_transpose(const Call* call,
                                                  const CombineTransposeBuffers* buffers) {
  CombineTransposeParams params = {};
  return launch_call(*call, params, [&] {
    params.dest_rank = buffers->dest_rank;
    params.dest_row = buffers->dest_row;
    params.row_source = buffers->row_source;
    params.tokens = buffers->tokens;
    params.expert_out = buffers->expert_out;
    params.weights = buffers->weights;
    params.rows = buffers->rows;
    params.weight_grads = buffers->weight_grads;
    return complete_combine_transpose(row_type(*call), buffers->rows != nullptr,
                                      buffers->weight_grads != nullptr, params);
  });
}
