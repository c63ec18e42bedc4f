// What a warp of a large combine does where few CTAs run it. There the link waits for the
// multiprocessors: for their instructions, and for their accesses to shared memory.
//
// So slices are longer. A slice has several passes of 7 accesses of each lane, and what comes
// before and after is paid once for all passes: finding the rows, the slot, and the flag. Sums
// leave by bulk stores, which take one instruction and do not hold up what the warps load.
#pragma once

#include "cuda/combine/partial_sums.cuh"
#include "cuda/device/async_copy.cuh"
#include "cuda/device/bulk_store.cuh"
#include "cuda/device/elements.cuh"
#include "cuda/device/routes.cuh"
#include "cuda/geometry.h"

namespace freeio::cuda {

// Words that a warp needs seldom. Each is in a lane of one register.
class KeptWords {
 public:
  __device__ int operator[](int i) const { return __shfl_sync(kFullWarp, words_, i); }
  __device__ void set(int i, int word) {
    if (lane_id() == i) words_ = word;
  }
  // An address takes two words.
  __device__ std::byte* address(int i) const {
    return reinterpret_cast<std::byte*>(static_cast<uint64_t>((*this)[i + 1]) << 32 |
                                        static_cast<uint32_t>((*this)[i]));
  }
  __device__ void set_address(int i, const void* address) {
    const auto bits = reinterpret_cast<uint64_t>(address);
    set(i, static_cast<int>(bits));
    set(i + 1, static_cast<int>(bits >> 32));
  }
  // Copies `count` words.
  __device__ void copy(int to, int from, int count) {
    const int word = __shfl_sync(kFullWarp, words_, lane_id() - to + from);
    if (lane_id() >= to && lane_id() < to + count) words_ = word;
  }

 private:
  int words_ = 0;
};

// A tile's work, as one warp does it. An item is a slice of a token. Its sum is that of some rows,
// and, if the token is this rank's, of the peers' partial sums. Passes over the next rows are on
// their way to shared memory, also over those of the next item.
template <typename Element>
struct FewWarp : PartialSums {
  using ElementType = Element;
  using Accumulator = typename Element::Accumulator;
  static constexpr int kCount = wide_pack(sizeof(Element));
  using R = Raw<Element, kCount>;

  // Others have too little shared memory for the kernel.
  static constexpr bool kIsOnThisGpu = kHasBulkStores;
  static constexpr int kTileBytes = 48 << 10;                // for the routes of a tile
  static constexpr int kColumns = kCombinePass / kWarpSize;  // accesses of a lane to a pass
  static constexpr int kFirstColumns = 4;                    // a short pass has no others
  static constexpr int kStep = kWarpSize * kCount;           // elements
  static constexpr int kPassWidth = kColumns * kStep;
  static constexpr int kMiddle = kColumns / 2;
  static constexpr int kStages = 3;

  using Sums = Accumulator[kColumns][kCount];
  using Stage = R[kColumns][kWarpSize];  // a pass over a row

  // What all warps read: stands for the numbers of partial sums, and for their weights.
  struct Constants {
    Accumulator ones[kMaxRanks];
    int numbers[kMaxRanks];  // 0, 1, 2, ...
  };
  static constexpr size_t kRingBytes = kWarps * kStages * sizeof(Stage) + sizeof(Constants);

  // This warp's stages, which are filled and used one after the other. They are named by their
  // bytes from the first one.
  static constexpr int kStageBytes = sizeof(Stage);
  struct Ring {
    std::byte* const begin;  // this lane's part of the first stage
    const int end;
    int used = 0;        // the next one to use
    int spare;           // the one that was used last
    int on_the_way = 0;  // bytes
    const Constants& constants;

