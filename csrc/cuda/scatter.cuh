// backward_teams: the gradients of points and weights (or of the offsets and logits of a fused call). It runs
// with every BackwardAlgorithm but kBaseline; with kScatter it also adds the gradient of value, by atomics. In 16
// bits it rounds that of backward_tiles, see kRounds.
//
// After any edit: make kernels traffic
#pragma once

#include "points.cuh"

namespace deform_attn {

// Gradients by weight that a warp of a fused call keeps in shared memory. None in float64: with them a
// block takes more than half of the 64 KB of sm_75.
template <typename Acc>
constexpr int kKept = sizeof(Acc) == 8 ? 0 : 128;

// Whether groups of lanes share the points of a query. Not in float64, which has no register for it.
template <typename Acc>
constexpr bool kSplits = sizeof(Acc) < 8;

// Whether the weighted mean of the gradients by weight is computed at the end, from memory. In float64 it
// would take two registers too many.
template <typename Acc>
constexpr bool kRecomputesMean = kKept<Acc> == 0;

// A lane keeps what it computed of a point in shared memory, as the pixels need the registers. float64 has no
// room for that, and computes the point again.
template <typename Acc>
constexpr bool kKeepsFootprints = sizeof(Acc) < 8;

template <typename Acc>
struct alignas(16) KeptFootprint {
  Acc right, down, weight;
  unsigned on;

  __device__ void keep(const Footprint<Acc>& foot, Acc attention_weight, int level) {
    unsigned bits = level << 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= foot.on[i] ? 1u << i : 0;
    *this = {foot.right, foot.down, attention_weight, bits};
  }
  // Restores all but the pixel's coordinates; returns the attention weight.
  __device__ Acc restore(Footprint<Acc>& foot, int& level) const {
    const KeptFootprint kept = *this;
    foot.right = kept.right;
    foot.down = kept.down;
#pragma unroll
    for (int i = 0; i < 4; ++i) foot.on[i] = kept.on >> i & 1;
    level = kept.on >> 4;
    return kept.weight;
  }
};

// Points whose dot products a team computes at once. The pixels of two take too many registers in 16 bits,
// where a lane has eight channels, in float64 and in a fused call.
template <typename T, typename Points>
constexpr int kAtOnce = sizeof(T) == 4 && !Points::kFused ? 2 : 1;

// Whether the dot products of pixels with grad_output are products of matrices. A group of four lanes has 32
// channels of a query. `a` has the pixel of group g in two rows: words 0 and 2 of each lane in row g, words 1
// and 3 in row g + 8. `b` has the gradients that go with them in two columns. At most four groups differ in
// their query or channels: there are two splits or more, see launch_config.
template <typename T, int kVec>
constexpr bool kDotsByMatrices = kMultipliesMatrices<T> && kVec == 8;

// Whether a lane stages two neighbouring points at a time, if there are so many.
template <typename T, int kVec, typename Points>
constexpr bool kStagesTwo = kDotsByMatrices<T, kVec> && !Points::kFused;

// From the entry of the first point of a lane to that of the second. Not kWarp, so that the two have
// different banks of shared memory.
constexpr int kSecond = kWarp + 4;

// The offsets of a point's four pixels, in units of a load.
struct alignas(8) PixelOffsets {
  unsigned first;  // that of pixel 0; wraps where it is not on the map
  unsigned width;  // of the level, times 16; bit i: pixel i is on the map

  // Not 0: pixel i is on the map. As the inline PTX of load_where tests it.
  __device__ unsigned on(int i) const { return width & 1u << i; }
  __device__ unsigned at(int i, unsigned row_stride) const {
    const unsigned left = i & 2 ? first + (width >> 4) * row_stride : first;
    return i & 1 ? left + row_stride : left;
  }
};

// The lane's column of `b`. Columns 2 j and 2 j + 1 are of the j-th team and channels that groups of the warp
// have; with fewer of them, columns repeat and are not used.
struct MatrixColumn {
  int team;
  int channel;  // the lane's first of eight, which both columns share

