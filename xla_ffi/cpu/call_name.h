// Names of a program's runs and exchanges that are the same in all its processes.
#pragma once

#include <cstdint>

namespace freeio::cpu {

// One run of a program, as one group sees it. The k-th run in which the group exchanges rows is the
// k-th in each of its processes, because XLA runs programs on every device in the order of their
// launches. (XLA's run id names a run in one process only. It contains a fingerprint that differs
// between a compiled program and the same program loaded from the compilation cache.) A run that
// fails is counted, too, no matter at which call it failed.
struct RunName {
  uint64_t program = 0;
  int64_t group = 0;
  int64_t number = 0;
};

// One exchange.
struct CallName {
  RunName run;
  uint64_t attributes = 0;  // InstanceName::attributes
  int64_t ordinal = 0;      // InstanceName::ordinal
  int64_t call = 0;         // number among the calls of this instance in this run
};

bool operator==(const RunName& a, const RunName& b);
bool operator<(const RunName& a, const RunName& b);
// By run first: the calls of one run lie together.
bool operator<(const CallName& a, const CallName& b);

// The least name that a call of the run can have.
CallName first_call_of(const RunName& run);

}  // namespace freeio::cpu
