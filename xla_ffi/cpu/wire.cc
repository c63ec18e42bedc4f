#include "cpu/wire.h"

#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <variant>
#include <vector>

namespace freeio::cpu {
namespace {

// In the order in which they travel. `leaf` is const for a Writer.
template <typename Io, typename L>
void fields_of_leaf(Io& io, L& leaf) {
  io(leaf.tokens);
  io(leaf.row_bytes);
  io(leaf.row);
}

class Writer {
 public:
  template <typename T>
  void operator()(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    bytes.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  void operator()(const std::string& text) {
    (*this)(text.size());
    bytes += text;
  }
  void operator()(const std::vector<Leaf>& leaves) {
    (*this)(leaves.size());
    for (const Leaf& leaf : leaves) fields_of_leaf(*this, leaf);
  }

  std::string bytes;
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : rest_(bytes) {}

  template <typename T>
  void operator()(T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
  }
  void operator()(std::string& text) {
    size_t size = 0;
    (*this)(size);
    text.assign(take(size), size);
  }
  void operator()(std::vector<Leaf>& leaves) {
    size_t size = 0;
    (*this)(size);
    constexpr size_t kLeast = sizeof(Leaf::tokens) + sizeof(Leaf::row_bytes) + sizeof(size_t);
    if (size > rest_.size() / kLeast) malformed();
    leaves.resize(size);
    for (Leaf& leaf : leaves) fields_of_leaf(*this, leaf);
  }
  void expect_end() const {
    if (!rest_.empty()) malformed();
  }
  [[noreturn]] static void malformed() {
    throw std::runtime_error("a malformed message from a peer");
  }

 private:
  const char* take(size_t size) {
    if (size > rest_.size()) malformed();
    const char* begin = rest_.data();
    rest_.remove_prefix(size);
    return begin;
  }

  std::string_view rest_;
};

// The fields of each struct, in the order in which they travel. `self` is const for a Writer.
template <typename Io, typename Op>
void fields(Io& io, Op& op) {
  using Plain = std::remove_const_t<Op>;
  if constexpr (std::is_same_v<Plain, Dispatch>) {
    // Peers read ids and rows; the other results are of no use to them.
    io(op.topk_idx);
    io(op.leaves);
  } else if constexpr (std::is_same_v<Plain, DispatchAlong>) {
    io(op.routes);
    io(op.leaves);
  } else if constexpr (std::is_same_v<Plain, Meet>) {
    io(op.operation);
    io(op.rows);
  } else {
    static_assert(std::is_same_v<Plain, Combine> || std::is_same_v<Plain, CombineTranspose>);
    io(op);
  }
}

template <typename Io, typename M>
void header(Io& io, M& message) {
  io(message.kind);
  io(message.name);
  io(message.rank);
  io(message.text);
}

template <size_t kIndex = 0>
Operands alternative(size_t index) {
  if constexpr (kIndex < std::variant_size_v<Operands>) {
    if (index == kIndex) return Operands(std::in_place_index<kIndex>);
    return alternative<kIndex + 1>(index);
  } else {
    Reader::malformed();
  }
}

}  // namespace

std::string encode(const Message& message) {
  Writer writer;
  header(writer, message);
  if (message.kind == Message::Kind::kArrived) {
    writer(message.posted.layout);
    writer(message.posted.give_ups);
    writer(message.posted.operands.index());
    std::visit([&](const auto& op) { fields(writer, op); }, message.posted.operands);
  }
  return std::move(writer.bytes);
}

Message decode(std::string_view bytes) {
  Reader reader(bytes);
  Message message;
  header(reader, message);
  if (message.kind == Message::Kind::kArrived) {
    reader(message.posted.layout);
    reader(message.posted.give_ups);
    size_t index = 0;
    reader(index);
    message.posted.operands = alternative(index);
    std::visit([&](auto& op) { fields(reader, op); }, message.posted.operands);
  }
  reader.expect_end();
  return message;
}

}  // namespace freeio::cpu
