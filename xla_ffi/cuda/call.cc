#include "cuda/call.h"

#include <utility>

#include "cuda/current_device.h"

namespace freeio::cuda {

void sign(const CallSite& site, uint32_t rows, uint32_t ctas,
          uint32_t (&signature)[kSignatureWords]) {
  const Layout& layout = site.layout;
  signature[kOp] = static_cast<uint32_t>(site.operation);
  signature[kInstance] = site.instance;
  signature[kNumTokens] = static_cast<uint32_t>(layout.num_tokens);
  signature[kTopK] = static_cast<uint32_t>(layout.top_k);
  signature[kNumExperts] = static_cast<uint32_t>(layout.num_experts);
  signature[kCapacity] = static_cast<uint32_t>(layout.capacity);
  signature[kAlignment] = static_cast<uint32_t>(layout.alignment);
  signature[kGrid] = ctas;
  signature[kRows] = rows;
}

Status SharedAddresses::translate(Peers& peers, uint64_t& address) {
  RelaxedCapture relaxed;  // XLA may be capturing the launch that this is for
  const auto* const pointer = reinterpret_cast<const void*>(address);
  // XLA may have freed a region and then got another one at the same addresses.
  uint64_t allocation_id = 0;
  if (allocation_id_of(pointer, allocation_id).ok()) {
    for (const SharedRegion& region : regions_) {
      if (!region.contains(address, allocation_id)) continue;
      address = region.shared_address(address);
      return {};
    }
  }
  SharedRegion region;
  Status status = peers.share(pointer, timeout(), region);
  if (!status.ok()) return status;
  regions_.push_back(region);
  address = region.shared_address(address);
  return {};
}

template <typename Operands>
Status Call<Operands>::prepare(int32_t alignment) {
  // This is read before everything else. So the next run prepares again if something changes now.
  const uint64_t version = engine_version();
  engine_version_ = 0;
  params_ = {};
  addresses_ = {};  // the regions that it knows may be those of an earlier pod
  Exchange& exchange = params_.exchange;
  Status status = find_group(site_.layout, site_.member, site_.share, exchange, connection_);
  if (!status.ok()) return status;
  status = make_plan(types_, alignment, static_cast<int32_t>(connection_.num_ctas), params_, plan_);
  if (!status.ok()) return status;
  status = LoadedKernel::load(plan_.kernel, kernel_);
  if (!status.ok()) return status;
  sign(site_, plan_.rows, connection_.num_ctas, exchange.signature);
  alignment_ = alignment;
  engine_version_ = version;
  return {};
}

// Turns the addresses that the peers get into a form that other processes understand.
template <typename Operands>
Status Call<Operands>::post_addresses() {
  if (connection_.peers == nullptr) return {};
  for (int slot = 0; slot < kMaxAddresses; ++slot) {
    uint64_t& address = params_.exchange.posted[slot];
    if ((plan_.posted >> slot & 1) == 0 || address == 0) continue;
    Status status = addresses_.translate(*connection_.peers, address);
    if (!status.ok()) return status;
  }
  return {};
}

// Everything before the launch.
template <typename Operands>
Status Call<Operands>::fill(const Operands& operands) {
  const int32_t alignment = alignment_of(types_, operands);
  if (engine_version_ != engine_version() || alignment_ != alignment) {
    Status status = prepare(alignment);
    if (!status.ok()) return status;
  }
  if (has_failure(*connection_.host)) return failure_of(*connection_.host);
  set_operands(operands, params_);
  return post_addresses();
}

template <typename Operands>
Launch Call<Operands>::launch() {
  return {connection_.num_ctas, params_.exchange.num_experts, &params_};
}

template <typename Operands>
Status Call<Operands>::run(const Operands& operands, void* stream) {
  Status status = fill(operands);
  if (status.ok()) status = kernel_.launch(launch(), stream);
  if (!status.ok() && connection_.overlap != nullptr) connection_.overlap->wait_for_all(stream);
  return status;
}

template <typename Operands>
Status Call<Operands>::start(const Operands& operands, const StartName& name, CallBuffers buffers,
                             void* stream) {
  Status status = fill(operands);
  if (status.ok()) {
    status = connection_.overlap->start(name, site_.operation, std::move(buffers), kernel_,
                                        launch(), stream);
  }
  if (!status.ok() && connection_.overlap != nullptr) connection_.overlap->wait_for_all(stream);
  return status;
}

Status WaitingCall::run(int ordinal, const StartName& name, const CallBuffers& buffers,
                        void* stream) {
  if (const uint64_t version = engine_version(); engine_version_ != version) {
    engine_version_ = 0;
    Status status = find_gpu(ordinal, connection_);
    if (!status.ok()) return status;
    engine_version_ = version;
  }
  Status status = connection_.overlap->wait(name, buffers, stream);
  if (!status.ok()) connection_.overlap->wait_for_all(stream);
  if (has_failure(*connection_.host)) return failure_of(*connection_.host);
  return status;
}

template class Call<DispatchOperands>;
template class Call<CombineOperands>;
template class Call<CombineTransposeOperands>;

}  // namespace freeio::cuda