  __device__ MatrixColumn(const Teams& teams, const BlockLayout& blocks) {
    const int j = teams.lane >> 3, chunk_bits = blocks.lane_bits - 2;
    team = j >> chunk_bits & (teams.count() - 1);
    channel = ((j & ((1 << chunk_bits) - 1)) * 4 + (teams.lane & 3)) * 8;
  }
  // The lane's part of it, given the gradient of these channels.
  template <typename T>
  static __device__ Pack<uint32_t, 2> part(const Loaded<T, 8>& grad, const Teams& teams) {
    const auto& words = grad.words.at;
    return teams.lane & 4 ? Pack<uint32_t, 2>{words[1], words[3]}
                          : Pack<uint32_t, 2>{words[0], words[2]};
  }
};

// Pixels of a point that a lane loads at a time. Four take too many registers in a fused call, before sm_90
// and on sm_100.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ / 100 == 10)
template <typename Points>
constexpr int kPixelsAtOnce = 2;
#else
template <typename Points>
constexpr int kPixelsAtOnce = Points::kFused ? 2 : 4;
#endif

// What the lanes of a warp share of the points that they stage, one each. In shared memory and not in registers,
// which the pixels and grad_output need.
template <typename Acc, typename Offset, typename Points, bool kTwo>
struct Staged {
  Corners<Acc, Offset, kWarp> corners;
  // The dot products of the four pixels with grad_output; later, in a fused call, the gradients by x and y of
  // the point and the same times its offset along that axis. Those of a rotated box times the offset along the
  // other axis take the place of corners.weight.
  Pack<Acc, 4> dots[kWarp];
  typename Points::Query query[kWarp / 4];  // of each team, which has 4 lanes or more
  int64_t output_at[kWarp / 4];             // of each team
  int order[kWarp];                         // the queries of the warp, from part.first on
  KeptFootprint<Acc> foot[kKeepsFootprints<Acc> ? kWarp : 1];
  // Otherwise: of a fused call, where it takes an exponential.
  Acc weight[Points::kFused && !kKeepsFootprints<Acc> ? kWarp : 1];
  Acc by_weight[Points::kFused && kKept<Acc> > 0 ? kKept<Acc> : 1];

  __device__ Corner<Acc, Offset> corner(int i, Offset) const { return corners[i]; }
  __device__ Pack<Offset, 4>* entries() { return corners.at; }
  // Of an entry.
  __device__ Pack<Acc, 4>* dots_of(Pack<Offset, 4>* entry) {
    const auto distance = reinterpret_cast<char*>(dots) - reinterpret_cast<char*>(corners.at);
    return reinterpret_cast<Pack<Acc, 4>*>(reinterpret_cast<char*>(entry) + distance);
  }
};

// The same where a lane stages two points. What else it computed of them stays in registers.
template <typename Acc, typename Offset, typename Points>
struct Staged<Acc, Offset, Points, true> {
  static constexpr int kPoints = kSecond + kWarp;
  // The weights of corners, which are used before the dot products come.
  Pack<Acc, 4> dots[kPoints];
  PixelOffsets pixels[kPoints];
  Pack<Acc, 2> fractions[kPoints];  // Footprint: right, down
  int order[kWarp];

