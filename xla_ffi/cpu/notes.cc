#include "cpu/notes.h"

#include <deque>
#include <memory>
#include <mutex>
#include <utility>

namespace freeio::cpu {
namespace {

// Only the newest notes are kept if Python does not take them.
constexpr size_t kMaxNotes = 256;

struct Notes {
  std::mutex mutex;
  std::deque<std::string> texts;
};

// Lives until the process ends: threads may still wait then.
Notes& notes() {
  static Notes* const instance = std::make_unique<Notes>().release();
  return *instance;
}

}  // namespace

void note(std::string text) {
  std::lock_guard lock(notes().mutex);
  if (notes().texts.size() == kMaxNotes) notes().texts.pop_front();
  notes().texts.push_back(std::move(text));
}

std::string take_note() {
  std::lock_guard lock(notes().mutex);
  if (notes().texts.empty()) return "";
  std::string text = std::move(notes().texts.front());
  notes().texts.pop_front();
  return text;
}

}  // namespace freeio::cpu
