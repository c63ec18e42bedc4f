// What the GPUs of an exchange share: the control block of each, and the parameters of a kernel.
//
// A control block lives in its GPU's memory, is mapped by all peers, and is all the device memory
// that the engine owns. Its size depends on neither tokens nor row widths.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/geometry.h"

namespace freeio::cuda {

constexpr int kMaxRanks = 16;      // of one group, and GPUs of one host
constexpr int kMaxExperts = 4096;  // of all ranks together: what a mailbox has room for
constexpr int kMaxTopK = 32;       // one lane of a warp for each assignment of a token
constexpr int kMaxLeaves = 16;     // arrays of one token pytree

// A call with few assignments is ruled by latency, and sends its routing itself instead of where to
// find it: at most this many assignments of one rank, and of all ranks together.
constexpr int kMaxSentAssignments = 2048;
constexpr int kMaxSentByAll = 16384;
constexpr int kMaxSentRow = 1 << 26;  // capacity: a row's number and its rank share a word
// Others count them, in so many segments of each rank (routing_by_counts.cuh); a CTA looks at so
// many counts at a time.
constexpr int kMaxSegments = 8;
constexpr int kMaxCounts = 8192;
// More send the routes that they follow, or the places of their assignments: so many of one rank.
// In combine its tokens have at most so many slices then.
constexpr int kMaxSentRoutes = 32768;
constexpr int kMaxArrivals = 32768;
// With few bytes, too, their rows and partial sums are sent, in lines: so many slices (geometry.h)
// of one rank to another, 4 MiB.
constexpr int kMaxSentSlices = 4096;

// What two ranks must agree on before one reads the other's memory. Names for the error are in
// failure.cc, in this order.
enum Signature : int {
  kOp,
  kInstance,  // custom call of the program, by its attributes
  kNumTokens,
  kTopK,
  kNumExperts,
  kCapacity,
  kAlignment,
  kGrid,
  kRows,  // digest of the row types
  kSignatureWords
};

// Buffers whose addresses one rank tells its peers. Leaves follow from kFirstLeaf.
enum Address : int {
  kScratch,  // dispatch: route words; combine: partial sums
  kFlags,    // combine: arrival flags of the partial sums
  kDestRank,
  kDestRow,
  kWeights,
  kWeightGrads,
  kFirstLeaf,
  kMaxAddresses = kFirstLeaf + kMaxLeaves
};

// How ranks are told where a buffer is: the number of a region of the memory of its process above
// kRegionShift bits of offset. Region 0 is all of the process's address space, for peers that share
// it.
constexpr int kRegionShift = 56;
constexpr uint32_t kFirstRegion = 1;
constexpr uint32_t kMaxRegions = 64;  // of one process; XLA's pool grows by doubling

// A word that carries its own arrival flag: the exchange's epoch above 32 bits of value. Eight
// bytes are stored and loaded as one, so no fence and no second store stand between value and flag.
using Word = uint64_t;

// A slice of a row, as it is sent: lines.cuh.
struct alignas(128) SentSlice {
  unsigned char bytes[1024];
};

struct Mailbox {
  Word signature[kSignatureWords];
  Word address[kMaxAddresses][2];         // low half, high half
  alignas(16) Word routing[kMaxExperts];  // counts for each segment and expert, or ids
  Word num_invalid[kMaxSegments];         // to itself: ids that name no expert, of each segment
};

// What one peer sends where there is more of it, by turns as in the mailboxes.
struct Inbox {
  SentSlice slices[2][kMaxSentSlices];  // rows or partial sums
  Word routes[2][2 * kMaxSentRoutes];   // combine's and its transpose's: rows, then weights
  // Epoch of the last exchange in which the peer has stored that slice of that token's partial sum.
  // A peer that stores those of its next exchange has got this GPU's routes of that one.
  uint32_t arrived[kMaxArrivals];
};

// Words of the control block are counted by the peer's GPU number, which all processes of the host
// agree on: groups differ from program to program, these do not.
struct ControlBlock {
  // Written by peers. By turns, for even and odd exchanges with the peer: when it begins its next
  // but one, it has had this GPU's words of the next one, and so all CTAs here have ended this one,
  // and nobody reads what it overwrites.
  Mailbox mailbox[kMaxRanks][2];
  uint32_t finished[kMaxRanks];  // CTAs, in all exchanges, in which the peer is done with us
  uint32_t aborted[kMaxRanks];   // not 0: the peer gave up, and its memory must not be touched

  // Written by this GPU's process, before it lets a peer use the region: where this GPU sees it.
  uint64_t region_base[kMaxRanks][kMaxRegions];