  __device__ PixelOffsets* entries() { return pixels; }
  __device__ Pack<Acc, 4>* dots_of(PixelOffsets* entry) { return dots + (entry - pixels); }
  __device__ Corner<Acc, Offset> corner(int i, Offset row_stride) const {
    Corner<Acc, Offset> found;
    found.weight = dots[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      found.at.at[j] = pixels[i].on(j) ? pixels[i].at(j, row_stride) : Corner<Acc, Offset>::kNone;
    }
    return found;
  }
};

// Adds the points `first` to first + count of a query to the head's part of the gradient of its reference
// points. The lanes of the query's team share the elements; each always has the same ones.
template <typename T, typename Shared>
__device__ void add_reference_parts(const Problem& problem, const BlockLevels& levels,
                                    const FusedPoints<T>& points, const Shared& staged,
                                    const Teams& teams, int head, int first, int count, int level,
                                    AccOf<T>* parts) {
  using Acc = AccOf<T>;
  const int size = points.reference_size;
  const int64_t item = staged.query[teams.team()].item;
  Acc* const row = parts + (item * problem.heads + head) * points.reference_levels * size;
  const bool shared = points.reference_levels == 1;
  for (; level < problem.levels && levels.first_point[level] < first + count; ++level) {
    const int begin = max(levels.first_point[level], first);
    const int end = min(levels.first_point[level + 1], first + count);
    const bool begun = shared ? begin > 0 : levels.first_point[level] < first;
    const Acc portion = points.portion(level, levels);
    for (int j = teams.channel_lane(); j < size; j += teams.lanes()) {
      Acc sum = 0;
#pragma unroll 1
      for (int k = begin; k < end; ++k) {
        const int entry = (k - first) * teams.count() + teams.team();
        sum += j < 4 ? staged.dots[entry].at[j] : staged.corners.weight[entry].at[j - 4];
      }
      if (levels.level[level].height == 0) sum = 0;
      if (j >= 2) sum *= portion;
      Acc* const to = row + (shared ? 0 : level * size) + j;
      if (begin < end) *to = begun ? *to + sum : sum;
    }
  }
}

// Rounds float sums to a 16-bit gradient. The threads of all blocks share the sums, kRounded at a time. Both
// arrays are aligned.
constexpr int kRounded = 4;

template <typename T>
struct Rounding {
  const float* sums;  // null: there is nothing to round
  T* rounded;
  int64_t count;

