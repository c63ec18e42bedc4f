// What the CPU engine tells the log while calls wait.
#pragma once

#include <string>

namespace freeio::cpu {

// From any thread; does not wait for Python.
void note(std::string text);

// The oldest note that was not taken before; empty: there is none.
std::string take_note();

}  // namespace freeio::cpu
