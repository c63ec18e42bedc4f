// The memory of a GPU to which GPUs of other hosts write, and where everything lies in it.
//
// It is in the symmetric heap: each GPU that takes part has such memory, with equal layout. A GPU
// of a program is numbered as a PE. Groups of one host do not use it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/host_device.h"
#include "cuda/gpu_block.h"

namespace freeio::cuda {

constexpr int kHalves = 2;  // of a window: rounds use them in turn
// Parts of a half: what comes from another host with its tokens, what comes back for this rank's
// tokens, and what goes back. They do not overlap, because a rank may begin its next call while
// another one still reads what came back.
enum Part : int { kRequests, kAnswers, kOutbox, kParts };
constexpr int kMaxParcels = 1024;             // of a round
constexpr int kMaxAnswers = 4 * kMaxParcels;  // to them, in parts
constexpr int64_t kWindowAlignment = 128;

// What a rank tells each other rank when an exchange begins.
struct Header {
  uint32_t signature[kSignatureWords];
  uint32_t counts[kMaxExperts];  // dispatch: its assignments to each expert
};

// Of one PE. A signal is a Stamp of the exchange: parcels.cuh.
struct alignas(128) MailOfPe {
  // For even and odd exchanges with the PE, as a mailbox (gpu_block.h).
  Header received[2];
  Header sent[2];  // to it. The network may read this until the PE has it
  uint64_t header_signals[2];
  uint64_t has_given_up;
  // From the rail of this host to which the PE sends: these parcels of the PE are in its window.
  uint64_t relayed[kHalves][kMaxParcels];
  uint32_t epoch;     // written by this GPU: exchanges completed with the PE
  uint32_t why_gone;  // a WhyGone, written by this GPU's process; 0: the PE's takes part
};

// Of the PE of another host with which this GPU exchanges rows.
struct alignas(128) MailOfHost {
  uint64_t parcels[kHalves][kMaxParcels];  // signals: the parcel is in the window here
  // combine: so is a part of the sums for this rank's parcel.
  uint64_t answers[kHalves][kMaxAnswers];
  uint64_t credits[kHalves];  // that host needs this rank's round no more
  // By the ranks of this host: parts of parcels of rounds in each half of the window here. (One
  // number for both halves would not do: some ranks may be a round ahead.)
  uint32_t num_drained[kHalves];
};

struct alignas(128) MailOfSelf {
  uint32_t num_summed[kHalves];  // combine: parts of this rank's parcels, as num_drained
};

// Where things lie. The same on all GPUs.
struct LandingLayout {
  int32_t num_pes = 0;
  int32_t num_hosts = 0;
  int64_t part_bytes = 0;  // of a window; a multiple of kWindowAlignment

  FREEIO_HOST_DEVICE int64_t mail_of_pe_at(int pe) const {
    return int64_t{sizeof(MailOfSelf)} + pe * int64_t{sizeof(MailOfPe)};
  }
  FREEIO_HOST_DEVICE int64_t mail_of_host_at(int host) const {
    return mail_of_pe_at(num_pes) + host * int64_t{sizeof(MailOfHost)};
  }
  FREEIO_HOST_DEVICE int64_t window_at(int host, int half, Part part) const {
    return mail_of_host_at(num_hosts) +
           ((host * int64_t{kHalves} + half) * kParts + part) * part_bytes;
  }
  FREEIO_HOST_DEVICE int64_t bytes() const { return window_at(num_hosts, 0, kRequests); }

  FREEIO_HOST_DEVICE MailOfSelf& mail_of_self(std::byte* landing) const {
    return *reinterpret_cast<MailOfSelf*>(landing);
  }
  FREEIO_HOST_DEVICE MailOfPe& mail_of_pe(std::byte* landing, int pe) const {
    return *reinterpret_cast<MailOfPe*>(landing + mail_of_pe_at(pe));
  }
  FREEIO_HOST_DEVICE MailOfHost& mail_of_host(std::byte* landing, int host) const {
    return *reinterpret_cast<MailOfHost*>(landing + mail_of_host_at(host));
  }
  FREEIO_HOST_DEVICE std::byte* window(std::byte* landing, int host, int half, Part part) const {
    return landing + window_at(host, half, part);
  }
};

}  // namespace freeio::cuda
