// What an engine implements to exchange messages with the same engine in other processes of the
// host.
#pragma once

#include <string_view>

#include "pod/unique_fd.h"

namespace freeio::pod {

// How another process ceased to take part.
enum class Departure {
  kOrderly,  // it said that it leaves: by shutdown(), or at the end of its program
  kDeath,    // it ended and had not said that it leaves
  kGarbage,  // it sent bytes that are no message, so it does not run this program
};

// The thread that serves the links calls received() and gone(). Messages that came before
// Pod::admit are handed over on the thread that calls it. leaving() is called on the thread that
// calls Pod::leave. So a guest guards its data with a lock of its own. The pod is not locked during
// these calls, so a guest may call the pod. A guest may hold its lock while it calls the pod,
// except in Pod::admit and Pod::leave, which call guests.
class Guest {
 public:
  virtual ~Guest() = default;

  // A message on the guest's channel, and the file that came with it, if any. Messages of one
  // process come in the order in which it sent them. Throws std::runtime_error if `text` is no
  // message. Then gone() is called with Departure::kGarbage.
  virtual void received(int process, std::string_view text, UniqueFd file) = 0;

  // The process does not take part any more. Called once for each process, after received() for
  // what it sent before. Only messages that its guest sends in leaving() can come later.
  virtual void gone(int process, Departure how) = 0;

  // This process leaves, and has said so to the others. They still receive what the guest sends in
  // this call. Called at most once.
  virtual void leaving() {}
};

}  // namespace freeio::pod
