// What the CPU engines of a host's processes tell each other about a call, as bytes. Both ends are
// the same program on the same host, so numbers travel as they lie in memory.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/layout.h"
#include "cpu/call_name.h"
#include "cpu/operands.h"

namespace freeio::cpu {

// One rank's call, as its process posts it.
struct Posted {
  Layout layout;
  Operands operands;      // addresses in the process that posts them
  uint64_t give_ups = 0;  // of that process, by then
};

struct Message {
  enum class Kind : int32_t {
    kArrived,    // `rank` has made its call: `posted`
    kDone,       // the sender has read all it wanted of this exchange
    kFailed,     // the sender has given up all that it has not done of the run: `text`
    kRetracted,  // the receiver has no part in this exchange after all
  };
  Kind kind = Kind::kArrived;
  CallName name;
  int64_t rank = 0;
  Posted posted;
  std::string text;
};

std::string encode(const Message& message);

// Throws std::runtime_error where the bytes are no message.
Message decode(std::string_view bytes);

}  // namespace freeio::cpu
