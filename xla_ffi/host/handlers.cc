#include "host/handlers.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "host/instance_name.h"
#include "host/rendezvous.h"
#include "xla/ffi/api/ffi.h"

namespace freeio::host {
namespace {

namespace ffi = xla::ffi;
namespace py = pybind11;

// One custom-call instance; XLA shares it among the devices that run the program.
struct Instance {
  static inline ffi::TypeId id = {};
  Rendezvous rendezvous;

  Instance(const Layout& layout, std::vector<int64_t> groups, const InstanceName& name)
      : rendezvous(layout, std::move(groups), name) {}
};

enum class Operation { kDispatch, kDispatchAlong, kCombine, kCombineTranspose };

ffi::Error to_error(const Status& status) {
  switch (status.code) {
    case Code::kOk:
      return ffi::Error::Success();
    case Code::kInvalidArgument:
      return ffi::Error(ffi::ErrorCode::kInvalidArgument, status.message);
    case Code::kDeadlineExceeded:
      return ffi::Error(ffi::ErrorCode::kDeadlineExceeded, status.message);
    case Code::kUnavailable:
      return ffi::Error(ffi::ErrorCode::kUnavailable, status.message);
    case Code::kInternal:
      break;
  }
  return ffi::Error(ffi::ErrorCode::kInternal, status.message);
}

template <Operation kOperation>
ffi::ErrorOr<std::unique_ptr<Instance>> instantiate(ffi::Dictionary attributes) {
  Layout layout;
  std::string missing;
  const auto read = [&](const char* name, int64_t& value) {
    if (auto attribute = attributes.get<int64_t>(name); attribute.has_value()) {
      value = *attribute;
    } else {
      missing = name;
    }
  };
  read("num_ranks", layout.num_ranks);
  read("num_tokens", layout.num_tokens);
  read("top_k", layout.top_k);
  read("num_experts", layout.num_experts);
  read("capacity", layout.capacity);
  read("alignment", layout.alignment);
  auto groups = attributes.get<ffi::Span<const int64_t>>("groups");
  if (!groups.has_value()) missing = "groups";
  if (!missing.empty()) {
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kInternal,
                                      "freeio_jax: custom call lacks attribute " + missing));
  }
  std::vector<int64_t> attribute_values = {static_cast<int64_t>(kOperation),
                                           layout.num_ranks,
                                           layout.num_tokens,
                                           layout.top_k,
                                           layout.num_experts,
                                           layout.capacity,
                                           layout.alignment};
  attribute_values.insert(attribute_values.end(), groups->begin(), groups->end());
  for (const char* flag : {"weighted", "rows", "weights"}) {
    const auto value = attributes.get<int64_t>(flag);
    attribute_values.push_back(value.has_value() ? *value : -1);
  }
  if (const auto module = attributes.get<std::string_view>("module"); module.has_value()) {
    attribute_values.insert(attribute_values.end(), module->begin(), module->end());
  }
  return std::make_unique<Instance>(layout, std::vector<int64_t>(groups->begin(), groups->end()),
                                    name_instance(attribute_values));
}

std::optional<DType> sum_dtype(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F64:
      return DType::kFloat64;
    case ffi::DataType::F32:
      return DType::kFloat32;
    case ffi::DataType::BF16:
      return DType::kBFloat16;
    case ffi::DataType::F16:
      return DType::kFloat16;
    case ffi::DataType::F8E5M2:
      return DType::kFloat8E5M2;
    case ffi::DataType::F8E4M3FN:
      return DType::kFloat8E4M3FN;
    default:
      return std::nullopt;
  }
}

// The buffers of one call, read in order. Remembers the first thing that was not as expected.
class Buffers {
 public:
  Buffers(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets)
      : args_(args), rets_(rets) {}

  const ffi::AnyBuffer* arg() {
    auto buffer = args_.get<ffi::AnyBuffer>(next_arg_++);
    if (!buffer.has_value()) return fail("argument");
    current_arg_.emplace(*buffer);
    return &*current_arg_;
  }
  ffi::AnyBuffer* ret() {
    auto buffer = rets_.get<ffi::AnyBuffer>(next_ret_++);
    if (!buffer.has_value()) return fail("result");
    current_ret_.emplace(**buffer);
    return &*current_ret_;
  }
  template <typename T>
  const T* arg_data() {
    const ffi::AnyBuffer* buffer = arg();
    return buffer == nullptr ? nullptr : static_cast<const T*>(buffer->untyped_data());
  }
  template <typename T>
  T* ret_data() {
    ffi::AnyBuffer* buffer = ret();
    return buffer == nullptr ? nullptr : static_cast<T*>(buffer->untyped_data());
  }

  Routes routes() {
    Routes routes;
    routes.dest_rank = arg_data<int32_t>();
    routes.dest_row = arg_data<int32_t>();
    routes.row_source = arg_data<int32_t>();
    return routes;
  }

  // The remaining arguments as token arrays, each with its result.
  std::vector<Leaf> leaves() {
    std::vector<Leaf> leaves;
    while (next_arg_ < args_.size()) {
      const ffi::AnyBuffer* tokens = arg();
      ffi::AnyBuffer* rows = ret();
      if (!ok()) break;
      leaves.push_back(
          {static_cast<const std::byte*>(tokens->untyped_data()),
           static_cast<std::byte*>(rows->untyped_data()),
           row_elements(*tokens) * static_cast<int64_t>(ffi::ByteWidth(tokens->element_type()))});
    }
    return leaves;
  }