    // Where two ranks or more come before this one, its own sum has to be put aside. Then one stage
    // is for that.
    __device__ Ring(const Exchange& x, void* memory)
        : begin(reinterpret_cast<std::byte*>(
              &static_cast<Stage*>(memory)[warp_id() * kStages][0][lane_id()])),
          end((x.rank < 2 ? kStages : kStages - 1) * kStageBytes),
          spare(end - kStageBytes),
          constants(*reinterpret_cast<Constants*>(static_cast<Stage*>(memory) + kWarps * kStages)) {
      if (threadIdx.x < kMaxRanks) {
        auto& writable = const_cast<Constants&>(constants);
        writable.ones[threadIdx.x] = 1;
        writable.numbers[threadIdx.x] = static_cast<int>(threadIdx.x);
      }
    }
    __device__ R* at(int stage) const { return reinterpret_cast<R*>(begin + stage); }
    __device__ bool is_full() const { return on_the_way == end; }
    __device__ bool has_one_free() const { return on_the_way == end - kStageBytes; }
    // The next one to fill. If no other one is free, it is the spare one.
    __device__ int free() const {
      const int stage = used + on_the_way;
      return stage >= end ? stage - end : stage;
    }
    __device__ void use() {
      spare = used;
      used += kStageBytes;
      if (used == end) used = 0;
    }
    // For this rank's own sum.
    __device__ R* aside() const { return at(end); }
  };

  // Moves the rows of each token that are on this rank to the front of its routes. Whole CTA.
  __device__ static void arrange(const Exchange& x, RouteTile<Accumulator>& routes) {
    const int tokens = routes.size() / x.top_k;
#pragma unroll 1
    for (int token = warp_id(); token < tokens; token += kWarps) {
      const int first = token * x.top_k;
      const int from = first + lane_id();
      const bool is_here = lane_id() < x.top_k && routes.ranks[from] == x.rank;
      const uint32_t here = __ballot_sync(kFullWarp, is_here);
      int row = 0;
      Accumulator weight = 0;
      if (is_here) {
        row = routes.rows[from];
        weight = routes.weights[from];
      }
      __syncwarp();
      if (!is_here) continue;
      const int to = first + __popc(here & ((1u << lane_id()) - 1));
      routes.rows[to] = row;
      routes.weights[to] = weight;
    }
    __syncthreads();
  }

  // The columns of a slice that are left, in elements.
  struct Columns {
    int begin = 0;
    int end = 0;

    __device__ Columns() {}
    __device__ Columns(const CombineParams& p, int unit)
        : begin(p.slices.remainder(unit) * p.slice_width),
          end(min(begin + p.slice_width, p.width)) {}
    __device__ bool has_pass() const { return begin < end; }
    __device__ bool is_short() const { return end - begin <= kFirstColumns * kStep; }
    __device__ uint32_t bytes_of_pass() const {
      return static_cast<uint32_t>(min(kPassWidth, end - begin)) * sizeof(Element);
    }
  };

  // An item, as kept words.
  enum Word {
    kUnit,    // negative: there is no item
    kToken,   // whose it is, and its first assignment in the tile
    kCounts,  // of rows here, and of peers' partial sums
    kWordsOfItem,
  };
  enum Place {
    kItem = 0,                              // whose sum is being made
    kNext = kItem + kWordsOfItem,           // the one after it
    kFetched = kNext + kWordsOfItem,        // of these two, the one that is being fetched
    kPushedUnit = kFetched + kWordsOfItem,  // whose flag is to be announced; negative: none
    kPushedTo,                              // rank and slot
    kNumber,                                // of the item to look at
    kFirstToken,                            // of the tile
    kFirstUnit,                             // of the tile's units, of which there are kUnits
    kUnits,
    kPeers,  // of the item: lower and higher ranks with partial sums
    kEnd,    // of the item's columns
    kTo,     // where its sum is stored: an address
  };
  static constexpr int kLowBits = 8;  // of a word of two values
  __device__ static int pair(int low, int high) { return low | high << kLowBits; }
  __device__ static int low_of(int word) { return word & ((1 << kLowBits) - 1); }
  __device__ static int high_of(int word) { return word >> kLowBits; }

  const RouteTile<Accumulator>& routes;
  Ring& ring;
  KeptWords kept;

