#include "cpu/call_name.h"

#include <limits>
#include <tuple>

namespace freeio::cpu {
namespace {

auto fields_of(const RunName& name) { return std::tie(name.program, name.group, name.number); }

}  // namespace

bool operator==(const RunName& a, const RunName& b) { return fields_of(a) == fields_of(b); }
bool operator<(const RunName& a, const RunName& b) { return fields_of(a) < fields_of(b); }

bool operator<(const CallName& a, const CallName& b) {
  return std::tie(a.run, a.attributes, a.ordinal, a.call) <
         std::tie(b.run, b.attributes, b.ordinal, b.call);
}

CallName first_call_of(const RunName& run) {
  CallName first;
  first.run = run;
  first.ordinal = std::numeric_limits<int64_t>::min();
  return first;
}

}  // namespace freeio::cpu
