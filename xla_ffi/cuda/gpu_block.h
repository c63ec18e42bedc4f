// The memory that the GPUs of an exchange share: on each GPU a GPU block for each lane, which its
// peers write to, and a host block for each GPU.
//
// The GPU blocks of a GPU lie one behind the other in its memory, and all peers map them. They are
// the only device memory that the engine owns. Their size depends on neither tokens nor row widths.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freeio::cuda {

#ifndef FREEIO_MAX_RANKS
#define FREEIO_MAX_RANKS 16
#endif
constexpr int kMaxRanks = FREEIO_MAX_RANKS;  // of one group, and GPUs of one host; at most 64
static_assert(2 <= kMaxRanks && kMaxRanks <= 64);
constexpr int kMaxExperts = 4096;  // of all ranks together; a mailbox has room for these
constexpr int kMaxTopK = 32;       // one lane of a warp for each assignment of a token
constexpr int kMaxLeaves = 16;     // arrays of one token pytree

// The time of a small call is mostly latency. Its ranks send each other their ids or routes, and
// their rows or partial sums. The most assignments of such a call: of one rank, and of all ranks
// together.
constexpr int kMaxSmallAssignments = 2048;
constexpr int kMaxSmallByAll = 16384;
// Capacity where routes are sent: a row's number and its rank, from 1 on, share a word.
constexpr int kMaxSentRow = kMaxRanks < 64 ? 1 << 26 : 1 << 25;
// Other calls count their assignments, in segments of each rank (routing_by_counts.cuh). The most
// segments, and the most counts that a CTA looks at together.
constexpr int kMaxSegments = 8;
constexpr int kMaxCounts = 8192;
// The most assignments of one rank whose routes, or whose places, are sent.
constexpr int kMaxSentRoutes = 32768;
// The most slices of one rank's tokens for which combine keeps arrival flags in the GPU block.
constexpr int kMaxArrivals = 32768;
// The most slices (geometry.h) that one rank of a small call sends to another: 4 MiB.
constexpr int kMaxSentSlices = 4096;
// The most slices of rows that are not accessed 16 bytes at a time. With more slices the stores
// take longer than a large call's opening.
constexpr int kMaxSlicesInParts = 1024;

// A GPU can run one exchange in each lane at the same time. Everything that a running exchange uses
// exists once for each lane. The exchanges of a lane run one after the other, because each lane has
// one stream: synchronous ones run on XLA's, and those that a program starts and waits for later
// run on the engine's own (overlap.h). A failure ends the exchanges of all lanes.
enum Lane : int { kSynchronous, kOverlap, kLanes };

// In these words two ranks must agree before one reads the other's memory. failure.cc has their
// names in this order.
enum Signature : int {
  kOp,
  kInstance,  // a digest of the custom call and its program
  kNumTokens,
  kTopK,
  kNumExperts,
  kCapacity,
  kAlignment,
  kGrid,
  kRows,  // digest of the row types
  kSignatureWords
};

// Buffers whose addresses a rank posts to its peers. From kFirstLeaf on: the leaves.
enum Address : int {
  kScratch,  // dispatch: places; combine: partial sums
  kFlags,    // combine: arrival flags of the partial sums
  kDestRank,
  kDestRow,
  kWeights,
  kWeightGrads,
  kFirstLeaf,
  kMaxAddresses = kFirstLeaf + kMaxLeaves
};

// An address for other ranks has two parts. The lower kRegionShift bits are an offset in a region
// of the process's memory, and the bits above are the region's number. Region 0 is the whole
// address space of the process, for ranks that are in the same process.
constexpr int kRegionShift = 56;
constexpr uint32_t kFirstRegion = 1;
constexpr uint32_t kMaxRegions = 64;  // of one process; XLA's pool grows by doubling

// A word that carries its own arrival flag: the exchange's epoch above 32 bits of value. Eight
// bytes are stored and loaded as one, so no fence and no second store stand between value and flag.
using Word = uint64_t;

// A slice of a row with the flags of its lines: lines.cuh.
struct alignas(128) SentSlice {
  unsigned char bytes[1024];
};

struct Mailbox {
  Word signature[kSignatureWords];
  Word address[kMaxAddresses][2];         // low half, high half
  alignas(16) Word routing[kMaxExperts];  // counts for each segment and expert, or ids
  Word num_invalid[kMaxSegments];         // from the GPU itself: invalid ids of each segment
};

// The larger data of one peer. Even and odd exchanges use different slices and routes, as they use
// different mailboxes.
struct Inbox {
  SentSlice slices[2][kMaxSentSlices];  // rows or partial sums
  // combine and its transpose: routes, then weights; dispatch: places.
  Word routes[2][2 * kMaxSentRoutes];
  // For each slice of this rank's tokens: the epoch of the last exchange in which the peer stored
  // its partial sum of the slice. These need not be cleared. A peer stores epochs of its next
  // exchange only after it has this GPU's routes of that exchange. By then this GPU has ended the
  // exchange before.
  uint32_t arrival_epochs[kMaxArrivals];
};