  // What is fetched next. Rows and partial sums are two kinds of one thing: some of an array of
  // rows, whose numbers are in shared memory.
  enum Kind { kNothing, kRows, kPartialSums };
  const int* numbers = nullptr;
  int left = 0;
  const std::byte* array = nullptr;  // this lane's columns, at its access in the middle of a pass
  Columns fetched;                   // from the pass on
  Kind kind = kNothing;              // of the pass
  bool is_full_pass = false;
  bool is_ahead = false;        // they are those of the next item
  bool may_fetch_sums = false;  // the partial sums of the item have arrived

  __device__ FewWarp(const CombineParams& params, CtaState& state,
                     const RouteTile<Accumulator>& tile_routes, const Tile& whole,
                     Announcer& of_cta, const Chunk& tile_units, Ring& its_ring)
      : PartialSums{params, params.exchange, state, of_cta}, routes(tile_routes), ring(its_ring) {
    kept.set(kFirstToken, whole.begin);
    kept.set(kFirstUnit, tile_units.begin);
    kept.set(kUnits, tile_units.size());
  }

  // Pushes partial sums to every peer, and sums the slices that come p.ahead slices before, in the
  // order of PushingWarp, for the same reason. A warp waits for an item's partial sums only when
  // all its items before are done, and their flags are announced.
  __device__ void run() {
    kept.set(kPushedUnit, -1);
    kept.set(kNumber, warp_id());
    take_next();
    while (kept[kNext + kUnit] >= 0) {
      // All of the last item has been fetched.
      if (!is_ahead) fetch_next();
      is_ahead = false;
      may_fetch_sums = false;
      kept.copy(kItem, kNext, kWordsOfItem);
      take_next();
      serve();
    }
    announce_push();
    if (lane_id() == 0) wait_for_bulk_stores();
  }

 private:
  // Ranks that have rows of a token.
  __device__ RankSet ranks_of(int first) const {
    const int rank = lane_id() < x.top_k ? routes.ranks[first + lane_id()] : -1;
    return union_of_lanes(rank >= 0 ? set_of(rank) : 0);
  }

  // Looks for the next item with something to do.
  __device__ void take_next() {
    int number = kept[kNumber];
    int unit = -1;
    const int num_units = kept[kUnits];
    const int items = num_units == 0 ? 0 : (num_units + p.ahead) * x.num_ranks;
    while (number < items) {
      const int turn = x.ranks.remainder(number);
      const bool pushes = turn != x.num_ranks - 1;
      unit = x.ranks.quotient(number) - (pushes ? 0 : p.ahead);
      number = next_item(s);
      if (unit >= 0 && unit < num_units) {
        const int rank = rank_of_turn(x, turn);
        unit += kept[kFirstUnit];
        const int first = routes.first_of(rank, p.slices.quotient(unit) - kept[kFirstToken]);
        const bool is_here = lane_id() < x.top_k && routes.ranks[first + lane_id()] == x.rank;
        const int rows = __popc(__ballot_sync(kFullWarp, is_here));
        if (rows > 0 || !pushes) {
          const int sums = pushes ? 0 : count_ranks(ranks_of(first) & ~set_of(x.rank));
          kept.set(kNext + kToken, pair(rank, first));
          kept.set(kNext + kCounts, pair(rows, sums));
          break;
        }
      }
      unit = -1;
    }
    kept.set(kNext + kUnit, unit);
    kept.set(kNumber, number);
  }

  // --- What is on its way ------------------------------------------------------------------------

  // Fills free stages, and waits for the one to use.
  __device__ void fill_and_wait() {
    if (left > 0 && ring.has_one_free()) {
      copy_row(ring.spare);
      if (ring.end == kStages * kStageBytes) {
        wait_for_copies<kStages - 1>();
      } else {
        wait_for_copies<kStages - 2>();
      }
    } else {
      fill_several();
    }
  }

  // The same where there may be nothing to fetch, or where there was nothing before.
  __device__ void fill_several() {
#pragma unroll 1
    while (!ring.is_full() && (left > 0 || find())) {
      copy_row(ring.free());
      ring.on_the_way += kStageBytes;
    }
    if (ring.is_full()) {
      if (ring.end == kStages * kStageBytes) {
        wait_for_copies<kStages - 1>();
      } else {
        wait_for_copies<kStages - 2>();
      }
    } else {
      wait_for_copies<0>();
    }
    ring.on_the_way -= kStageBytes;
  }

