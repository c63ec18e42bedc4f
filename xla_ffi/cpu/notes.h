// Messages of the CPU engine for the log, about calls that wait.
#pragma once

#include <string>

namespace freeio::cpu {

// Adds a note. Any thread may call it. It does not wait for Python.
void note(std::string text);

// Returns and removes the oldest note; empty: there is none.
std::string take_note();

}  // namespace freeio::cpu