// What one lane of a GPU uses. The index of arrays over peers is the peer's GPU number. It is the
// same in all processes of the host and in all programs, while ranks differ from group to group.
struct GpuBlock {
  // Written by peers. Even and odd exchanges with a peer use different mailboxes. A peer starts
  // exchange n+2 only after it has this GPU's words of n+1. This GPU sends these after all its CTAs
  // have ended exchange n. So no CTA still reads words that the peer overwrites.
  Mailbox mailbox[kMaxRanks][2];
  uint32_t num_finished_ctas[kMaxRanks];  // of the peer, in all exchanges; done with this GPU
  uint32_t has_given_up[kMaxRanks];  // not 0: the peer has, and its memory must not be accessed

  // Written by this GPU's process, before the peer makes a call that uses the region: the address
  // at which this GPU sees the region.
  uint64_t region_base[kMaxRanks][kMaxRegions];

  // Written by this GPU.
  uint32_t epoch[kMaxRanks];           // exchanges completed with each peer
  uint32_t num_ended_ctas[kMaxRanks];  // of each peer in those exchanges
  uint32_t num_prepared_ctas;          // of the running kernel: their scratch is cleared
  uint32_t num_opened_ctas;            // of the running kernel: they know the epochs; 0: all do
  uint32_t num_leaving_ctas;           // of the running kernel: they are at its end; 0: all are
  uint32_t has_failed;           // not 0: an exchange failed, and the engine runs no more here
  uint32_t is_failure_recorded;  // in the first lane, for all lanes; not 0: some thread does it
  uint32_t num_failing_ctas;     // of the failed exchange: they know of the failure
  uint32_t are_results_spoiled;  // not 0: the results of the failed exchange are overwritten

  // A thread that waits copies these from the host block now and then.
  uint32_t last_look;            // when, in ticks of look_at_host()
  uint32_t why_gone[kMaxRanks];  // a WhyGone; 0: the peer's process takes part
  uint64_t timeout_ns;           // 0: not copied yet

  // Written by peers. Only the first ones exist, one for each GPU of the host: gpu_block_bytes().
  Inbox inbox[kMaxRanks];
};

// Bytes of a GPU block if the host has `num_gpus` GPUs that exchange rows. The block of the next
// lane begins behind them.
inline int64_t gpu_block_bytes(int num_gpus) {
  return static_cast<int64_t>(sizeof(GpuBlock) - (kMaxRanks - num_gpus) * sizeof(Inbox));
}

// The block of a lane on a GPU whose first lane has `first`.
inline GpuBlock* block_of_lane(GpuBlock* first, int lane, int64_t block_bytes) {
  return reinterpret_cast<GpuBlock*>(reinterpret_cast<std::byte*>(first) + lane * block_bytes);
}

// Steps at which a rank waits or gives up. Texts for the error are in failure.cc.
enum Step : int {
  kNone,
  kWrongDevice,
  kSignatureDiffers,
  kPeerGaveUp,
  kPeerLost,
  kWaitSignature,
  kWaitAddress,
  kWaitCounts,
  kWaitRoutes,
  kWaitRows,
  kWaitPartialSums,
  kWaitFinish,
  kWaitOwn
};

// Why a peer's process does not take part any more.
enum WhyGone : uint32_t { kDied = 1, kLeft = 2, kSentGarbage = 3 };

// The first failure on one GPU, in host memory. `step` is written last.
struct Failure {
  int32_t rank;
  int32_t peer;
  int32_t peer_gpu;
  int32_t word;       // of the signature
  uint32_t expected;  // by this rank
  uint32_t found;
  uint32_t epoch;
  uint32_t op;
  int32_t step;
};

// A long wait, which its GPU shows to the host. It is the wait of one of the threads that wait in a
// lane. The peer may be waiting, too.
struct Wait {
  uint32_t ticks;       // of 2^kWaitTick ns, so far; 0: no thread has waited that long
  uint8_t op_and_step;  // step << 4 | op
  uint8_t rank;
  uint8_t peer;
  uint8_t peer_gpu;
};
static_assert(sizeof(Wait) == sizeof(uint64_t), "it is stored and loaded as one word");
constexpr int kWaitTick = 30;

// Host memory that a GPU reads and writes.
struct HostBlock {
  Failure failure;
  uint64_t timeout_ns;
  uint32_t why_gone[kMaxRanks];  // a WhyGone; 0: the GPU's process takes part
  uint64_t wait[kLanes];         // a Wait of each lane
};

}  // namespace freeio::cuda
