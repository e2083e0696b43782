// backward_tiles: the gradient of value. A block adds up what its queries add to a pixel, and then adds the
// sum to memory: where the queries are the pixels, one atomic a pixel instead of one a point.
//
// After any edit: make kernels traffic
#pragma once

#include "fixed.cuh"

namespace deform_attn {

constexpr int kTileQueries = 64;  // of a block: a tile of 8 x 8 pixels, see query_at
constexpr int kTurnPoints = kBlock / kTileQueries;  // points of a query in a turn: a thread has one
constexpr int kShares = 2 * kBlock;                 // of a turn: two image rows of each point
constexpr int kSide = 32;                           // of the window of slots
constexpr int kRowSlots = kSide + 4;                // 4: so that neighbouring rows use other banks
constexpr int kSlots = kSide * kRowSlots;
constexpr int kTileVec = 4;        // channels of a lane
constexpr int kTileChannels = 32;  // of a pass: those that a block holds of its queries' gradients
constexpr int kTileBatch = 2;  // shares that a lane loads at a time; each team has a multiple of it
// Sums are float, or int64_t in the fixed point of fixed.cuh. Channels of a lane that one atomic adds:
template <typename Sum>
constexpr int kSumWidth = kAtomicWidth<Sum, kTileVec>;
// Blocks that must fit on a multiprocessor at once. Five fit in the registers where an atomic adds the
// channels of a lane.
template <typename Sum>
constexpr int kTileBlocks = kLeastBlocks == 4 && kSumWidth<Sum> == 4 ? 5 : kLeastBlocks;

// Floats between the gradients of two queries in shared memory. Where lanes read one channel at a time, the
// queries of the teams of a warp then have different banks.
template <typename Sum>
constexpr int kGradRow = kSumWidth<Sum> == 1 ? kTileChannels + 8 : kTileChannels;

// Whether the sums of a new pixel start with zeros from shared memory, which takes fewer instructions but four
// registers more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 10
constexpr bool kReadsZeros = false;
#else
constexpr bool kReadsZeros = true;
#endif

// kTileVec numbers, the unit of offsets; not aligned.
template <typename T>
struct Unit {
  T at[kTileVec];
};

__device__ inline void add_term(float& sum, float weight, float number) { sum += weight * number; }

// What a point adds to two neighbouring pixels of an image row.
struct alignas(16) Share {
  unsigned query;  // where its gradient lies in shared memory, in bytes, and ShareBits
  unsigned left;   // the offset of the left pixel, in units of kTileVec
  float left_weight, right_weight;
};

// What happens to the sums of the two pixels after a share.
enum ShareBits : unsigned {
  kAddLeft = 2,   // to memory; with kMore: the left pixel is on the map
  kAddRight = 4,  // to memory; with kMore: the right pixel is on the map
  kShift = 8,     // the next share's left pixel is the right one of this share
  kMore = 16      // nothing: the next share has the same pixels
};
constexpr unsigned kShareBits = 31;

// The shares of a turn, counted. The pair of pixels that begins at (x, y) has the slot (x % 32, y % 32). Where two
// pairs have the same slot, the first to come owns it; the shares of the other are not added up.
struct alignas(16) Slots {
  int owner[kSlots];   // which pair; 0: none
  int count[kSlots];   // of shares; later packed with the place where they begin
  int listed, single;  // shares with and without a slot
};

// Of Slots: with two, a warp places the points of a turn while others still add up those of the turn before.
// Only where shared memory has room for it.
constexpr int kBuffers = kLeastBlocks == 4 && kAtomicFloats == 4 ? 2 : 1;

// What the threads of a block have in common.
struct Turn {
  Slots slots[kBuffers];
  // Shares of a slot one behind the other, slots of a row in order; then those without a slot.
  Share share[kShares + kShares / 16 + kTileBatch];