  __device__ void copy_row(int stage) {
    const std::byte* const from = array + int64_t{*numbers} * row_bytes();
    ++numbers;
    --left;
    R* const to = ring.at(stage);
    if (is_full_pass) {
      copy_async<sizeof(R), kColumns, kWarpSize * sizeof(R), kMiddle>(to, from);
    } else {
      const int width = fetched.end - fetched.begin - lane_id() * kCount;
#pragma unroll 1
      for (int c = 0; c < kColumns; ++c) {
        if (c * kStep < width) {
          copy_async<sizeof(R)>(to + c * kWarpSize,
                                from + (c - kMiddle) * kStep * static_cast<int>(sizeof(Element)));
        }
      }
    }
    commit_copies();
  }
  __device__ int row_bytes() const { return p.width * static_cast<int>(sizeof(Element)); }

  __device__ void fetch_next() {
    is_ahead = true;
    kept.copy(kFetched, kNext, kWordsOfItem);
    fetched = Columns(p, kept[kFetched + kUnit]);
    kind = kNothing;
  }

  // Goes to the next rows or partial sums to fetch. False: there are none yet.
  __device__ bool find() {
    do {
      const int sums = high_of(kept[kFetched + kCounts]);
      if (kind == kRows && sums > 0) {
        if (is_ahead || !may_fetch_sums) return false;
        kind = kPartialSums;
        left = sums;
        numbers = ring.constants.numbers;
        const int token = p.slices.quotient(kept[kFetched + kUnit]);
        array = this_lanes(p.partial_sums) + slot_index(token, 0) * row_bytes();
        return true;
      }
      if (kind != kNothing) fetched.begin += kPassWidth;
      kind = kNothing;
      if (!fetched.has_pass()) {
        if (is_ahead || kept[kNext + kUnit] < 0) return false;
        fetch_next();
      }
      kind = kRows;
      left = low_of(kept[kFetched + kCounts]);
      numbers = routes.rows + high_of(kept[kFetched + kToken]);
      array = this_lanes(p.expert_out);
      is_full_pass = fetched.end - fetched.begin >= kPassWidth;
    } while (left == 0);
    return true;
  }
  __device__ const std::byte* this_lanes(const void* rows) const {
    const int column = fetched.begin + kMiddle * kStep + lane_id() * kCount;
    return reinterpret_cast<const std::byte*>(static_cast<const Element*>(rows) + column);
  }

  // --- Sums --------------------------------------------------------------------------------------

