// A process of the program.
#pragma once

#include <string>

namespace freeio::pod {

struct Process {
  int number;  // JAX's, the same in all processes
  int pid;
  std::string host;  // its host, in words, if that is not the host of this process; else empty

  bool is_here() const { return host.empty(); }
  std::string who() const {
    return "process " + std::to_string(number) + " (pid " + std::to_string(pid) + ")" +
           (is_here() ? "" : " on " + host);
  }
};

}  // namespace freeio::pod
