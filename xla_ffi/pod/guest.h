// What an engine implements to talk with its like in the other processes of the host.
#pragma once

#include <string_view>

#include "pod/unique_fd.h"

namespace freeio::pod {

// How another process ceased to take part.
enum class Departure {
  kOrderly,  // it said so: by shutdown(), or at the end of its program
  kDeath,    // it ended without a word
  kGarbage,  // it sent bytes that are no message: what speaks there is not this program
};

// received() and gone() are called on the thread that serves the links. What came before the guest
// was admitted is handed over on the thread that admits it. leaving() is called on the thread that
// leaves. So a guest guards what it touches with a lock of its own. The pod is not locked during
// these calls: a guest may call the pod from them. It may hold its lock around all calls of the pod
// but those that call guests: Pod::admit and Pod::leave.
class Guest {
 public:
  virtual ~Guest() = default;

  // A message on the guest's channel, and the file that came along, if any. Messages of one process
  // come in the order in which it sent them. Throws std::runtime_error where the text is no
  // message: then the process is gone.
  virtual void received(int process, std::string_view text, UniqueFd file) = 0;

  // The process does not take part any more. Called once for each process, after received() for all
  // that it sent until then. Only what its guest says in leaving() is received later.
  virtual void gone(int process, Departure how) = 0;

  // This process leaves, and has told the others so. What the guest sends before it returns
  // reaches them, too. Called at most once, on the thread that calls Pod::leave.
  virtual void leaving() {}
};

}  // namespace freeio::pod
