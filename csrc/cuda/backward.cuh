// Backward kernels: the gradients of value, points and weights from the gradient of the output.
//
//   backward_baseline    a thread per channel, an atomic per channel and pixel: the design of 2020, kept
//                     as the yardstick and as the text to read first
//   backward_teams    gradients of points and weights, or of a layer's offsets and logits, summed in
//                     the lanes. Where kScatter, the gradient of value too, with the widest atomics
//                     there are; elsewhere the pixels that the queries reach
//   backward_gather   the gradient of value without atomics: each tile of pixels gathers from the
//                     queries that reach it, always in the same order
//   sum_heads         what the heads add to the gradient of a layer's reference points
//   round_sums        sums of a 16-bit gradient to its dtype
//
// Scattering suits few queries on large maps, gathering many queries and whoever asks for the same
// bits every time. Free of torch: the tests compile these for a CPU too.
#pragma once

#include "forward.cuh"

namespace deform_attn {

// The gradients that a point's two coordinates and weight get, from the dot products of its four
// pixels with the gradient of the output.
template <typename Acc>
__device__ Sample<Acc> point_gradient(const Footprint<Acc>& foot, const Level& level, Acc weight,
                                      const Acc (&dot)[4]) {
  Sample<Acc> gradient;
  foot.pull_back(dot, gradient.weight, gradient.x, gradient.y);
  gradient.x *= weight * static_cast<Acc>(level.width);
  gradient.y *= weight * static_cast<Acc>(level.height);
  return gradient;
}

// A block per (batch, query, head). The gradient of value is added to `grad_value`, zeros before.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    backward_baseline(Problem problem, LevelTable table, GivenPoints<T> points,
                      const T* __restrict__ value, const T* __restrict__ grad_output,
                      AccOf<T>* __restrict__ grad_value, GivenPointGradients<T> gradients) {
  using Acc = AccOf<T>;
  __shared__ BlockLevels levels;
  __shared__ Acc dots[4][kBlock];
  read_levels(table, problem, levels);
  const int64_t item = blockIdx.x;
  const int head = static_cast<int>(item % problem.heads);
  const int64_t start = problem.value_at(item / problem.heads / problem.queries, 0, head);
  int level = 0;
  for (int k = 0; k < problem.points; ++k) {
    level = level_of(k, level, levels);
    const Sample<Acc> sample = points.at({item * problem.points}, k, level, levels);
    Footprint<Acc> foot;
    foot.place(sample.x, sample.y, levels.level[level].height, levels.level[level].width);
    const auto corner =
        corner_of<Acc, int64_t>(foot, levels.level[level], sample.weight, problem.row_stride());
    Acc dot[4] = {0, 0, 0, 0};
    for (int channel = threadIdx.x; channel < problem.head_dim; channel += blockDim.x) {
      const Acc grad = static_cast<Acc>(grad_output[item * problem.head_dim + channel]);
      for (int i = 0; i < 4; ++i) {
        if (!foot.on[i]) continue;
        const int64_t at = start + corner.at[i] + channel;
        dot[i] += static_cast<Acc>(value[at]) * grad;
        atomicAdd(grad_value + at, corner.weight[i] * grad);
      }
    }
    for (int i = 0; i < 4; ++i) dots[i][threadIdx.x] = dot[i];
    __syncthreads();
    for (unsigned count = blockDim.x; count > 1;) {
      const unsigned half = (count + 1) / 2;
      for (int i = 0; i < 4 && threadIdx.x < count / 2; ++i) {
        dots[i][threadIdx.x] += dots[i][threadIdx.x + half];
      }
      count = half;
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      for (int i = 0; i < 4; ++i) dot[i] = dots[i][0];
      const auto gradient = point_gradient(foot, levels.level[level], sample.weight, dot);
      gradients.set(item * problem.points + k, gradient);
    }
    __syncthreads();
  }
}

// Pixels from `low` to `high`, both (x, y) and on it; empty where high < low.
struct alignas(16) Rectangle {
  int low[2], high[2];
};

__device__ inline int64_t runs_of(const Problem& problem, int run) {
  return (problem.queries + run - 1) / run;
}

