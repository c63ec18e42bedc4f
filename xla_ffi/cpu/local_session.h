// An exchange whose ranks are all in this process.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "cpu/deadlines.h"
#include "cpu/session.h"

namespace freeio::cpu {

// Collects the ranks' operands. The thread of the last rank that calls runs the exchange.
class LocalSession final : public Session,
                           public Waiting,
                           public std::enable_shared_from_this<LocalSession> {
 public:
  // `devices`: mesh devices of the ranks.
  LocalSession(const Layout& layout, std::vector<int64_t> devices);

  std::function<void()> arrive(int64_t rank, Operands&& operands, Done&& done) override;
  bool all_arrived() const override;
  Clock::time_point due() const override { return patience_.due(); }
  bool look() override;

 private:
  void run(int64_t last_rank);
  std::string who_waits_for_whom(const std::string& how_long) const;

  const Layout layout_;
  const std::vector<int64_t> devices_;
  Patience patience_;
  mutable std::mutex mutex_;
  int64_t num_arrived_ = 0;
  bool is_running_ = false;
  Status failure_;
  std::vector<std::optional<Operands>> operands_;
  std::vector<Done> done_;
};

}  // namespace freeio::cpu
