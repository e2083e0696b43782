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
  kAddLeft = 1,   // to memory; with kMore: the left pixel is on the map
  kAddRight = 2,  // to memory; with kMore: the right pixel is on the map
  kShift = 4,     // the next share's left pixel is the right one of this share
  kMore = 8       // nothing: the next share has the same pixels
};
constexpr unsigned kShareBits = 15;

// What the threads of a block have in common in a turn. The pair of pixels that begins at (x, y) has the
// slot (x % 32, y % 32). Where two pairs have the same slot, the first to come owns it; the shares of
// the other are not added up.
struct Turn {
  int owner[kSlots];  // which pair; -1: none
  int count[kSlots];  // of shares; later packed with the place where they begin
  // Shares of a slot one behind the other, slots of a row in order; then those without a slot.
  Share share[kShares + kShares / 16 + kTileBatch];
  int listed, single;  // shares with and without a slot

  // Teams begin 16 shares apart where all points are on the map: a gap avoids bank conflicts.
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
    backward_tiles(Problem problem, LevelTable table, Blocks blocks, Points points,
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
  __shared__ Pack<float, kTileVec> grads[kTileQueries * kGradRow<Sum> / kTileVec];
  __shared__ typename Points::Query queries[kTileQueries];
  __shared__ float scale;
  if (threadIdx.x == 0) {
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
  const auto clear = [&] {
    *reinterpret_cast<Pack<int, 4>*>(turn.owner + own_slots) = {-1, -1, -1, -1};
    *reinterpret_cast<Pack<int, 4>*>(turn.count + own_slots) = {0, 0, 0, 0};
    if (threadIdx.x == 0) turn.listed = turn.single = 0;
  };
  clear();
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
  const int lane_bits = blocks.lane_bits, lanes = 1 << lane_bits;
  const int lane = threadIdx.x & (lanes - 1), team = threadIdx.x >> lane_bits;

#pragma unroll 1
  for (int l = 0; l < table.count; ++l) {
    const Level level = levels.level[l];
#pragma unroll 1
    for (int first = levels.first_point[l]; first < levels.first_point[l + 1];
         first += kTurnPoints) {
      __syncthreads();  // cleared, and the previous turn is over
      // Neighbouring threads have neighbouring points of a query.
      const int position = threadIdx.x / kTurnPoints, k = first + threadIdx.x % kTurnPoints;
      Footprint<Acc> foot;
      unsigned on = 0;  // bit i: pixel i of the footprint is on the map, and not masked
      Acc weight = 0;
      int place[2] = {-1, -1};  // slot, and number among the shares of the slot; -1: not on the map
      if (position < part.count && k < levels.first_point[l + 1]) {
        const Sample<Acc> sample = points.at(queries[position], k, l, levels);
        weight = kFixed ? sample.weight * scale : sample.weight;
        // The footprint stays as it is, for the weights.
        if (foot.place(sample.x, sample.y, level.height, level.width)) {
          on = pixels_on(foot, level, mask);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!(on >> 2 * i & (kAddLeft | kAddRight))) continue;
          const int y = foot.y + i;
          const int slot = (y & (kSide - 1)) * kRowSlots + (foot.x & (kSide - 1));
          const int pair = y * (level.width + 1) + foot.x + 1;
          const int owner = atomicCAS(&turn.owner[slot], -1, pair);
          place[i] = owner == -1 || owner == pair ? slot << 16 | atomicAdd(&turn.count[slot], 1)
                                                  : kSlots << 16 | atomicAdd(&turn.single, 1);
        }
      }
      __syncthreads();
      {  // where the shares of each slot begin; a warp has whole rows of slots
        auto& counts = *reinterpret_cast<Pack<int, 4>*>(turn.count + own_slots);
        Pack<int, 4> count = counts;
        const int own = count.at[0] + count.at[1] + count.at[2] + count.at[3];
        const int warp_lane = threadIdx.x % kWarp;
        int upto = own;
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) {
          const int before = __shfl_up_sync(kAllLanes, upto, step);
          if (warp_lane >= step) upto += before;
        }
        int begin = warp_lane == kWarp - 1 ? atomicAdd(&turn.listed, upto) : 0;
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
      const int listed = turn.listed, total = listed + turn.single;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (place[i] < 0) continue;
        const int slot = place[i] >> 16, number = place[i] & 0xffff, y = foot.y + i;
        int begin = listed;
        unsigned bits = on >> 2 * i & (kAddLeft | kAddRight);
        if (slot < kSlots) {
          begin = begin_of(turn.count[slot]);
          const int next = (foot.x & (kSide - 1)) == kSide - 1 ? -1 : turn.owner[slot + 1];
          if (number + 1 < count_of(turn.count[slot])) {
            bits |= kMore;
          } else if (bits & kAddRight && next == y * (level.width + 1) + foot.x + 2) {
            bits = (bits & kAddLeft) | kShift;
          }
        }
        const int row = static_cast<int>(level.start) + y * level.width + foot.x;
        turn.at(begin + number) = {
            static_cast<unsigned>(position * (kGradRow<Sum> * sizeof(float))) | bits,
            static_cast<unsigned>(row) * stride, foot.weight_on_map(2 * i) * weight,
            foot.weight_on_map(2 * i + 1) * weight};
      }
      if (threadIdx.x < kTileBatch) turn.at(total + threadIdx.x) = {0, 0, 0, 0};
      __syncthreads();

      clear();
      const unsigned teams_bits = 8 - lane_bits;  // of kBlock threads
      const unsigned chunk =
          ((total + (kTileBatch << teams_bits) - 1) / kTileBatch >> teams_bits) * kTileBatch;
      const unsigned begin = team * chunk, end = min(begin + chunk, static_cast<unsigned>(total));
#pragma unroll 1
      for (int from = 0; from < problem.head_dim; from += kTileVec << lane_bits) {
        if (problem.head_dim > kTileChannels) {
          __syncthreads();
          read_grads(from);
          __syncthreads();
        }
        if (begin >= end) continue;
        const int channels = problem.head_dim - from;
        // Where an atomic adds one channel, neighbouring lanes have neighbouring channels: channel c of a
        // lane is `from` + lane + c * lanes.
        const int first_channel = kWidth == 1 ? lane : lane * kTileVec;
        const auto there = [&](int c) { return first_channel + c * lanes < channels; };
        // A lane without channels adds nothing.
        const unsigned mask = first_channel < channels ? ~0u : 0;
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
#pragma unroll 1
        for (unsigned i = begin; i < end; i += kBatch) {
          const Share* const shares = &turn.at(i);
          Share share[kBatch];
          Pack<float, kWidth> grad[kBatch][kTileVec / kWidth];
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            share[j] = shares[j];
            const unsigned query = share[j].query & ~kShareBits;
            const float* const numbers = reinterpret_cast<const float*>(
                reinterpret_cast<const char*>(grads) +
                (kWidth == 1 ? query + grad_bytes : query | grad_bytes));
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
            const bool last = kFixed && i + j == end - 1;
            if (share[j].query & kMore && !last) continue;
            const unsigned bits = share[j].query & mask;
            if (bits & kAddLeft) add(share[j].left, left);
            if (bits & kAddRight || (last && bits & kShift)) add(share[j].left + stride, right);
#pragma unroll
            for (int c = 0; c < kTileVec; ++c) left.at[c] = bits & kShift ? right.at[c] : Sum(0);
            right = {};
          }
        }
        if constexpr (!kFixed) {  // the same after the loop: faster, and takes more registers
          const Share& share = turn.at(end - 1);
          const unsigned bits = share.query & mask;
          if (bits & kMore && bits & kAddLeft) add(share.left, left);
          if (bits & kShift) right = left;
          if (bits & kShift || (bits & kMore && bits & kAddRight)) add(share.left + stride, right);
        }
      }
    }
  }
}

}  // namespace deform_attn
