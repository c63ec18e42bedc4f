// The texts of a session between processes, for errors and the log.
#include <cstdint>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/peer_session.h"

namespace freeio::cpu {

std::string PeerSession::name() const {
  for (const Rank& rank : ranks_) {
    if (rank.has_called) return std::string("freeio_jax.") + name_of(rank.posted.operands);
  }
  return "freeio_jax";
}

// ", which has rank 2 (mesh device 2),"; empty: no rank of the process is known.
std::string PeerSession::ranks_of(int process) const {
  std::vector<int64_t> ranks;
  for (size_t r = 0; r < ranks_.size(); ++r) {
    const bool known = !processes_->of_rank.empty() && processes_->of_rank[r] == process;
    if (known || (ranks_[r].has_called && ranks_[r].process == process)) {
      ranks.push_back(static_cast<int64_t>(r));
    }
  }
  return ranks.empty() ? "" : ", which has " + list_of_ranks(ranks, devices_) + ",";
}

std::string PeerSession::description() const {
  for (const Rank& rank : ranks_) {
    if (rank.has_called && rank.process == exchanges_.process_) {
      return describe(layout_, rank.posted.operands);
    }
  }
  return "";
}

std::string PeerSession::who_waits_for_whom(const std::string& how_long) const {
  std::vector<int64_t> here, missing;
  const std::string call = description();
  for (size_t r = 0; r < ranks_.size(); ++r) {
    if (!ranks_[r].has_called) missing.push_back(static_cast<int64_t>(r));
    if (!ranks_[r].has_called || ranks_[r].process != exchanges_.process_) continue;
    here.push_back(static_cast<int64_t>(r));
  }
  std::ostringstream text;
  text << name() << ": " << list_of_ranks(here, devices_) << " of "
       << exchanges_.who(exchanges_.process_) << how_long;
  if (missing.empty()) {
    bool first = true;
    for (int process : peers_of_group()) {
      if (!awaits(process)) continue;
      text << (first ? "" : "; ") << exchanges_.who(process) << ranks_of(process)
           << " to finish this exchange";
      first = false;
    }
    text << ". It has made the call, but does not go on: it may be stopped, or very slow.";
  } else {
    text << list_of_ranks(missing, devices_) << " of " << layout_.num_ranks
         << ", which did not make this call. Here: " << call << ".";
    std::set<int> suspects;
    for (int64_t r : missing) {
      if (!processes_->of_rank.empty()) suspects.insert(processes_->of_rank[r]);
    }
    if (suspects.empty()) {
      for (const auto& [process, peer] : exchanges_.peers_) {
        if (concerns(process)) suspects.insert(process);
      }
    }
    suspects.erase(exchanges_.process_);
    for (int process : suspects) text << " " << exchanges_.waiting_in(process, call);
    if (!spans_hosts_) text << exchanges_.elsewhere_note();
    text << " All ranks of the expert axis must run the same program and make the same calls in "
            "the same order.";
  }
  return text.str();
}

}  // namespace freeio::cpu