  // Written by this GPU.
  uint32_t epoch[kMaxRanks];  // exchanges completed with each peer
  uint32_t ended[kMaxRanks];  // CTAs of each peer in those exchanges
  uint32_t prepared;          // CTAs of the running kernel that have prepared their scratch
  uint32_t opened;            // CTAs of the running kernel that know the epochs; 0: all
  uint32_t left;              // CTAs of the running kernel that are at its end; 0: all
  uint32_t failed;            // not 0: an exchange failed, and no further one is run
  uint32_t failing;           // CTAs of the failed exchange that know
  uint32_t spoiled;           // not 0: its results are known not to be data

  // Copied from the host block by one of the threads that wait, once in a while.
  uint32_t looked;           // when, in ticks of look_at_host()
  uint32_t lost[kMaxRanks];  // not 0: the peer's process is there no more
  uint64_t timeout_ns;       // 0: not copied yet

  // Written by peers. There is memory for as many as there are GPUs: control_bytes().
  Inbox inbox[kMaxRanks];
};

// Of a control block, where so many GPUs exchange rows.
inline size_t control_bytes(int num_gpus) {
  return sizeof(ControlBlock) - (kMaxRanks - num_gpus) * sizeof(Inbox);
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

// What became of the process of a peer.
enum Lost : uint32_t { kDied = 1, kLeft = 2 };

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

// A wait that lasts, as its GPU shows it to the host: that of one of the threads that wait. The
// peer may be waiting itself.
struct Wait {
  uint32_t ticks;       // of 2^kWaitTick ns, so far; 0: nobody has waited that long yet
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
  uint32_t lost[kMaxRanks];  // 0: the GPU's process is there
  uint64_t wait;             // a Wait
};

// What every kernel is told of its exchange.
struct Exchange {
  ControlBlock* control[kMaxRanks];  // by rank
  int32_t gpu[kMaxRanks];            // by rank
  HostBlock* host;
  const uint32_t* device;  // this device's index in the mesh, as XLA has it
  uint32_t expected_device;
  int32_t rank;
  int32_t num_ranks;
  Divisor ranks;
  Divisor local_experts;  // of each rank
  int32_t num_tokens;
  int32_t top_k;
  int32_t num_experts;
  int32_t capacity;
  Divisor alignment;  // divides capacity
  uint32_t signature[kSignatureWords];
  uint64_t posted[kMaxAddresses];  // this rank's buffers, as the peers are told of them
};

// How the packed rows are looked through for padding: in `count` blocks of `rows`, every
// `stride`-th.
struct Blocks {
  int32_t rows;
  int32_t count;
  int32_t stride;
};

// One array of a token pytree, cut into slices that one warp moves at a time.
struct Leaf {
  const std::byte* tokens;  // [T] rows, this rank's
  std::byte* rows;          // [capacity] rows, this rank's
  int64_t row_bytes;
  int32_t access_bytes;  // of one lane: 1, 2, 4, 8 or 16
  int32_t slice_bytes;
  int32_t num_slices;
};

struct DispatchParams {
  Exchange exchange;
  int32_t num_leaves;
  int32_t num_slices;  // of all leaves
  Divisor slices;
  Blocks padding;
  Leaf leaves[kMaxLeaves];
  const int32_t* topk_idx;  // null: along a handle, whose arrays are then read, not written
  int32_t* dest_rank;
  int32_t* dest_row;
  int32_t* row_source;
  int32_t* group_sizes;
  int32_t* expert_load;
  int32_t* num_dropped;
  int32_t* num_invalid;
  Word* routes;  // [R, T, K]: rows here of every rank's assignments, written by the ranks, unless
                 // they send places
  bool sends_places;     // of assignments
  int32_t segment_ctas;  // CTAs that count together
  int32_t num_segments;
  int32_t senders;  // where rows are sent: CTAs that only send; 0: all do both
};

struct CombineParams {
  Exchange exchange;
  const int32_t* dest_rank;
  const int32_t* dest_row;
  const void* expert_out;
  const void* weights;  // null: ones
  void* sums;
  void* partial_sums;  // [T, slots, width], unless sums are sent
  uint32_t* flags;     // [T, num_slices, slots], unless routes are sent
  int32_t width;
  int32_t num_slots;  // ranks other than its own in which a token can have rows
  int32_t num_slices;
  Divisor slices;
  int32_t slice_width;
  int32_t ahead;      // slices by which pushing is ahead of summing
  bool sends_routes;  // they are sent, and the arrival flags are the engine's
  // Where partial sums are sent in lines:
  int32_t senders;  // CTAs that only send; 0: all do both
  Divisor peers;    // of each rank
};

struct CombineTransposeParams {
  Exchange exchange;
  const int32_t* dest_rank;
  const int32_t* dest_row;
  const int32_t* row_source;
  const void* tokens;
  const void* expert_out;  // null without weight_grads
  const void* weights;     // null without rows
  void* rows;
  void* weight_grads;
  bool sends_routes;  // instead of showing the peers where they are
  int32_t width;
  int32_t num_slices;
  Divisor slices;
  int32_t slice_width;
  Blocks padding;
};

}  // namespace freeio::cuda
