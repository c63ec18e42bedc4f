// Success, or an error with its message. Knows nothing of XLA, Python or CUDA.
#pragma once

#include <string>

namespace freeio {

enum class Code { kOk, kInvalidArgument, kDeadlineExceeded, kUnavailable, kInternal };

struct Status {
  Code code = Code::kOk;
  std::string message;

  bool ok() const { return code == Code::kOk; }
};

}  // namespace freeio
