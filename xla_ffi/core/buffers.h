// What the handlers of both engines read from a custom call: its attributes and its buffers.
#pragma once

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "core/digest.h"
#include "core/dtype.h"
#include "core/layout.h"
#include "core/status.h"
#include "xla/ffi/api/ffi.h"

namespace freeio {

namespace ffi = xla::ffi;

inline ffi::Error to_error(const Status& status) {
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

// The attributes that all custom calls have.
struct CallAttributes {
  Layout layout;
  std::vector<int64_t> groups;  // mesh device indices, a group after the other, by rank
};

inline ffi::ErrorOr<CallAttributes> read_attributes(const ffi::Dictionary& attributes) {
  CallAttributes call;
  Layout& layout = call.layout;
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
  read("zero_tail", layout.zero_tail);
  auto groups = attributes.get<ffi::Span<const int64_t>>("groups");
  if (!groups.has_value()) missing = "groups";
  if (!missing.empty()) {
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kInternal,
                                      "freeio_jax: custom call lacks attribute " + missing));
  }
  call.groups.assign(groups->begin(), groups->end());
  return call;
}

// An attribute that is a flag; absent is false.
inline bool read_flag(const ffi::Dictionary& attributes, const char* name) {
  const auto value = attributes.get<int64_t>(name);
  return value.has_value() && *value != 0;
}

// What all calls of a module have in common: the module's name, and the mesh's devices if they are
// known.
inline std::vector<int64_t> module_of(const ffi::Dictionary& attributes) {
  std::vector<int64_t> values;
  if (const auto devices = attributes.get<ffi::Span<const int64_t>>("devices");
      devices.has_value()) {
    values.insert(values.end(), devices->begin(), devices->end());
  }
  if (const auto module = attributes.get<std::string_view>("module"); module.has_value()) {
    values.insert(values.end(), module->begin(), module->end());
  }
  return values;
}

// What all calls of a module along one mesh axis have in common: also the groups.
inline std::vector<int64_t> program_of(const CallAttributes& call,
                                       const ffi::Dictionary& attributes) {
  std::vector<int64_t> values = {call.layout.num_ranks, static_cast<int64_t>(call.groups.size())};
  values.insert(values.end(), call.groups.begin(), call.groups.end());
  const std::vector<int64_t> module = module_of(attributes);
  values.insert(values.end(), module.begin(), module.end());
  return values;
}

// All attributes by which two calls of a program can differ.
inline std::vector<int64_t> identity_of(int64_t operation, const CallAttributes& call,
                                        const ffi::Dictionary& attributes) {
  const Layout& layout = call.layout;
  std::vector<int64_t> values = {operation,          layout.num_tokens, layout.top_k,
                                 layout.num_experts, layout.capacity,   layout.alignment,
                                 layout.zero_tail};
  if (const auto call_in_module = attributes.get<int64_t>("call"); call_in_module.has_value()) {
    values.push_back(*call_in_module);
  }
  for (const char* flag : {"weighted", "rows", "weights"}) {
    values.push_back(read_flag(attributes, flag));
  }
  const std::vector<int64_t> program = program_of(call, attributes);
  values.insert(values.end(), program.begin(), program.end());
  return values;
}

inline std::optional<DType> sum_dtype(ffi::DataType type) {
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

// Reads the buffers of one call in order. Keeps the first error.
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

  bool has_arg() const { return next_arg_ < args_.size(); }

  static int64_t row_elements(const ffi::AnyBuffer& buffer) {
    int64_t elements = 1;
    for (size_t i = 1; i < buffer.dimensions().size(); ++i) elements *= buffer.dimensions()[i];
    return elements;
  }

  // Bytes of one row of `buffer`.
  static int64_t row_bytes(const ffi::AnyBuffer& buffer) {
    return row_elements(buffer) * static_cast<int64_t>(ffi::ByteWidth(buffer.element_type()));
  }

  // Element type and shape of one row of `buffer`: as a number, and as XLA writes them, F32[5].
  static uint64_t row_digest(const ffi::AnyBuffer& buffer) {
    Digest digest({static_cast<int64_t>(buffer.element_type())});
    for (size_t i = 1; i < buffer.dimensions().size(); ++i) digest.add({buffer.dimensions()[i]});
    return digest.value();
  }
  static std::string row_text(const ffi::AnyBuffer& buffer) {
    std::ostringstream text;
    text << buffer.element_type() << "[";
    for (size_t i = 1; i < buffer.dimensions().size(); ++i) {
      text << (i > 1 ? "," : "") << buffer.dimensions()[i];
    }
    text << "]";
    return text.str();
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

// A visitor of operand_order.h that reads a call's buffers. Engines add leaves() to it.
struct BufferReader {
  Buffers& buffers;
  // Where to store the element type and width of the call's rows; null: they are known.
  DType* dtype = nullptr;
  int64_t* width = nullptr;

  template <typename T>
  void argument(const char*, T*& field) {
    // Some fields are results of one operation and arguments of another, so they are not const.
    field = const_cast<T*>(buffers.arg_data<T>());
  }
  template <typename T>
  void result(const char*, T*& field) {
    field = buffers.ret_data<T>();
  }
  void rows(const char*, const void*& field) {
    const ffi::AnyBuffer* buffer = buffers.arg();
    if (dtype != nullptr) buffers.row_type(buffer, *dtype, *width);
    field = buffer == nullptr ? nullptr : buffer->untyped_data();
  }
};

}  // namespace freeio
