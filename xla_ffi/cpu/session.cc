#include "cpu/session.h"

#include <atomic>
#include <iomanip>
#include <sstream>
#include <type_traits>
#include <variant>

namespace freeio::cpu {
namespace {

std::atomic<double> timeout_seconds{600.0};

}  // namespace

void set_timeout(double seconds) { timeout_seconds = seconds; }
double timeout_in_seconds() { return timeout_seconds; }

std::string describe(const Layout& layout, const Operands& operands) {
  std::ostringstream text;
  text << name_of(operands) << "(num_ranks=" << layout.num_ranks
       << ", num_tokens=" << layout.num_tokens << ", top_k=" << layout.top_k
       << ", num_experts=" << layout.num_experts << ", capacity=" << layout.capacity
       << ", alignment=" << layout.alignment << (layout.zero_tail != 0 ? "" : ", zero_tail=False");
  std::visit(
      [&](const auto& op) {
        using Op = std::decay_t<decltype(op)>;
        if constexpr (std::is_same_v<Op, Dispatch> || std::is_same_v<Op, DispatchAlong>) {
          text << ", rows:";
          for (const Leaf& leaf : op.leaves) text << " " << leaf.row;
        } else if constexpr (std::is_same_v<Op, Meet>) {
          text << ", " << op.rows;
        } else {
          text << ", dtype=" << name_of(op.dtype) << ", width=" << op.width
               << (op.weights != nullptr ? ", weighted" : "");
        }
        if constexpr (std::is_same_v<Op, CombineTranspose>) {
          text << (op.weight_grads != nullptr ? ", with the weights' gradient" : "");
        }
      },
      operands);
  text << ")";
  return text.str();
}

std::string waits_on(const Patience& patience) {
  std::ostringstream text;
  text << std::setprecision(4) << " has waited " << patience.waited() << " s (it gives up after "
       << patience.timeout() << " s) for ";
  return text.str();
}

std::string has_waited(const Patience& patience) {
  std::ostringstream text;
  text << std::setprecision(4) << " waited " << patience.timeout() << " s for ";
  return text.str();
}

std::string waits_without_end(const Patience& patience) {
  std::ostringstream text;
  text << std::setprecision(4) << " has waited " << patience.waited() << " s for ";
  return text.str();
}

std::string more_time() {
  return " If it is only slow, allow more time with freeio_jax.config(timeout=seconds) or "
         "FREEIO_TIMEOUT.";
}

std::string list_of_ranks(const std::vector<int64_t>& ranks, const std::vector<int64_t>& devices) {
  std::ostringstream text;
  text << (ranks.size() == 1 ? "rank " : "ranks ");
  for (size_t i = 0; i < ranks.size(); ++i) text << (i ? ", " : "") << ranks[i];
  text << " (mesh device" << (ranks.size() == 1 ? " " : "s ");
  for (size_t i = 0; i < ranks.size(); ++i) text << (i ? ", " : "") << devices[ranks[i]];
  text << ")";
  return text.str();
}

}  // namespace freeio::cpu