  // Teams begin 16 shares apart: a gap avoids bank conflicts.
  __device__ Share& at(unsigned i) { return share[i + i / 16]; }
};

__device__ inline int packed(int count, int begin) { return count << 16 | begin; }
__device__ inline int count_of(int packed) { return packed >> 16; }
__device__ inline int begin_of(int packed) { return packed & 0xffff; }

// Adds to `grad_value`, zeros before; `fixed`: of sums in fixed point. In each turn a thread has one point,
// all of the same level. The threads list the shares of the points, sorted by pixel; then each team of
// lanes adds up an equal part of the list. head_dim is a multiple of kTileVec; offsets in units of kTileVec
// fit an unsigned; a team has up to kTileChannels / kTileVec lanes.
template <typename T, typename Points, typename Sum>
__global__ void __launch_bounds__(kBlock, kTileBlocks<Sum>)
    backward_tiles(Problem problem, LevelTable table, BlockLayout blocks, Points points,
                   const T* __restrict__ grad_output, Sum* __restrict__ grad_value,
                   FixedPoint fixed) {
  using Acc = AccOf<T>;
  constexpr bool kFixed = std::is_integral_v<Sum>;
  constexpr int kBatch = kFixed ? 1 : kTileBatch;  // two spill registers
  __shared__ BlockLevels levels;
  __shared__ Turn turn;
  // In shared memory and not in registers, which the sums need.
  __shared__ Part part;
  __shared__ ImageMask mask;
  __shared__ int64_t output_at,
      value_at;  // of the image and head; not pointers, whose space is unknown then
  __shared__ unsigned grad_at
      [kTileQueries];  // of each query: in grad_output, from output_at on, in units of kTileVec
  alignas(128) __shared__ Pack<float, kTileVec> grads[kTileQueries * kGradRow<Sum> / kTileVec];
  __shared__ typename Points::Query queries[kTileQueries];
  __shared__ float scale;
  alignas(16) __shared__ Unit<Sum> none;  // zeros that the compiler does not know: fewer moves
  if (threadIdx.x == 0) {
    none = {};
    part = part_of(blockIdx.x, problem, blocks, problem.head_dim);
    mask = mask_of(table, problem, part.batch);
    output_at = problem.output_at(part.batch, 0, part.head);
    value_at = problem.value_at(part.batch, 0, part.head);
    if constexpr (kFixed) {
      const int exponent = fixed.exponent(int64_t{part.batch} * problem.heads + part.head);
      scale = exponent == FixedPoint::kNone ? 0 : power_of_two(exponent);
    }
  }
  read_levels<Points::kReadsPixels>(table, problem, levels);
  const unsigned stride = static_cast<unsigned>(problem.row_stride() / kTileVec);
  if (static_cast<int>(threadIdx.x) < part.count) {
    const int64_t query = query_at(part.first + threadIdx.x, levels, table.count);
    grad_at[threadIdx.x] = static_cast<unsigned>(query) * stride;
    queries[threadIdx.x] = points.reopen(problem, part.batch, query, part.head);
  }
  static_assert(kSide * kSide == 4 * kBlock);
  const int own_slots = threadIdx.x / (kSide / 4) * kRowSlots + threadIdx.x % (kSide / 4) * 4;
  const auto clear = [&](Slots& slots) {
    *reinterpret_cast<Pack<int, 4>*>(slots.owner + own_slots) = {0, 0, 0, 0};
    *reinterpret_cast<Pack<int, 4>*>(slots.count + own_slots) = {0, 0, 0, 0};
    if (threadIdx.x == 0) slots.listed = slots.single = 0;
  };
  for (Slots& slots : turn.slots) clear(slots);
  int buffer = 0;
  constexpr int kWidth = kSumWidth<Sum>;
  // Reads the channels `from` to from + kTileChannels of the queries' gradients.
  const auto read_grads = [&](int from) {
    constexpr int kUnits = kTileChannels / kTileVec;  // of a query; a thread has one
    const int channel = threadIdx.x % kUnits * kTileVec;
#pragma unroll
    for (int i = 0; i < kTileQueries * kUnits / kBlock; ++i) {
      const int position = threadIdx.x / kUnits + i * (kBlock / kUnits);
      if (position >= part.count || from + channel >= problem.head_dim) continue;
      const auto* const numbers =
          reinterpret_cast<const Unit<T>*>(grad_output + output_at + from + channel);
      Pack<float, kTileVec> grad;
#pragma unroll
      for (int c = 0; c < kTileVec; c += kWidth) {
        const auto some = load_if<kWidth>(true, (numbers + grad_at[position])->at + c);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) grad.at[c + j] = some[j];
      }
      grads[(position * kGradRow<Sum> + channel) / kTileVec] = grad;
    }
  };
  __syncthreads();
  if (problem.head_dim <= kTileChannels) read_grads(0);
  const unsigned grads_at = shared_address(grads);
  const int lane_bits = blocks.lane_bits, lanes = 1 << lane_bits;
  const int lane = threadIdx.x & (lanes - 1), team = threadIdx.x >> lane_bits;

#pragma unroll 1
  for (int l = 0; l < table.count; ++l) {
    const Level level = levels.level[l];
#pragma unroll 1
    for (int first = levels.first_point[l]; first < levels.first_point[l + 1];
         first += kTurnPoints) {
      if constexpr (kBuffers == 1) __syncthreads();  // cleared, and the previous turn is over
      Slots& slots = turn.slots[buffer];
      buffer = kBuffers - 1 - buffer;
      // Neighbouring threads have neighbouring points of a query.
      const int position = threadIdx.x / kTurnPoints, k = first + threadIdx.x % kTurnPoints;
      Footprint<Acc> foot;
      unsigned on = 0;  // bit i + 1: pixel i of the footprint is on the map, and not masked
      Acc weight = 0;
      // Of each share: its slot (-1: not on the map; kSlots: none), and its number among those of the slot.
      int slot[2] = {-1, -1};
      int numbers = 0;  // 16 bits each
      int pair = 0;     // of the first share, in Slots::owner
      if (position < part.count && k < levels.first_point[l + 1]) {
        const Sample<Acc> sample = points.at(queries[position], k, l, levels);
        weight = kFixed ? sample.weight * scale : sample.weight;
        // The footprint stays as it is, for the weights.
        if (foot.place(sample.x, sample.y, level.height, level.width)) {
          on = pixels_on(foot, level, mask) * kAddLeft;
        }
        pair = foot.y * (level.width + 1) + foot.x + 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!(on >> 2 * i & (kAddLeft | kAddRight))) continue;
          const int own = pair + i * (level.width + 1);
          const int found = ((foot.y + i) & (kSide - 1)) * kRowSlots + (foot.x & (kSide - 1));
          const int owner = atomicCAS(&slots.owner[found], 0, own);
          const bool owns = owner == 0 || owner == own;
          slot[i] = owns ? found : kSlots;
          numbers |= atomicAdd(owns ? &slots.count[found] : &slots.single, 1) << 16 * i;
        }
      }
      __syncthreads();
      {  // where the shares of each slot begin; a warp has whole rows of slots
        auto& counts = *reinterpret_cast<Pack<int, 4>*>(slots.count + own_slots);
        Pack<int, 4> count = counts;
        const int own = count.at[0] + count.at[1] + count.at[2] + count.at[3];
        const int warp_lane = threadIdx.x % kWarp;
        const int upto = sum_up_to_lane(own);
        int begin = warp_lane == kWarp - 1 ? atomicAdd(&slots.listed, upto) : 0;
        begin = __shfl_sync(kAllLanes, begin, kWarp - 1) + upto - own;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int of_slot = count.at[i];
          count.at[i] = packed(of_slot, begin);
          begin += of_slot;
        }
        counts = count;
      }
      __syncthreads();
      const int listed = slots.listed, total = listed + slots.single;
      const unsigned own_grads =
          recomputed(grads_at + static_cast<unsigned>(position * (kGradRow<Sum> * sizeof(float))));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (slot[i] < 0) continue;
        int begin = listed;
        const int number = i == 0 ? numbers & 0xffff : numbers >> 16;
        unsigned bits = on >> 2 * i & (kAddLeft | kAddRight);
        if (slot[i] < kSlots) {
          const int counted = slots.count[slot[i]];
          begin = begin_of(counted);
          const int next = (foot.x & (kSide - 1)) == kSide - 1 ? 0 : slots.owner[slot[i] + 1];
          const bool more = number + 1 < count_of(counted);
          const bool shift = next == pair + i * (level.width + 1) + 1 && (bits & kAddRight);
          static_assert(kShift == 2 * kAddRight);
          bits += more ? kMore : shift ? kShift - kAddRight : 0;
        }
        const int row = static_cast<int>(level.start) + (foot.y + i) * level.width + foot.x;
        turn.at(begin + number) = {own_grads + bits, static_cast<unsigned>(row) * stride,
                                   foot.weight_on_map(2 * i) * weight,
                                   foot.weight_on_map(2 * i + 1) * weight};
      }
      if (threadIdx.x < kTileBatch) turn.at(total + threadIdx.x) = {0, 0, 0, 0};
      __syncthreads();

      clear(slots);
      const unsigned chunk = kShares / kBlock << lane_bits;  // of a team
      const unsigned begin = recomputed(team * chunk),
                     end = min(begin + chunk, static_cast<unsigned>(total));