// bounds [batch, heads, levels, runs]: the columns and rows of pixels that each `run` queries touch,
// one after the other in the order of visits: all of a block, or one. The warps of the block take the
// levels by turns, a lane per query; the locations are still in the cache. x before y: both at a time
// make registers of the kernel spill.
template <typename Points>
__device__ void bound_queries(const Problem& problem, const BlockLevels& levels,
                              const Points& points, const Part& part, int run, Rectangle* bounds) {
  const int lane = threadIdx.x % kWarp;
  for (int l = threadIdx.x / kWarp; l < problem.levels; l += blockDim.x / kWarp) {
    const int64_t plane = (part.batch * problem.heads + part.head) * problem.levels + l;
    Rectangle* const to = bounds + plane * runs_of(problem, run) + part.first / run;
#pragma unroll 1
    for (int axis = 0; axis < 2; ++axis) {
      const int size = axis ? levels.level[l].height : levels.level[l].width;
      int low = size, high = -1;
#pragma unroll 1
      for (int i = lane; i < part.count; i += kWarp) {
        if (run == 1) low = size, high = -1;
        const int64_t at = query_at(part.first + i, levels, problem.levels);
        const auto query = points.find(problem, part.batch, at, part.head);
#pragma unroll 1
        for (int k = levels.first_point[l]; k < levels.first_point[l + 1]; ++k) {
          const auto along = points.along(query, k, l, levels, axis);
          using Acc = std::decay_t<decltype(along)>;
          int pixel;
          Acc fraction;
          if (!pixel_of<Numbers<Acc>>(along, size, pixel, fraction)) continue;
          low = min(low, max(pixel, 0));
          high = max(high, min(pixel + 1, size - 1));
        }
        if (run == 1) to[i].low[axis] = low, to[i].high[axis] = high;
      }
      if (run == 1) continue;
      for (int step = kWarp / 2; step > 0; step /= 2) {
        low = min(low, __shfl_xor_sync(kAllLanes, low, step));
        high = max(high, __shfl_xor_sync(kAllLanes, high, step));
      }
      if (lane == 0) to->low[axis] = low, to->high[axis] = high;
    }
  }
}

// The same as a function of its own: inlined into a kernel for a narrow dtype, it makes registers
// spill; apart from one for double, it does so itself.
template <typename Points>
__device__ __noinline__ void bound_queries_apart(Problem problem, const BlockLevels& levels,
                                                 Points points, const Part& part, int run,
                                                 Rectangle* bounds) {
  bound_queries(problem, levels, points, part, run, bounds);
}

// Numbers of a layer's points that a warp keeps in shared memory.
template <typename Acc>
constexpr int kKept = sizeof(Acc) == 8 ? 32 : 128;

// What the lanes of a warp share: 32 points at a time, each staged by one lane. All here and nothing
// in registers, which the pixels and the gradient of the output need.
template <typename Acc, typename Offset, typename Points>
struct Staged {
  Corner<Acc, Offset> corner[kWarp];
  Acc dot[kWarp]
         [4];  // of the four pixels with the gradient of the output; then of a layer's point:
               // its gradients by x and y, and the same times its offset
  typename Points::Query query[kWarp / 4];  // of each team, which has 4 lanes or more
  int64_t output_at[kWarp / 4];             // of each team
  Acc weight[Points::kFused ? kWarp : 1];   // of a layer's points, an exponential each
  Acc by_weight[Points::kFused ? kKept<Acc> : 1];
};

// Adds the points of one pass, `first` to first + count of a query, to what the head adds to the
// gradient of the query's reference points. The lanes of the query's team take its numbers by turns,
// each always the same.
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
        sum += staged.dot[(k - first) * teams.count() + teams.team()][j];
      }
      if (levels.level[level].height == 0) sum = 0;
      if (j >= 2) sum *= portion;
      Acc* const to = row + (shared ? 0 : level * size) + j;
      if (begin < end) *to = begun ? *to + sum : sum;
    }
  }
}

