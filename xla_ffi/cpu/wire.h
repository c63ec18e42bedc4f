// What the processes of a pod tell each other about a call, as bytes. Both ends are the same
// program on the same host, so numbers travel as they lie in memory.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/layout.h"
#include "cpu/exchange.h"

namespace freeio::cpu {

// A custom-call instance as all processes of a program name it.
struct InstanceName {
  uint64_t module = 0;      // hash of the module's name
  uint64_t program = 0;     // hash of that and of the groups
  uint64_t attributes = 0;  // hash of the operation and all its attributes
  int64_t ordinal = 0;      // among the instances of one module that have these, as XLA makes them
};

// One run of a program, as one group sees it. The k-th run in which the group exchanges rows is the
// k-th in each of its processes: XLA runs what a program launches in the order of launches, on
// every device. (XLA's run id tells runs apart in one process only: it is made from a fingerprint
// that differs between a program that was compiled and the same one loaded from the compilation
// cache.) A run that fails is counted, too, wherever it has come to: the next one begins anew.
struct RunName {
  uint64_t program = 0;
  int64_t group = 0;
  int64_t number = 0;
};

// One exchange.
struct CallName {
  RunName run;
  uint64_t attributes = 0;  // of the instance, as is its ordinal
  int64_t ordinal = 0;
  int64_t call = 0;  // of this instance in this run
};

bool operator<(const RunName& a, const RunName& b);
bool operator<(const CallName& a, const CallName& b);

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
    kLeaving,    // the sender will close its end, in good order
    kOther,      // `text` is for the other engine of the process
  };
  Kind kind = Kind::kLeaving;
  CallName name;
  int64_t rank = 0;
  Posted posted;
  std::string text;
};

std::string encode(const Message& message);

// Throws std::runtime_error where the bytes are no message.
Message decode(std::string_view bytes);

}  // namespace freeio::cpu