  static int64_t row_elements(const ffi::AnyBuffer& buffer) {
    int64_t elements = 1;
    for (size_t i = 1; i < buffer.dimensions().size(); ++i) elements *= buffer.dimensions()[i];
    return elements;
  }

  // Element type and width of the rows in `buffer`.
  void row_type(const ffi::AnyBuffer* buffer, DType& dtype, int64_t& width) {
    if (buffer == nullptr) return;
    width = row_elements(*buffer);
    if (auto type = sum_dtype(buffer->element_type())) {
      dtype = *type;
    } else {
      fail("element type");
    }
  }

  bool ok() const { return error_.empty(); }
  ffi::Error error() const {
    return ffi::Error(ffi::ErrorCode::kInternal,
                      "freeio_jax: custom call with an unexpected " + error_);
  }

 private:
  std::nullptr_t fail(const char* what) {
    if (error_.empty()) error_ = what;
    return nullptr;
  }

  const ffi::RemainingArgs& args_;
  const ffi::RemainingRets& rets_;
  std::optional<ffi::AnyBuffer> current_arg_;
  std::optional<ffi::AnyBuffer> current_ret_;
  size_t next_arg_ = 0;
  size_t next_ret_ = 0;
  std::string error_;
};

Dispatch read_dispatch(Buffers& buffers, ffi::Dictionary) {
  Dispatch op;
  op.topk_idx = buffers.arg_data<int32_t>();
  op.leaves = buffers.leaves();
  op.dest_rank = buffers.ret_data<int32_t>();
  op.dest_row = buffers.ret_data<int32_t>();
  op.row_source = buffers.ret_data<int32_t>();
  op.group_sizes = buffers.ret_data<int32_t>();
  op.expert_load = buffers.ret_data<int32_t>();
  op.num_dropped = buffers.ret_data<int32_t>();
  op.num_invalid = buffers.ret_data<int32_t>();
  return op;
}

DispatchAlong read_dispatch_along(Buffers& buffers, ffi::Dictionary) {
  DispatchAlong op;
  op.routes = buffers.routes();
  op.leaves = buffers.leaves();
  return op;
}

Combine read_combine(Buffers& buffers, ffi::Dictionary attributes) {
  Combine op = {};
  op.routes = buffers.routes();
  const ffi::AnyBuffer* expert_out = buffers.arg();
  buffers.row_type(expert_out, op.dtype, op.width);
  if (expert_out != nullptr) op.expert_out = expert_out->untyped_data();
  const auto weighted = attributes.get<int64_t>("weighted");
  if (weighted.has_value() && *weighted != 0) op.weights = buffers.arg_data<void>();
  op.sums = buffers.ret_data<void>();
  return op;
}

CombineTranspose read_combine_transpose(Buffers& buffers, ffi::Dictionary attributes) {
  CombineTranspose op = {};
  op.routes = buffers.routes();
  const ffi::AnyBuffer* tokens = buffers.arg();
  buffers.row_type(tokens, op.dtype, op.width);
  if (tokens != nullptr) op.tokens = tokens->untyped_data();
  const auto rows = attributes.get<int64_t>("rows");
  const auto weights = attributes.get<int64_t>("weights");
  const bool with_rows = rows.has_value() && *rows != 0;
  const bool with_weights = weights.has_value() && *weights != 0;
  if (with_weights) op.expert_out = buffers.arg_data<void>();
  if (with_rows) op.weights = buffers.arg_data<void>();
  if (with_rows) op.rows = buffers.ret_data<void>();
  if (with_weights) op.weight_grads = buffers.ret_data<void>();
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
XLA_FFI_DEFINE_HANDLER(kDispatch, execute<read_dispatch>, execute_binding<read_dispatch>());
XLA_FFI_DEFINE_HANDLER(kDispatchAlong, execute<read_dispatch_along>,
                       execute_binding<read_dispatch_along>());
XLA_FFI_DEFINE_HANDLER(kCombine, execute<read_combine>, execute_binding<read_combine>());
XLA_FFI_DEFINE_HANDLER(kCombineTranspose, execute<read_combine_transpose>,
                       execute_binding<read_combine_transpose>());

template <typename T>
py::capsule capsule(T* pointer) {
  return py::capsule(reinterpret_cast<void*>(pointer));
}

}  // namespace

py::dict ffi_types() {
  static constexpr ffi::TypeInfo kInfo = ffi::MakeTypeInfo<Instance>();
  py::dict type;
  type["type_id"] = capsule(&Instance::id);
  type["type_info"] = capsule(const_cast<ffi::TypeInfo*>(&kInfo));
  py::dict types;
  types["freeio_instance"] = type;
  return types;
}

py::dict ffi_targets() {
  py::dict targets;
  const auto add = [&](const char* name, XLA_FFI_Handler* make, XLA_FFI_Handler* execute) {
    py::dict stages;
    stages["instantiate"] = capsule(make);
    stages["execute"] = capsule(execute);
    targets[name] = stages;
  };
  add("freeio_dispatch", kMakeDispatch, kDispatch);
  add("freeio_dispatch_along", kMakeDispatchAlong, kDispatchAlong);
  add("freeio_combine", kMakeCombine, kCombine);
  add("freeio_combine_transpose", kMakeCombineTranspose, kCombineTranspose);
  return targets;
}

}  // namespace freeio::host
