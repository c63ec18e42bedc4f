// The messages between the CPU engines of processes, and how they become bytes. Both ends are the
// same program on the same kind of machine, so numbers travel as they lie in memory.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/layout.h"
#include "cpu/call_name.h"
#include "cpu/operands.h"

namespace freeio::cpu {

// The call of one rank, which its process posts to the others.
struct Posted {
  Layout layout;
  Operands operands;      // addresses in the process that posts them
  uint64_t give_ups = 0;  // of that process, when it posted this
};

struct Message {
  enum class Kind : int32_t {
    kArrived,    // `rank` has made its call: `posted`
    kDone,       // the sender has read all rows that it needs for this exchange
    kFailed,     // the sender gives up all exchanges of the run that are not complete: `text`
    kRetracted,  // the receiver has no rank in this exchange, and can drop the call
  };
  Kind kind = Kind::kArrived;
  CallName name;
  int64_t rank = 0;
  Posted posted;
  std::string text;
};

std::string encode(const Message& message);

// Throws std::runtime_error if the bytes are no message.
Message decode(std::string_view bytes);

}  // namespace freeio::cpu
