#include "cpu/mail.h"

#include <algorithm>
#include <utility>

namespace freeio::cpu {

void Mail::keep(const CallName& name, Letter&& letter) {
  letters_[name].push_back(std::move(letter));
}

Mail::Letters Mail::take(const CallName& name) {
  const auto found = letters_.find(name);
  if (found == letters_.end()) return {};
  Letters letters = std::move(found->second);
  letters_.erase(found);
  return letters;
}

bool Mail::retract(const CallName& name, int process) {
  const auto found = letters_.find(name);
  if (found == letters_.end()) return false;
  Letters& letters = found->second;
  const auto is_of_process = [process](const Letter& letter) { return letter.process == process; };
  letters.erase(std::remove_if(letters.begin(), letters.end(), is_of_process), letters.end());
  if (letters.empty()) letters_.erase(found);
  return true;
}

void Mail::drop(const RunName& first, const RunName& end) {
  letters_.erase(letters_.lower_bound(first_call_of(first)),
                 letters_.lower_bound(first_call_of(end)));
}

const Letter* Mail::find_of(int process) const {
  for (const auto& [name, letters] : letters_) {
    for (const Letter& letter : letters) {
      if (letter.process == process) return &letter;
    }
  }
  return nullptr;
}

}  // namespace freeio::cpu