#pragma unroll 1
      for (int from = 0; from < problem.head_dim; from += kTileVec << lane_bits) {
        if (problem.head_dim > kTileChannels) {
          __syncthreads();
          read_grads(from);
          __syncthreads();
        }
        const int channels = problem.head_dim - from;
        // Where an atomic adds one channel, neighbouring lanes have neighbouring channels: channel c of a
        // lane is `from` + lane + c * lanes.
        const int first_channel = kWidth == 1 ? lane : lane * kTileVec;
        const auto there = [&](int c) { return first_channel + c * lanes < channels; };
        if (begin >= end || first_channel >= channels) continue;
        // The target is aligned; a lane's first channel comes `own` numbers later.
        const int own = kWidth == 1 ? lane : 0;
        const unsigned grad_bytes = first_channel * sizeof(float);
        auto* const target =
            reinterpret_cast<Unit<Sum>*>(grad_value + value_at + from + first_channel - own);
        // `at` is less than zero, and wraps, for a left pixel that is not on the map.
        const auto add = [&](unsigned at, const Unit<Sum>& sum) {
#pragma unroll
          for (int c = 0; c < kTileVec; c += kWidth) {
            if (c > 0 && !there(c)) break;
            atomic_add<kWidth>((target + at)->at + own + c * lanes, sum.at + c);
          }
        };
        Unit<Sum> left = {}, right = {};
        const unsigned first_at = shared_address(turn.share) +
                                  (begin + begin / 16) * static_cast<unsigned>(sizeof(Share));
        const unsigned end_at = first_at + (end - begin) * static_cast<unsigned>(sizeof(Share));
#pragma unroll 1
        for (unsigned at = first_at; at < end_at; at += kBatch * sizeof(Share)) {
          const auto* const shares = at_address<Share>(turn.share, at);
          Share share[kBatch];
          Pack<float, kWidth> grad[kBatch][kTileVec / kWidth];
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            share[j] = shares[j];
            const unsigned query = share[j].query & ~kShareBits;
            const auto* const numbers =
                at_address<float>(grads, kWidth == 1 ? query + grad_bytes : query | grad_bytes);
#pragma unroll
            for (int c = 0; c < kTileVec; c += kWidth) {
              grad[j][c / kWidth] = load<kWidth>(numbers + c * lanes);
            }
          }
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
#pragma unroll
            for (int c = 0; c < kTileVec; ++c) {
              const float number = grad[j][c / kWidth].at[c % kWidth];
              add_term(left.at[c], share[j].left_weight, number);
              add_term(right.at[c], share[j].right_weight, number);
            }
            // The pixels of the last share go on in the next chunk.
            const bool last = kFixed && at + (j + 1) * sizeof(Share) == end_at;
            if (share[j].query & kMore && !last) continue;
            const unsigned bits = share[j].query;
            if (bits & kAddLeft) add(share[j].left, left);
            if (bits & kAddRight || (last && bits & kShift)) add(share[j].left + stride, right);
#pragma unroll
            for (int c = 0; c < kTileVec; ++c) left.at[c] = bits & kShift ? right.at[c] : Sum(0);
            right = kReadsZeros ? none : Unit<Sum>();
          }
        }
        if constexpr (!kFixed) {  // the same after the loop: faster, and takes more registers
          const Share& share = at_address<Share>(turn.share, end_at)[-1];
          const unsigned bits = share.query;
          if (bits & kMore && bits & kAddLeft) add(share.left, left);
          if (bits & kShift) right = left;
          if (bits & kShift || (bits & kMore && bits & kAddRight)) add(share.left + stride, right);
        }
      }
    }
  }
}

}  // namespace deform_attn
