#include "cpu/rendezvous.h"

#include <algorithm>
#include <functional>
#include <string>
#include <variant>

#include "cpu/local_session.h"

namespace freeio::cpu {

Rendezvous::Rendezvous(const Layout& layout, std::vector<int64_t> groups,
                       std::vector<int64_t> hosts, bool spans_hosts, const InstanceName& name)
    : layout_(layout),
      groups_(std::move(groups)),
      hosts_(std::move(hosts)),
      spans_hosts_(spans_hosts),
      name_(name) {
  std::lock_guard lock(mutex_);
  for (size_t i = 0; i < groups_.size(); ++i) {
    member_of_device_[groups_[i]] = static_cast<int64_t>(i);
    if (i % layout_.num_ranks == 0) processes_.push_back(std::make_shared<GroupProcesses>());
  }
  if (PeerExchanges* const exchanges = PeerExchanges::current()) {
    exchanges->add_groups(name_, layout_.num_ranks, groups_);
  }
}

// XLA destroys the instance on any thread, after its last call has returned. The lock orders the
// destruction of the members after what the calls wrote under it. (XLA orders these, too. But a
// race detector that sees only this engine does not know that. The same holds for the lock in the
// constructor.)
Rendezvous::~Rendezvous() { std::lock_guard lock(mutex_); }

const int64_t* Rendezvous::hosts_of(int64_t group) const {
  if (hosts_.empty()) return nullptr;
  const int64_t* const begin = hosts_.data() + group * layout_.num_ranks;
  const bool is_one =
      std::all_of(begin, begin + layout_.num_ranks, [](int64_t h) { return h == 0; });
  return is_one ? nullptr : begin;
}

std::shared_ptr<Session> Rendezvous::open_session(int64_t run, int64_t group, int64_t number) {
  const auto begin = groups_.begin() + group * layout_.num_ranks;
  std::vector<int64_t> devices(begin, begin + layout_.num_ranks);
  PeerExchanges* const exchanges = PeerExchanges::current();
  if (exchanges == nullptr || layout_.num_ranks == 1 || exchanges->is_local(*processes_[group])) {
    return std::make_shared<LocalSession>(layout_, std::move(devices));
  }
  return exchanges->open(name_, spans_hosts_, group, run, layout_, std::move(devices),
                         processes_[group], [=] { forget(run, group, number); });
}

void Rendezvous::forget(int64_t run, int64_t group, int64_t number) {
  std::lock_guard lock(mutex_);
  const auto calls = runs_.find({run, group});
  calls->second.open.erase(number);
  // All ranks have made equally many calls here, so their counts can begin anew.
  if (calls->second.open.empty()) runs_.erase(calls);
}

void Rendezvous::arrive(int64_t run, int64_t device, Operands operands, Done done) {
  std::function<void()> rest;
  {
    std::unique_lock lock(mutex_);
    const auto member = member_of_device_.find(device);
    if (member == member_of_device_.end()) {
      lock.unlock();
      done({Code::kInternal, "freeio_jax: mesh device " + std::to_string(device) +
                                 " is in no group of the expert axis: a bug in freeio_jax."});
      return;
    }
    const int64_t group = member->second / layout_.num_ranks;
    const int64_t rank = member->second % layout_.num_ranks;
    if (auto* const combine = std::get_if<Combine>(&operands)) combine->hosts = hosts_of(group);
    CallsOfRun& calls = runs_.try_emplace({run, group}).first->second;
    calls.calls.resize(layout_.num_ranks);
    const int64_t number = calls.calls[rank]++;
    std::shared_ptr<Session>& open = calls.open[number];
    if (open == nullptr) open = open_session(run, group, number);
    const std::shared_ptr<Session> session = open;
    auto tell_and_end = [module = name_.module, run, device,
                         done = std::move(done)](const Status& status) {
      PeerExchanges* const exchanges = PeerExchanges::current();
      if (!status.ok() && exchanges != nullptr) {
        exchanges->device_failed(module, run, device, status);
      }
      done(status);
    };
    rest = session->arrive(rank, std::move(operands), std::move(tell_and_end));
    if (session->all_arrived()) {
      calls.open.erase(number);
      if (calls.open.empty()) runs_.erase({run, group});
    }
  }
  if (rest) rest();
}

}  // namespace freeio::cpu