  __device__ void run() const {
    constexpr int kAtOnce = 2;  // loads of a thread
    const int64_t step = int64_t{gridDim.x} * blockDim.x, whole = count / kRounded;
    const int64_t own = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
#pragma unroll 1
    for (int64_t first = own; first < whole; first += kAtOnce * step) {
      const auto there = [&](int i) { return i == 0 || first + i * step < whole; };
      Pack<float, kRounded> sum[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (there(i)) sum[i] = load<kRounded>(sums + (first + i * step) * kRounded);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        Pack<T, kRounded> numbers;
#pragma unroll
        for (int j = 0; j < kRounded; ++j) numbers.at[j] = static_cast<T>(sum[i].at[j]);
        if (there(i)) store<kRounded>(rounded + (first + i * step) * kRounded, numbers);
      }
    }
    const int64_t last = whole * kRounded + own;
    if (last < count) rounded[last] = static_cast<T>(sums[last]);
  }
};

// Whether backward_teams can round the gradient of value, which backward_tiles added before. In a fused call
// backward_tiles comes later: it reads FusedPoints::statistics.
template <typename T, typename Points>
constexpr bool kRounds = sizeof(T) == 2 && !Points::kFused;
// Whether it rounds at its end, where that takes no register from the pixels.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr bool kRoundsLast = false;
#else
constexpr bool kRoundsLast = true;
#endif

// Blocks that must fit on a multiprocessor at once. Three where 64 registers are too few.
template <typename T>
constexpr int kTeamsBlocks =
    sizeof(T) == 8 || (sizeof(T) == 2 && kLeastBlocks == 3) ? kLeastBlocks : 4;

// Divides the work as forward_teams does. Adds to `grad_value`, zeros before, unless it is null.
template <typename T, int kVec, typename Offset, typename Points>
__global__ void __launch_bounds__(kBlock, kTeamsBlocks<T>)
    backward_teams(Problem problem, LevelTable table, BlockLayout blocks, Points points,
                   const T* __restrict__ value, const T* __restrict__ grad_output,
                   AccOf<T>* __restrict__ grad_value, typename Points::Gradients gradients,
                   Rounding<T> rounding) {
  using Acc = AccOf<T>;
  using Corner = deform_attn::Corner<Acc, Offset>;
  constexpr int kWidth = kAtomicWidth<Acc, kVec>;
  __shared__ BlockLevels levels;
  constexpr bool kMatrices = kDotsByMatrices<T, kVec>;
  // Whether the gradient that the dot products take serves the additions to value as well.
  constexpr bool kKeepsGrad = sizeof(Acc) < 8 && !kMatrices && kWidth == kVec;
  constexpr bool kTwo = kStagesTwo<T, kVec, Points>;
  __shared__ Staged<Acc, Offset, Points, kTwo> all_staged[kBlock / kWarp];
  __shared__ Part part;                                    // not in registers: the pixels need them
  __shared__ int64_t first_output, first_point, value_at;  // of the part
  if constexpr (kRounds<T, Points> && !kRoundsLast) {
    if (rounding.sums) rounding.run();
  }
  if (threadIdx.x == 0) {
    part = part_of(blockIdx.x, problem, blocks, problem.head_dim);
    first_output = part.first_output(problem);
    if constexpr (kTwo) first_point = part.first_point(problem);
    value_at = problem.value_at(part.batch, 0, part.head);
  }
  read_levels<Points::kReadsPixels>(table, problem, levels);

  const int warp = threadIdx.x / kWarp;
  const int split_bits = kSplits<Acc> ? blocks.split_bits : 0;
  const Teams teams = {blocks.lane_bits + split_bits, static_cast<int>(threadIdx.x % kWarp)};
  const int lanes = 1 << blocks.lane_bits, splits = 1 << split_bits;
  const int lane = teams.lane & (lanes - 1);
  const int split = kSplits<Acc> ? teams.channel_lane() >> blocks.lane_bits : 0;
  const int slot = teams.query_of(teams.lane);  // the query of the points that this lane stages
  // float64 has no register for the address.
  auto& staged = *(sizeof(Acc) < 8 ? pinned(&all_staged[warp]) : &all_staged[warp]);
  auto* const dots = staged.dots;
  // The group's part of the channels, in the lane that has the group's products; else -1.
  [[maybe_unused]] const int own_chunk =
      (teams.lane & 3) == (teams.team() << (blocks.lane_bits - 2)) + (lane >> 2) ? lane >> 2 : -1;
  const Offset row_stride = static_cast<Offset>(problem.row_stride() / kVec);

  const int begin = warp * blocks.warp_positions;
  const int end = min(begin + blocks.warp_positions, part.count);
  staged.order[teams.lane] =
      begin + teams.lane < end
          ? static_cast<int>(query_at(part.first + begin + teams.lane, levels, table.count) -
                             part.first)
          : 0;
  const int each = kTwo && problem.points > teams.lanes() ? 2 : 1;  // points of a lane at a time
  // The levels of points k and k + 1, 8 bits each from bit 8 on.
  static_assert(kMaxLevels <= 256);
  const auto levels_of_two = [&](int k) {
    if (k >= problem.points) return 0u;
    const int first = level_of(k, 0, levels);
    const int second = k + 1 < problem.points ? level_of(k + 1, first, levels) : 0;
    return static_cast<unsigned>(first << 8 | second << 16);
  };
  // Of the two points of a lane: which pixels are on the map (4 bits each), and the levels.
  [[maybe_unused]] unsigned two_points =
      kTwo ? levels_of_two(each * teams.round_of(teams.lane)) : 0;
  for (int turn = begin; turn < end; turn += teams.count()) {
    const bool present = turn + slot < end, mine = turn + teams.team() < end;
    __syncwarp();
    const int staged_query = staged.order[turn + slot - begin];
    if constexpr (!kTwo) {
      const auto opened = [&] {
        if constexpr (Points::kFused) {
          return points.open(problem, part, staged_query, present, teams);
        } else {
          return points.open_at(problem, part.first_point(problem), staged_query);
        }
      }();
      if (teams.lane < teams.count()) {
        staged.query[teams.lane] = opened;
        staged.output_at[teams.lane] = first_output + staged_query * problem.row_stride();
      }
    }
    // The gradient of the output of a team's query.
    const auto grad_of = [&](int team) {
      if constexpr (kTwo) {
        const auto* const grads =
            reinterpret_cast<const Pack<T, kVec>*>(grad_output + first_output);
        return (grads + wide_product(staged.order[turn + team - begin], row_stride))->at;
      } else {
        return grad_output + staged.output_at[team];
      }
    };
    // Of the products: the MatrixColumn of this lane.
    [[maybe_unused]] Pack<uint32_t, 2> matrix;
    [[maybe_unused]] int level = 0;
    [[maybe_unused]] Acc mean = 0;  // of a fused call: the weighted mean of the gradients by weight
    [[maybe_unused]] const bool kept =
        kKept<Acc> > 0 && problem.points * teams.count() <= kKept<Acc>;
    for (int first = 0; first < problem.points; first += each * teams.lanes()) {
      const int k_staged = first + each * teams.round_of(teams.lane);
      __syncwarp();
      const int own_points = present ? min(each, problem.points - k_staged) : 0;
      const bool stages = own_points > 0;
      [[maybe_unused]] Pack<Acc, 2> two_weights = {};
      if constexpr (kTwo) {
        typename Points::Two two = {};
        if (stages) {
          two = points.read_two(points.open_at(problem, first_point, staged_query), k_staged,
                                own_points > 1);
        }
        two_weights = two.weights;
        two_points &= ~255u;
#pragma unroll 1
        for (int i = 0; i < each; ++i) {
          const int entry = teams.lane + i * kSecond;
          PixelOffsets pixels = {0, 0};
          if (i < own_points) {
            const int l = two_points >> (8 * i + 8) & 255;
            const auto sample = points.of_two({}, two, i, l, levels);
            const Level level = levels.level[l];
            Footprint<Acc> foot;
            const bool hit = foot.place(sample.x, sample.y, level.height, level.width);
            const unsigned on =
                hit ? pixels_on(foot, level, mask_of(table, problem, part.batch)) : 0;
            pixels.first = (static_cast<unsigned>(level.start) +
                            static_cast<unsigned>(foot.y) * level.width + foot.x) *
                           row_stride;
            pixels.width = static_cast<unsigned>(level.width) << 4 | on;
            two_points |= on << 4 * i;
            staged.fractions[entry] = {foot.right, foot.down};
            if (grad_value) {
#pragma unroll
              for (int j = 0; j < 4; ++j) dots[entry].at[j] = foot.weight_on_map(j) * sample.weight;
            }
          }
          staged.pixels[entry] = pixels;
        }
      } else if (stages) {
        level = level_of(k_staged, sizeof(Acc) == 8 ? 0 : level, levels);
        const auto sample = points.at(staged.query[slot], k_staged, level, levels);
        Footprint<Acc> foot;
        find_pixels<int64_t>(foot, sample.x, sample.y, levels.level[level],
                             mask_of(table, problem, part.batch));
        const auto corner =
            corner_of<Acc, Offset>(foot, levels.level[level], sample.weight, row_stride);
        if (!kMatrices || grad_value) {
          staged.corners.set(teams.lane, corner);
        } else {  // the weights are not needed
          staged.corners.at[teams.lane] = corner.at;
        }
        if constexpr (kKeepsFootprints<Acc>) {
          staged.foot[teams.lane].keep(foot, sample.weight, level);
        } else if constexpr (Points::kFused) {
          staged.weight[teams.lane] = sample.weight;
        }
      } else {
        constexpr Offset kNone = Corner::kNone;
        staged.corners.at[teams.lane] = {kNone, kNone, kNone, kNone};
      }
      __syncwarp();

      const int count = min(each * teams.lanes(), problem.points - first);
      // Where a lane stages two points, neighbouring groups of a team have one of them each.
      const int rounds = kTwo ? (count + each - 1) >> (each - 1) : count;
      const int turn_bits = split_bits - (each - 1), own_round = split >> (each - 1);
      const int own_entry =
          own_round * teams.count() + teams.team() + (each == 2 && split & 1 ? kSecond : 0);
      const T* const grad_of_query = grad_of(teams.team());
      [[maybe_unused]] Loaded<T, kVec> grad;
      // Neighbouring lanes add to neighbouring addresses, for every width of atomics.
      const auto add_to_value = [&] {
        for (int from = 0; grad_value && mine && from < problem.head_dim; from += lanes * kVec) {
          const auto channel_of = [&](int c) {
            return from + (c / kWidth * lanes + lane) * kWidth;
          };
          Acc added[kVec];
          if (kKeepsGrad && problem.head_dim <= lanes * kVec) {  // read above
#pragma unroll
            for (int c = 0; c < kVec; ++c) added[c] = grad[c];
          } else {
#pragma unroll
            for (int c = 0; c < kVec; c += kWidth) {
              const auto some =
                  load_if<kWidth>(channel_of(c) < problem.head_dim, grad_of_query + channel_of(c));
#pragma unroll
              for (int j = 0; j < kWidth; ++j) added[c + j] = some[j];
            }
          }
          auto* const target = reinterpret_cast<Pack<Acc, kVec>*>(grad_value + value_at);
#pragma unroll 1
          for (int entry = own_entry, round = own_round; round < rounds;
               entry += teams.count() << turn_bits, round += 1 << turn_bits) {
            const Corner corner = staged.corner(entry, row_stride);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (corner.at.at[i] == Corner::kNone) continue;
              Acc* const to = (target + corner.at.at[i])->at;
#pragma unroll
              for (int c = 0; c < kVec; c += kWidth) {
                if (channel_of(c) >= problem.head_dim) break;
                Acc term[kWidth];
#pragma unroll
                for (int j = 0; j < kWidth; ++j) term[j] = corner.weight.at[i] * added[c + j];
                atomic_add<kWidth>(to + channel_of(c), term);
              }
            }
          }
        }
      };
      if constexpr (kTwo) {  // before the dot products take the place of the weights
        add_to_value();
        if (grad_value) __syncwarp();
      }
      for (int from = 0; from < problem.head_dim; from += lanes * kVec) {
        const int channel = from + lane * kVec;
        const bool active = channel < problem.head_dim;
        if constexpr (!kMatrices) grad = load_if<kVec>(active && mine, grad_of_query + channel);
        const auto* const source =
            reinterpret_cast<const Pack<T, kVec>*>(value + value_at + channel);
        if constexpr (kMatrices) {
          if (Points::kFused || first == 0 || lanes * kVec < problem.head_dim) {
            const MatrixColumn column(teams, blocks);
            const bool there = turn + column.team < end && from + column.channel < problem.head_dim;
            matrix = MatrixColumn::part(
                load_if<kVec>(there, grad_of(column.team) + from + column.channel), teams);
          }
          constexpr int kPixels = kPixelsAtOnce<Points>;
          Loaded<T, kVec> pixel[kPixels] = {};  // off the map, what the pixel before had: not used
          // Whether a group has all channels of its pixels.
          const bool alone = problem.head_dim <= 4 * kVec;
          auto* own_pixels = pinned(staged.entries() + own_entry);
          [[maybe_unused]] auto* own_dots = dots + own_entry;
          [[maybe_unused]] const int active_mask = recomputed(active ? 15 : 0);
          [[maybe_unused]] auto next_pixels = *own_pixels;
          const int step = teams.count() << turn_bits;
          // Every lane makes as many steps.
#pragma unroll 1
          for (int left = (rounds + (1 << turn_bits) - 1) >> turn_bits; left > 0;
               --left, own_dots += step) {
            const auto pixels = kTwo ? next_pixels : *own_pixels;
            auto* const total = kTwo ? own_dots : staged.dots_of(own_pixels);
            own_pixels += step;
            if (kTwo && left > 1) next_pixels = *own_pixels;
            const auto there = [&](int i) -> int {
              if constexpr (kTwo)
                return pixels.on(i) & active_mask;
              else
                return active && pixels.at[i] != Corner::kNone;
            };
            const auto offset = [&](int i) {
              if constexpr (kTwo)
                return pixels.at(i, row_stride);
              else
                return pixels.at[i];
            };
            Pack<Acc, 4> dot;
#pragma unroll
            for (int i = 0; i < 4; i += kPixels) {
#pragma unroll
              for (int j = 0; j < kPixels; ++j) {
                load_where(there(i + j), source + offset(i + j), pixel[j]);
              }
#pragma unroll
              for (int j = 0; j < kPixels; ++j) {
                float product[4] = {};
                add_product<T>(product, pixel[j].words.at, matrix.at);
                dot.at[i + j] = product[0] + product[3];
              }
            }
            if (alone) {
              if (own_chunk == 0) *total = dot;
              continue;
            }
#pragma unroll 1
            for (int chunk = 0; chunk < lanes / 4; ++chunk) {
              __syncwarp();
              if (chunk != own_chunk) continue;
#pragma unroll
              for (int i = 0; from + chunk > 0 && i < 4; ++i) dot.at[i] += total->at[i];
              *total = dot;
            }
          }
        } else {
          // Entries without a point have no pixels.
          const auto dot_with = [&](int entry) {
            const auto at = staged.corners.at[entry];
            Loaded<T, kVec> pixel[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              pixel[i] = load_if(active && at.at[i] != Corner::kNone, source + at.at[i]);
            }
            Acc dot[4] = {};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
              for (int c = 0; c < kVec; ++c) dot[i] += grad[c] * pixel[i][c];
            }
            return sum_four_ways(dot, teams.lane);
          };
          const auto keep = [&](int entry, Acc sum) {
            Acc& total = dots[entry].at[lane & 3];
            total = from == 0 ? sum : total + sum;
          };
          const int entries = count * teams.count(), step = splits * teams.count();
#pragma unroll 1
          for (int first_entry = 0; first_entry < entries;
               first_entry += kAtOnce<T, Points> * step) {
            int entry = first_entry + split * teams.count() + teams.team();
            Acc sum = dot_with(entry);
            if constexpr (kAtOnce<T, Points> == 1) {
              for (int by = 4; by < lanes; by *= 2) sum += __shfl_xor_sync(kAllLanes, sum, by);
              if (lane < 4) keep(entry, sum);
            } else {
              const Acc other = dot_with(entry + step);
              if (lanes == 4) {
                keep(entry + step, other);
              } else {  // the second four lanes sum up the second point
                const bool second = lane & 4;
                const Acc given = __shfl_xor_sync(kAllLanes, second ? sum : other, 4);
                sum = (second ? other : sum) + given;
                if (second) entry += step;
                for (int by = 8; by < lanes; by *= 2) sum += __shfl_xor_sync(kAllLanes, sum, by);
              }
              if (lane < 8) keep(entry, sum);
            }
          }
        }
      }
      if constexpr (!kTwo) add_to_value();
      __syncwarp();
      if constexpr (kTwo) {
        Sample<Acc> gradient[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (i >= own_points) continue;
          const int entry = teams.lane + i * kSecond;
          Footprint<Acc> foot;
          const auto fractions = staged.fractions[entry];
          foot.right = fractions.at[0];
          foot.down = fractions.at[1];
#pragma unroll
          for (int j = 0; j < 4; ++j) foot.on[j] = two_points >> (4 * i + j) & 1;
          gradient[i] = point_gradient(foot, levels.level[two_points >> (8 * i + 8) & 255],
                                       two_weights.at[i], dots[entry].at);
        }
        if (stages) {
          const auto query = points.open_at(problem, first_point, staged_query);
          gradients.set_two(query.first_point + k_staged, gradient, own_points > 1);
        }
        if (problem.points > each * teams.lanes()) {  // of the next points
          const int next = first + each * teams.lanes();
          two_points =
              levels_of_two((next < problem.points ? next : 0) + each * teams.round_of(teams.lane));
        }
      } else if (stages) {
        const int k = kKeepsFootprints<Acc> ? k_staged : recomputed(k_staged);
        const auto& query = staged.query[slot];
        Footprint<Acc> foot;
        Acc weight;
        if constexpr (kKeepsFootprints<Acc>) {
          weight = staged.foot[teams.lane].restore(foot, level);
        } else {
          level = level_of(k, 0, levels);
          const auto location = points.location(query, k, level, levels);
          weight = Points::kFused ? staged.weight[teams.lane] : points.weight(query, k);
          find_pixels<int64_t>(foot, location.at[0], location.at[1], levels.level[level],
                               mask_of(table, problem, part.batch));
        }
        const auto gradient =
            point_gradient(foot, levels.level[level], weight, dots[teams.lane].at);
        const int64_t point = query.first_point + k;
        if constexpr (Points::kFused) {
          const bool empty = levels.level[level].height == 0;
          const Acc across = points.step_of(query.item, level, levels, 0);
          const Acc along = points.step_of(query.item, level, levels, 1);
          const auto moved = points.offset(point);
          Acc by_x = gradient.x * across, by_y = gradient.y * along;
          if (points.rotated()) {
            by_x += gradient.y * points.step_across(query.item, level, levels, 1);
            by_y += gradient.x * points.step_across(query.item, level, levels, 0);
            staged.corners.weight[teams.lane] = {gradient.x * moved.at[1], gradient.y * moved.at[0],
                                                 Acc(0), Acc(0)};
          }
          gradients.set_offset(point, empty ? Acc(0) : by_x, empty ? Acc(0) : by_y);
          dots[teams.lane] = {gradient.x, gradient.y, gradient.x * moved.at[0],
                              gradient.y * moved.at[1]};
          if constexpr (!kRecomputesMean<Acc>) mean += weight * gradient.weight;
          if (kept) {
            staged.by_weight[k * teams.count() + slot] = gradient.weight;
          } else {
            gradients.by_weight[point] = gradient.weight;
          }
        } else {
          gradients.set(point, gradient);
        }
      }
      if constexpr (Points::kFused) {
        __syncwarp();
        if (mine && gradients.reference_parts) {
          add_reference_parts(problem, levels, points, staged, teams, part.head, first, count,
                              level_of(first, 0, levels), gradients.reference_parts);
        }
      }
    }
    if constexpr (Points::
                      kFused) {  // through the softmax; each lane has the points it staged above
      const auto& query = staged.query[slot];
      if constexpr (kRecomputesMean<Acc>) {
#pragma unroll 1
        for (int k = teams.round_of(teams.lane); present && k < problem.points;
             k += teams.lanes()) {
          mean += points.weight(query, k) * gradients.by_weight[query.first_point + k];
        }
      }
      for (int step = teams.count(); step < kWarp; step *= 2) {
        mean += __shfl_xor_sync(kAllLanes, mean, step);
      }
#pragma unroll 1
      for (int k = teams.round_of(teams.lane); present && k < problem.points; k += teams.lanes()) {
        const int64_t point = query.first_point + k;
        const Acc by_weight =
            kept ? staged.by_weight[k * teams.count() + slot] : gradients.by_weight[point];
        gradients.set_logit(point, points.weight(query, k) * (by_weight - mean));
      }
    }
  }
  if constexpr (kRounds<T, Points> && kRoundsLast) {
    if (rounding.sums) rounding.run();
  }
}

}  // namespace deform_attn