  __device__ static void clear(Sums& sums) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums[c][j] = 0;
    }
  }

  // Adds the next `count` rows or partial sums.
  __device__ void add_stages(int count, const Accumulator* weights, bool is_short, Sums& sums) {
#pragma unroll 1
    for (; count > 0; --count) {
      fill_and_wait();
      const Accumulator weight = *weights++;
      const R* const from = ring.at(ring.used);
      ring.use();
      add_columns<0, kFirstColumns>(weight, from, sums);
      if (!is_short) add_columns<kFirstColumns, kColumns>(weight, from, sums);
    }
  }
  template <int kBegin, int kEnd>
  __device__ static void add_columns(Accumulator weight, const R* stage, Sums& sums) {
    R values[kEnd - kBegin];
#pragma unroll
    for (int c = kBegin; c < kEnd; ++c) values[c - kBegin] = stage[c * kWarpSize];
#pragma unroll
    for (int c = kBegin; c < kEnd; ++c) {
      add_weighted<Element, kCount>(weight, values[c - kBegin], sums[c]);
    }
  }

  // Rounds the sums, and adds them to zero.
  __device__ static void round(Sums& sums) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const R rounded = round_to<Element, kCount>(sums[c]);
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums[c][j] = 0;
      add<Element, kCount>(rounded, sums[c]);
    }
  }

  __device__ static void put(const Sums& sums, R* stage) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      stage[c * kWarpSize] = round_to<Element, kCount>(sums[c]);
    }
  }
  __device__ static void add_stage(const R* stage, Sums& sums) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const R value = stage[c * kWarpSize];
      add<Element, kCount>(value, sums[c]);
    }
  }

  // Finds out what belongs to the item, and where its sum is stored. Returns its first column.
  __device__ int begin_item() {
    const int unit = kept[kItem + kUnit];
    const int rank = low_of(kept[kItem + kToken]);
    const RankSet ranks = ranks_of(high_of(kept[kItem + kToken]));
    const int token = p.slices.quotient(unit);
    const std::byte* to = static_cast<const std::byte*>(p.sums) + int64_t{token} * row_bytes();
    if (rank == x.rank) {
      const int lower = count_ranks(ranks & below(x.rank));
      kept.set(kPeers, pair(lower, high_of(kept[kItem + kCounts]) - lower));
    } else {
      const int slot = slot_of(x.rank, ranks, rank);
      to = s.buffer<const std::byte>(rank, kScratch) + slot_index(token, slot) * row_bytes();
    }
    kept.set_address(kTo, to);
    const Columns columns(p, unit);
    kept.set(kEnd, columns.end);
    return columns.begin;
  }

  __device__ bool pushes() const { return low_of(kept[kItem + kToken]) != x.rank; }

  // Of peers' tokens partial sums are pushed. Of this rank's own tokens all partial sums are added
  // in order of rank: those of lower ranks, this rank's, and those of higher ranks.
  __device__ void serve() {
#pragma unroll 1
    for (int begin = begin_item(); begin < kept[kEnd]; begin += kPassWidth) {
      // The last pass was stored from a stage.
      if (lane_id() == 0) wait_for_bulk_reads();
      __syncwarp();
      const bool is_short = kept[kEnd] - begin <= kFirstColumns * kStep;
      Sums sums;
      clear(sums);
      Kind added = kRows;
      int count = low_of(kept[kItem + kCounts]);
      const Accumulator* weights = routes.weights + high_of(kept[kItem + kToken]);
#pragma unroll 1
      while (true) {
        add_stages(count, weights, is_short, sums);
        if (added == kNothing || pushes()) break;
        const int lower = low_of(kept[kPeers]);
        const int higher = high_of(kept[kPeers]);
        if (added == kPartialSums) {
          add_stage(ring.aside(), sums);
          added = kNothing;
          count = higher;
          continue;
        }
        await_partial_sums();
        weights = ring.constants.ones;
        if (lower < 2) {
          round(sums);  // 0 + a + b has the bits of 0 + b + a
          added = kNothing;
          count = lower + higher;
        } else {
          put(sums, ring.aside());
          clear(sums);
          added = kPartialSums;
          count = lower;
        }
      }
      announce_push();
      store(begin, sums);
    }
    if (!pushes()) return;
    const int unit = kept[kItem + kUnit];
    const int token = kept[kItem + kToken];
    kept.set(kPushedUnit, unit);
    kept.set(kPushedTo,
             pair(low_of(token), slot_of(x.rank, ranks_of(high_of(token)), low_of(token))));
  }

  // Starts to store a pass over the sums.
  __device__ void store(int begin, const Sums& sums) {
    R* const stage = ring.at(ring.spare);
    put(sums, stage);
    publish_to_bulk_stores();
    std::byte* const to = kept.address(kTo) + begin * static_cast<int>(sizeof(Element));
    const int width = min(kPassWidth, kept[kEnd] - begin);
    __syncwarp();
    if (lane_id() == 0) store_bulk(to, stage, width * static_cast<uint32_t>(sizeof(Element)));
  }

  // Announces the last push, when it has arrived.
  __device__ void announce_push() {
    const int unit = kept[kPushedUnit];
    if (unit < 0) return;
    if (lane_id() == 0) wait_for_bulk_stores();
    const int to = kept[kPushedTo];
    announce(low_of(to), unit, high_of(to));
    kept.set(kPushedUnit, -1);
  }

  __device__ void await_partial_sums() {
    if (may_fetch_sums) return;
    announce_push();
    wait_for_partial_sums(ranks_of(high_of(kept[kItem + kToken])), kept[kItem + kUnit]);
    may_fetch_sums = true;
  }
};

}  // namespace freeio::cuda
