// Calls that ranks of other processes have posted for exchanges that no rank here has begun.
#pragma once

#include <deque>
#include <map>

#include "cpu/call_name.h"
#include "cpu/wire.h"

namespace freeio::cpu {

struct Letter {
  int process;
  int64_t rank;
  Posted posted;
};

// Not locked by itself: its owner's lock guards it.
class Mail {
 public:
  using Letters = std::deque<Letter>;  // of one exchange; never empty while kept

  void keep(const CallName& name, Letter&& letter);

  // All letters for an exchange, which are not kept any longer.
  Letters take(const CallName& name);

  // Drops what the process has posted for an exchange. False: it has posted nothing.
  bool retract(const CallName& name, int process);

  // Drops the letters of the runs from `first` to before `end`.
  void drop(const RunName& first, const RunName& end);

  // Calls f(name, letters) for each exchange of a run, until f returns true.
  template <typename F>
  void find_in_run(const RunName& run, const F& f) const {
    for (auto item = letters_.lower_bound(first_call_of(run));
         item != letters_.end() && item->first.run == run; ++item) {
      if (f(item->first, item->second)) return;
    }
  }

  // Some letter of the process; null: there is none.
  const Letter* find_of(int process) const;

 private:
  std::map<CallName, Letters> letters_;
};

}  // namespace freeio::cpu
