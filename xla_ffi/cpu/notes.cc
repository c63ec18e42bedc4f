#include "cpu/notes.h"

#include <deque>
#include <memory>
#include <mutex>
#include <utility>

namespace freeio::cpu {
namespace {

// Of notes that nobody takes, the newest are kept.
constexpr size_t kMaxNotes = 256;

struct Notes {
  std::mutex mutex;
  std::deque<std::string> untold;
};

// Lives until the process ends: threads may still wait then.
Notes& notes() {
  static Notes* const instance = std::make_unique<Notes>().release();
  return *instance;
}

}  // namespace

void note(std::string text) {
  std::lock_guard lock(notes().mutex);
  if (notes().untold.size() == kMaxNotes) notes().untold.pop_front();
  notes().untold.push_back(std::move(text));
}

std::string take_note() {
  std::lock_guard lock(notes().mutex);
  if (notes().untold.empty()) return "";
  std::string text = std::move(notes().untold.front());
  notes().untold.pop_front();
  return text;
}

}  // namespace freeio::cpu
