#include "cpu/handlers.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "core/buffers.h"
#include "core/operand_order.h"
#include "core/registration.h"
#include "core/starter.h"
#include "cpu/instance_name.h"
#include "cpu/rendezvous.h"

namespace freeio::cpu {
namespace {

// One custom-call instance. XLA shares it among the devices that run the program.
struct Instance {
  static inline ffi::TypeId id = {};
  const std::shared_ptr<ModuleInstances> module_instances;
  Rendezvous rendezvous;

  Instance(const Layout& layout, std::vector<int64_t> groups, std::vector<int64_t> hosts,
           bool spans_hosts, const NamedInstance& named)
      : module_instances(named.instances),
        rendezvous(layout, std::move(groups), std::move(hosts), spans_hosts, named.name) {}
};

Starter& starter() {
  static Starter instance;
  return instance;
}

// When the interpreter's main thread goes on with Python code, it has returned from XLA, and the
// module that XLA made there is complete. (JAX reports the end of a compilation, but not of
// deserialize_and_load.) This needs no GIL.
void complete_when_python_goes_on(const std::shared_ptr<ModuleInstances>& module_instances) {
  if (syscall(SYS_gettid) != getpid()) return;  // Python calls back on the main thread alone
  auto kept = std::make_unique<std::shared_ptr<ModuleInstances>>(module_instances);
  const auto complete = [](void* argument) {
    const std::unique_ptr<std::shared_ptr<ModuleInstances>> made(
        static_cast<std::shared_ptr<ModuleInstances>*>(argument));
    module_is_complete(**made);
    return 0;
  };
  // This fails if very many calls are pending. Then the module counts as complete at its first run.
  if (Py_AddPendingCall(complete, kept.get()) == 0) (void)kept.release();
}

// The operation that a meeting comes before.
ffi::ErrorOr<Operation> read_operation(const ffi::Dictionary& attributes) {
  const auto name = attributes.get<std::string_view>("operation");
  for (size_t i = 0; name.has_value() && i < std::size(kOperationNames); ++i) {
    if (*name == kOperationNames[i]) return static_cast<Operation>(i);
  }
  return ffi::Unexpected(
      ffi::Error(ffi::ErrorCode::kInternal, "freeio_jax: custom call before an unknown operation"));
}

// An attribute that is a list; empty if there is none.
std::vector<int64_t> read_list(const ffi::Dictionary& attributes, const char* name) {
  const auto list = attributes.get<ffi::Span<const int64_t>>(name);
  return list.has_value() ? std::vector<int64_t>(list->begin(), list->end())
                          : std::vector<int64_t>();
}

ffi::ErrorOr<std::unique_ptr<Instance>> make_instance(const ffi::Dictionary& attributes,
                                                      int64_t operation, bool spans_hosts) {
  if (ffi::Error error = starter().ensure(); error.failure()) return ffi::Unexpected(error);
  auto call = read_attributes(attributes);
  if (!call.has_value()) return ffi::Unexpected(call.error());
  const NamedInstance named = name_instance(module_of(attributes), program_of(*call, attributes),
                                            identity_of(operation, *call, attributes));
  if (named.is_first) complete_when_python_goes_on(named.instances);
  return std::make_unique<Instance>(call->layout, std::move(call->groups),
                                    read_list(attributes, "hosts"), spans_hosts, named);
}

template <Operation kOperation>
ffi::ErrorOr<std::unique_ptr<Instance>> instantiate(ffi::Dictionary attributes) {
  return make_instance(attributes, static_cast<int64_t>(kOperation), /*spans_hosts=*/false);
}

// The number of a meeting is negative, so that it is that of no operation.
ffi::ErrorOr<std::unique_ptr<Instance>> instantiate_meet(ffi::Dictionary attributes) {
  const auto operation = read_operation(attributes);
  if (!operation.has_value()) return ffi::Unexpected(operation.error());
  return make_instance(attributes, -1 - static_cast<int64_t>(*operation), /*spans_hosts=*/true);
}

// Reads a call's buffers into the operands.
struct CallReader : BufferReader {
  // Token arrays, each with its result, up to the last argument.
  void leaves(std::vector<Leaf>& leaves) const {
    while (buffers.has_arg()) {
      const ffi::AnyBuffer* tokens = buffers.arg();
      ffi::AnyBuffer* rows = buffers.ret();
      if (!buffers.ok()) break;
      leaves.push_back({static_cast<const std::byte*>(tokens->untyped_data()),
                        static_cast<std::byte*>(rows->untyped_data()), Buffers::row_bytes(*tokens),
                        Buffers::row_text(*tokens)});
    }
  }
};

Dispatch read_dispatch(Buffers& buffers, ffi::Dictionary) {
  Dispatch op = {};
  CallReader reader{{buffers}};
  visit_dispatch(op, reader);
  return op;
}

DispatchAlong read_dispatch_along(Buffers& buffers, ffi::Dictionary) {
  DispatchAlong op = {};
  CallReader reader{{buffers}};
  visit_dispatch_along(op.routes, op, reader);
  return op;
}

Combine read_combine(Buffers& buffers, ffi::Dictionary attributes) {
  Combine op = {};
  CallReader reader{{buffers, &op.dtype, &op.width}};
  visit_combine(op.routes, op, read_flag(attributes, "weighted"), reader);
  return op;
}

CombineTranspose read_combine_transpose(Buffers& buffers, ffi::Dictionary attributes) {
  CombineTranspose op = {};
  CallReader reader{{buffers, &op.dtype, &op.width}};
  visit_combine_transpose(op.routes, op, read_flag(attributes, "rows"),
                          read_flag(attributes, "weights"), reader);
  return op;
}

// It has one argument, which it returns when all ranks have come: what follows depends on it.
Meet read_meet(Buffers& buffers, ffi::Dictionary attributes) {
  const ffi::AnyBuffer* const argument = buffers.arg();
  ffi::AnyBuffer* const result = buffers.ret();
  Meet op = {};
  if (!buffers.ok()) return op;
  if (argument->untyped_data() != result->untyped_data()) {
    std::memcpy(result->untyped_data(), argument->untyped_data(), argument->size_bytes());
  }
  if (const auto operation = read_operation(attributes); operation.has_value()) {
    op.operation = *operation;
  }
  if (const auto rows = attributes.get<std::string_view>("rows_text"); rows.has_value()) {
    op.rows = *rows;
  }
  return op;
}

// The handler of all exchanges. XLA runs them asynchronously: no thread waits for a peer. With 8
// devices on 2 cores a few blocked handlers could hold every thread that their peers need.
template <auto kRead>
ffi::Future execute(Instance* instance, ffi::RunId run, ffi::Buffer<ffi::U32, 0> device,
                    ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attributes) {
  ffi::Promise promise;
  ffi::Future future(promise);
  Buffers buffers(args, rets);
  Operands operands = kRead(buffers, attributes);
  if (!buffers.ok()) {
    promise.SetError(buffers.error());
    return future;
  }
  module_is_complete(*instance->module_instances);
  instance->rendezvous.arrive(run.run_id, *device.typed_data(), std::move(operands),
                              [promise](const Status& status) mutable {
                                if (status.ok()) {
                                  promise.SetAvailable();
                                } else {
                                  promise.SetError(to_error(status));
                                }
                              });
  return future;
}

template <auto kRead>
auto execute_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<Instance>>()
      .Ctx<ffi::RunId>()
      .Arg<ffi::Buffer<ffi::U32, 0>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs();
}

XLA_FFI_DEFINE_HANDLER(kMakeDispatch, instantiate<Operation::kDispatch>,
                       ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kMakeDispatchAlong, instantiate<Operation::kDispatchAlong>,
                       ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kMakeCombine, instantiate<Operation::kCombine>,
                       ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kMakeCombineTranspose, instantiate<Operation::kCombineTranspose>,
                       ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kMakeMeet, instantiate_meet, ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER(kMeet, execute<read_meet>, execute_binding<read_meet>());
XLA_FFI_DEFINE_HANDLER(kDispatch, execute<read_dispatch>, execute_binding<read_dispatch>());
XLA_FFI_DEFINE_HANDLER(kDispatchAlong, execute<read_dispatch_along>,
                       execute_binding<read_dispatch_along>());
XLA_FFI_DEFINE_HANDLER(kCombine, execute<read_combine>, execute_binding<read_combine>());
XLA_FFI_DEFINE_HANDLER(kCombineTranspose, execute<read_combine_transpose>,
                       execute_binding<read_combine_transpose>());

}  // namespace

void add_engine(pybind11::module_& module) {
  starter().add_to(module);
  module.def("ffi_types", [] { return ffi_type<Instance>("freeio_instance"); });
  module.def("ffi_targets", [] {
    pybind11::dict targets =
        ffi_targets_of({kMakeDispatch, kDispatch}, {kMakeDispatchAlong, kDispatchAlong},
                       {kMakeCombine, kCombine}, {kMakeCombineTranspose, kCombineTranspose});
    targets["freeio_meet"] = handlers_of({kMakeMeet, kMeet});
    return targets;
  });
}

}  // namespace freeio::cpu