// Works as `forward_teams` does, on the same blocks. `grad_value` is added to and `bounds` is null
// where kScatter; elsewhere `grad_value` is not touched and `bounds` is written, unless it is null:
// nobody wants the gradient of value.
template <typename T, int kVec, typename Offset, bool kScatter, typename Points>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 8 ? kLeastBlocks : 4)
    backward_teams(Problem problem, LevelTable table, Points points, const T* __restrict__ value,
                   const T* __restrict__ grad_output, AccOf<T>* __restrict__ grad_value,
                   typename Points::Gradients gradients, Rectangle* __restrict__ bounds, int run,
                   int positions, int lane_bits) {
  using Acc = AccOf<T>;
  constexpr int kWidth = kAtomicWidth<Acc, kVec>;
  __shared__ BlockLevels levels;
  __shared__ Part part;
  __shared__ Staged<Acc, Offset, Points> all_staged[kBlock / kWarp];
  if (threadIdx.x == 0) part = part_of(blockIdx.x, problem, positions, problem.head_dim);
  read_levels(table, problem, levels);

  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Teams teams = {lane_bits, static_cast<int>(threadIdx.x % kWarp)};
  auto& staged = all_staged[warp];

  for (int turn = warp * teams.count(); turn < part.count; turn += warps * teams.count()) {
    const int staging = turn + teams.lane % teams.count();
    const int mine = turn + teams.team();
    __syncwarp();
    const int64_t staged_query =
        staging < part.count ? query_at(part.first + staging, levels, table.count) : -1;
    const auto opened = points.open(problem, part.batch, staged_query, part.head, teams.count());
    if (teams.lane < teams.count()) {
      staged.query[teams.lane] = opened;
      staged.output_at[teams.lane] =
          staged_query < 0 ? 0 : problem.output_at(part.batch, staged_query, part.head);
    }
    // The place of the gradient by the weight of a point that this lane stages.
    [[maybe_unused]] const auto by_weight = [&](int k) -> Acc& {
      if constexpr (Points::kFused) {
        if (problem.points * teams.count() > kKept<Acc>) {
          return gradients.by_weight[staged.query[teams.lane % teams.count()].first_point + k];
        }
      }
      return staged.by_weight[k * teams.count() + teams.lane % teams.count()];
    };
    int level = 0;
    [[maybe_unused]] Acc mean = 0;  // of a layer: of the gradients by weight, weighted
    for (int first = 0; first < problem.points; first += teams.lanes()) {
      const int k_staged = first + teams.lane / teams.count();
      __syncwarp();
      const auto& query = staged.query[teams.lane % teams.count()];
      const bool stages = query.first_point >= 0 && k_staged < problem.points;
      if (stages) {
        level = level_of(k_staged, level, levels);
        const Sample<Acc> sample = points.at(query, k_staged, level, levels);
        Footprint<Acc> foot;
        foot.place(sample.x, sample.y, levels.level[level].height, levels.level[level].width);
        staged.corner[teams.lane] =
            corner_of<Acc, Offset>(foot, levels.level[level], sample.weight, problem.row_stride());
        if constexpr (Points::kFused) staged.weight[teams.lane] = sample.weight;
#pragma unroll
        for (int i = 0; i < 4; ++i) staged.dot[teams.lane][i] = 0;
      }
      __syncwarp();

      const int count = min(teams.lanes(), problem.points - first);
      const int64_t output_at = mine < part.count ? staged.output_at[teams.team()] : 0;
      for (int from = 0; from < problem.head_dim; from += teams.lanes() * kVec) {
        const int channel = from + teams.channel_lane() * kVec;
        const bool active = mine < part.count && channel < problem.head_dim;
        const auto grad = load_if<kVec>(active, grad_output + output_at + channel);
        const T* const source = value + problem.value_at(part.batch, 0, part.head) + channel;
#pragma unroll 1
        for (int k = 0; k < count; ++k) {
          const int entry = k * teams.count() + teams.team();
          Pack<T, kVec> pixel[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const Offset at = active ? staged.corner[entry].at[i] : Offset{-1};
            pixel[i] = load_if<kVec>(at >= 0, source + at);
          }
          Acc dot[4] = {};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int c = 0; c < kVec; ++c) {
              dot[i] += static_cast<Acc>(grad.at[c]) * static_cast<Acc>(pixel[i].at[c]);
            }
          }
          const Acc sum = sum_four_ways(dot, teams.lane, teams.lanes());
          if (mine < part.count && teams.channel_lane() < 4) {
            staged.dot[entry][teams.channel_lane()] += sum;
          }
        }
      }
      // Neighbouring lanes add to neighbouring addresses, however wide the atomics are.
      for (int from = 0; kScatter && mine < part.count && from < problem.head_dim;
           from += teams.lanes() * kVec) {
        const auto channel_of = [&](int c) {
          return from + (c / kWidth * teams.lanes() + teams.channel_lane()) * kWidth;
        };
        Pack<T, kVec> grad;
#pragma unroll
        for (int c = 0; c < kVec; c += kWidth) {
          const auto some = load_if<kWidth>(channel_of(c) < problem.head_dim,
                                            grad_output + output_at + channel_of(c));
#pragma unroll
          for (int j = 0; j < kWidth; ++j) grad.at[c + j] = some.at[j];
        }
        Acc* const target = grad_value + problem.value_at(part.batch, 0, part.head);
#pragma unroll 1
        for (int k = 0; k < count; ++k) {
          const auto& corner = staged.corner[k * teams.count() + teams.team()];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (corner.at[i] < 0) continue;
            Acc* const to = target + corner.at[i];
#pragma unroll
            for (int c = 0; c < kVec; c += kWidth) {
              if (channel_of(c) >= problem.head_dim) break;
              Acc term[kWidth];
#pragma unroll
              for (int j = 0; j < kWidth; ++j) {
                term[j] = corner.weight[i] * static_cast<Acc>(grad.at[c + j]);
              }
              atomic_add<kWidth>(to + channel_of(c), term);
            }
          }
        }
      }
      __syncwarp();
      if (stages) {  // the point once more: registers are few, its numbers are in the cache
        const auto location = points.location(query, k_staged, level, levels);
        const Acc weight =
            Points::kFused ? staged.weight[teams.lane] : points.weight(query, k_staged);
        Footprint<Acc> foot;
        foot.place(location.at[0], location.at[1], levels.level[level].height,
                   levels.level[level].width);
        const auto gradient =
            point_gradient(foot, levels.level[level], weight, staged.dot[teams.lane]);
        const int64_t point = query.first_point + k_staged;
        if constexpr (Points::kFused) {
          const bool empty = levels.level[level].height == 0;
          const Acc across = points.step_of(query.item, level, levels, 0);
          const Acc along = points.step_of(query.item, level, levels, 1);
          const auto moved = points.offset(point);
          gradients.set_offset(point, empty ? Acc(0) : gradient.x * across,
                               empty ? Acc(0) : gradient.y * along);
          staged.dot[teams.lane][0] = gradient.x;
          staged.dot[teams.lane][1] = gradient.y;
          staged.dot[teams.lane][2] = gradient.x * moved.at[0];
          staged.dot[teams.lane][3] = gradient.y * moved.at[1];
          mean += weight * gradient.weight;
          by_weight(k_staged) = gradient.weight;
        } else {
          gradients.set(point, gradient);
        }
      }
      if constexpr (Points::kFused) {
        __syncwarp();
        if (mine < part.count && gradients.reference_parts) {
          add_reference_parts(problem, levels, points, staged, teams, part.head, first, count,
                              level_of(first, 0, levels), gradients.reference_parts);
        }
      }
    }
    if constexpr (Points::kFused) {  // the softmax: each lane has staged the same points as above
      for (int step = teams.count(); step < kWarp; step *= 2) {
        mean += __shfl_xor_sync(kAllLanes, mean, step);
      }
      const auto& query = staged.query[teams.lane % teams.count()];
#pragma unroll 1
      for (int k = teams.lane / teams.count(); query.first_point >= 0 && k < problem.points;
           k += teams.lanes()) {
        gradients.set_logit(query.first_point + k, points.weight(query, k) * (by_weight(k) - mean));
      }
    }
  }
  if constexpr (!kScatter) {
    if (!bounds) return;
    if constexpr (sizeof(T) == 8) {
      bound_queries(problem, levels, points, part, run, bounds);
    } else {
      bound_queries_apart(problem, levels, points, part, run, bounds);
    }
  }
}

