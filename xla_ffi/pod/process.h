// A process of the program on this host.
#pragma once

#include <string>

namespace freeio::pod {

struct Process {
  int number;  // JAX's, the same in all processes
  int pid;

  std::string who() const {
    return "process " + std::to_string(number) + " (pid " + std::to_string(pid) + ")";
  }
};

}  // namespace freeio::pod
