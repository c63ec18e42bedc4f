// Names that all processes of a program have for its runs, and for the exchanges in them.
#pragma once

#include <cstdint>

namespace freeio::cpu {

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

bool operator==(const RunName& a, const RunName& b);
bool operator<(const RunName& a, const RunName& b);
// By run first: the calls of one run lie together.
bool operator<(const CallName& a, const CallName& b);

// Not above any call of the run, nor below any call of an earlier run.
CallName first_call_of(const RunName& run);

}  // namespace freeio::cpu