// backward_gather: a block owns a tile of kTileHeight x kTileWidth pixels of one head and 32 channels.
constexpr int kGatherWarps = 8;
constexpr int kTileHeight = 5;
template <typename T>
constexpr int kTileWidth = sizeof(T) == 8 ? 3 : 6;  // 30 KB of sums: three blocks in 100 KB

struct Tile {
  int level;
  int x, y;  // of its first pixel
};

// Tile `index` of all levels, the last level first: its few tiles gather from as many points as the
// many of the first, and should not be what all others have to wait for. level -1: no such tile.
template <int kWidth>
__device__ Tile tile_at(int64_t index, const BlockLevels& levels, int count) {
  for (int l = count - 1; l >= 0; --l) {
    const int64_t across = (int64_t{levels.level[l].width} + kWidth - 1) / kWidth;
    const int64_t along = (int64_t{levels.level[l].height} + kTileHeight - 1) / kTileHeight;
    if (index < across * along) {
      return {l, static_cast<int>(index % across) * kWidth,
              static_cast<int>(index / across) * kTileHeight};
    }
    index -= across * along;
  }
  return {-1, 0, 0};
}

// The place in the tile of pixel (x, y) of level l; -1: none. Where levels overlap, a pixel of another
// level is the pixel of the tile's level that has the same row.
template <int kWidth>
__device__ int slot_in(const Tile& tile, int l, int x, int y, const BlockLevels& levels) {
  if (l != tile.level) {
    const Level& other = levels.level[l];
    const Level& home = levels.level[tile.level];
    const int64_t row = other.start + int64_t{y} * other.width + x - home.start;
    if (row < 0 || row >= area(home)) return -1;
    y = static_cast<int>(row / home.width);
    x = static_cast<int>(row % home.width);
  }
  x -= tile.x;
  y -= tile.y;
  return x >= 0 && x < kWidth && y >= 0 && y < kTileHeight ? y * kWidth + x : -1;
}

