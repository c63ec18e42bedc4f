// How long each CTA of a kernel spends in each phase, for the benchmark's --tax. Only a build with
// FREEIO_STAMPS records this.
#pragma once

#include <cstdint>

namespace freeio::cuda {

// What a CTA does.
enum Phase : int {
  kOpening,    // learns its epochs, and whether the engine has failed
  kRouting,    // finds out, and tells the peers, which rows go where
  kAgreeing,   // waits for addresses, counts, places or routes, and reads them
  kMoving,     // moves and sums rows; also waits for rows and partial sums that are on their way
  kFinishing,  // waits until the peers no longer read this rank's buffers. (A large combine does so
               // while rows move.)
  kPhases
};
constexpr const char* kPhaseNames[kPhases] = {"opening", "routing", "agreeing", "moving",
                                              "finishing"};

// Of one CTA in one launch. Times are those of the GPU's clock, in nanoseconds.
struct Timeline {
  uint64_t begin;
  uint64_t end;  // 0: the CTA has recorded nothing
  uint64_t spent[kPhases];
};

}  // namespace freeio::cuda