// Whether one of the first `count` levels has the row of `value`.
__device__ inline bool in_a_level(int64_t row, const BlockLevels& levels, int count) {
  for (int l = 0; l < count; ++l) {
    const Level& level = levels.level[l];
    if (row >= level.start && row < level.start + area(level)) return true;
  }
  return false;
}

// The row of `value` of a place in the tile; -1: off the map, or owned by an earlier level.
template <int kWidth>
__device__ int64_t owned_row(const Tile& tile, int slot, const BlockLevels& levels) {
  const Level& home = levels.level[tile.level];
  const int x = tile.x + slot % kWidth, y = tile.y + slot / kWidth;
  if (x >= home.width || y >= home.height) return -1;
  const int64_t row = home.start + int64_t{y} * home.width + x;
  return in_a_level(row, levels, tile.level) ? -1 : row;
}

// The place of the n-th bit that is set, n from 0.
__device__ inline int nth_bit(unsigned bits, int n) {
  for (; n > 0; --n) bits &= bits - 1;
  return __ffs(bits) - 1;
}

__device__ inline bool overlap(const Level& a, const Level& b) {
  return a.start < b.start + area(b) && b.start < a.start + area(a);
}

// Every warp has its own sums of the whole tile and gathers from every kGatherWarps-th run of
// queries; then the sums of the warps are added in their order. No atomic and no race: the same
// bits every time. Levels may overlap: the first level that a row of `value` belongs to owns it, and
// its tiles gather the points of the other levels too. Rows of no level get zeros.
template <typename T, typename Points>
__global__ void __launch_bounds__(kGatherWarps* kWarp, kLeastBlocks)
    backward_gather(Problem problem, LevelTable table, Points points,
                    const T* __restrict__ grad_output, const Rectangle* __restrict__ bounds,
                    T* __restrict__ grad_value, int run) {
  using Acc = AccOf<T>;
  constexpr int kWidth = kTileWidth<T>;
  __shared__ BlockLevels levels;
  __shared__ Acc sums[kGatherWarps][kTileHeight * kWidth][kWarp];
  __shared__ Tile tile;
  __shared__ int64_t batch;
  __shared__ int head, first_channel;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int pieces = (problem.head_dim + kWarp - 1) / kWarp;
  const unsigned planes = static_cast<unsigned>(problem.batch * problem.heads * pieces);
  if (threadIdx.x == 0) {
    const int64_t plane = blockIdx.x % planes;
    first_channel = static_cast<int>(plane % pieces) * kWarp;
    head = static_cast<int>(plane / pieces % problem.heads);
    batch = plane / pieces / problem.heads;
  }
  read_levels(table, problem, levels);
  const bool on = first_channel + lane < problem.head_dim;
  const int runs = static_cast<int>(runs_of(problem, run));
  const auto row_of = [&](int64_t row) {
    return grad_value + problem.value_at(batch, row, head) + first_channel + lane;
  };

  if (!levels.fill_value) {
    const int64_t step = int64_t{gridDim.x / planes} * kGatherWarps;
    for (int64_t row = int64_t{blockIdx.x / planes} * kGatherWarps + warp; row < problem.rows;
         row += step) {
      if (on && !in_a_level(row, levels, table.count)) *row_of(row) = static_cast<T>(Acc(0));
    }
  }
  for (unsigned index = blockIdx.x / planes;; index += gridDim.x / planes) {
    if (threadIdx.x == 0) tile = tile_at<kWidth>(index, levels, table.count);
    __syncthreads();
    if (tile.level < 0) return;
    for (int i = 0; i < kTileHeight * kWidth; ++i) sums[warp][i][lane] = 0;

    for (int l = 0; l < table.count; ++l) {
      if (!overlap(levels.level[l], levels.level[tile.level])) continue;
      const int count = levels.first_point[l + 1] - levels.first_point[l];  // points of a query
      for (int base = 0; base < runs; base += kGatherWarps * kWarp) {
        bool near = false;
        if (base + lane * kGatherWarps + warp < runs) {
          const Rectangle box = bounds[((batch * problem.heads + head) * table.count + l) * runs +
                                       base + lane * kGatherWarps + warp];
          near = box.low[0] <= box.high[0] &&
                 (l != tile.level || (box.low[0] < tile.x + kWidth && box.high[0] >= tile.x &&
                                      box.low[1] < tile.y + kTileHeight && box.high[1] >= tile.y));
        }
        const unsigned near_runs = __ballot_sync(kAllLanes, near);
        const int total = __popc(near_runs) * run * count;
        // Lanes take the points one after the other: those of a query and level lie in a row.
        for (int item = lane; item - lane < total; item += kWarp) {
          // This lane's point: which pixels of the tile it touches, -1 for those outside.
          int slot[4] = {-1, -1, -1, -1};
          Acc share[4] = {};
          bool hit = false;
          int64_t output_at = 0;
          const int place = item / count;
          const int64_t position =
              item < total
                  ? int64_t{base + nth_bit(near_runs, place / run) * kGatherWarps + warp} * run +
                        place % run
                  : problem.queries;
          if (position < problem.queries) {
            const int64_t query = query_at(position, levels, table.count);
            output_at = problem.output_at(batch, query, head);
            const int k = levels.first_point[l] + item % count;
            const auto location =
                points.location(points.find(problem, batch, query, head), k, l, levels);
            Footprint<Acc> foot;
            foot.place(location.at[0], location.at[1], levels.level[l].height,
                       levels.level[l].width);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (foot.on[i])
                slot[i] = slot_in<kWidth>(tile, l, foot.x + (i & 1), foot.y + (i >> 1), levels);
              hit = hit || slot[i] >= 0;
            }
            if (hit) {  // of most points nothing but the location is read
              const Acc weight = points.weight(points.reopen(problem, batch, query, head), k);
              // not `weight`, which takes more registers: without a slot it is not added anyway
#pragma unroll
              for (int i = 0; i < 4; ++i) share[i] = foot.weight_on_map(i) * weight;
            }
          }
          for (unsigned hits = __ballot_sync(kAllLanes, hit); hits; hits &= hits - 1) {
            const int from = __ffs(hits) - 1;
            const int64_t source = __shfl_sync(kAllLanes, output_at, from);
            const Acc grad =
                on ? static_cast<Acc>(grad_output[source + first_channel + lane]) : Acc(0);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int to = __shfl_sync(kAllLanes, slot[i], from);
              const Acc part = __shfl_sync(kAllLanes, share[i], from);
              if (to >= 0) sums[warp][to][lane] += part * grad;
            }
          }
        }
      }
    }
    __syncthreads();
    for (int i = warp; i < kTileHeight * kWidth; i += kGatherWarps) {
      const int64_t row = owned_row<kWidth>(tile, i, levels);
      if (row < 0 || !on) continue;
      Acc sum = 0;
      for (int w = 0; w < kGatherWarps; ++w) sum += sums[w][i][lane];
      *row_of(row) = static_cast<T>(sum);
    }
    __syncthreads();
  }
}

// parts [B, Q, M, L or 1, size] to grad_reference [B, Q, L or 1, size]: a thread per number. A level
// without points has no part.
template <typename Acc>
__global__ void __launch_bounds__(kBlock)
    sum_heads(Problem problem, LevelTable table, const Acc* __restrict__ parts,
              Acc* __restrict__ grad_reference, int reference_levels, int size) {
  const int row = reference_levels * size;
  const int64_t total = problem.batch * problem.queries * row;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
    const int at = static_cast<int>(i % row), l = at / size;
    const bool none = reference_levels > 1 && table.first_point[l] == table.first_point[l + 1];
    const Acc* const first = parts + i / row * problem.heads * row + at;
    Acc sum = 0;
    for (int head = 0; head < problem.heads && !none; ++head) sum += first[int64_t{head} * row];
    grad_reference[i] = sum;
  }
}

// 16-bit gradients of value are summed in float and rounded once.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    round_sums(const float* __restrict__ sums, T* __restrict__ rounded, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    rounded[i] = static_cast<T>(sums[i]);
  }
}

}  // namespace deform_attn
