// backward_gather: the gradient of value without atomics, the same bits every time. Each block owns a
// tile of pixels and gathers from the queries that sample it, always in the same order.
//
// After any edit: make kernels traffic
#pragma once

#include "bounds.cuh"

namespace deform_attn {

// A block owns a tile of kTileHeight x kTileWidth pixels of one head and 32 channels.
constexpr int kGatherWarps = 8;
constexpr int kTileHeight = 5;
template <typename T>
constexpr int kTileWidth = sizeof(T) == 8 ? 3 : 6;  // 30 KB of sums: three blocks in 100 KB

struct Tile {
  int level;
  int x, y;  // of its first pixel
};

// Tile `index` of all levels, the last level first: its few tiles gather from as many points as the many
// tiles of the first level, so they start first. level -1: no such tile.
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

// The place in the tile of pixel (x, y) of level l; -1: not in the tile. Where levels overlap, a pixel of
// another level is the pixel of the tile's level with the same row of value.
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

// Whether one of the first `count` levels contains the row of value.
__device__ inline bool in_a_level(int64_t row, const BlockLevels& levels, int count) {
  for (int l = 0; l < count; ++l) {
    const Level& level = levels.level[l];
    if (row >= level.start && row < level.start + area(level)) return true;
  }
  return false;
}

// The row of value of a place in the tile; -1: outside the level, or owned by an earlier level.
template <int kWidth>
__device__ int64_t owned_row(const Tile& tile, int slot, const BlockLevels& levels) {
  const Level& home = levels.level[tile.level];
  const int x = tile.x + slot % kWidth, y = tile.y + slot / kWidth;
  if (x >= home.width || y >= home.height) return -1;
  const int64_t row = home.start + int64_t{y} * home.width + x;
  return in_a_level(row, levels, tile.level) ? -1 : row;
}

// The position of the n-th set bit, n from 0.
__device__ inline int nth_bit(unsigned bits, int n) {
  for (; n > 0; --n) bits &= bits - 1;
  return __ffs(bits) - 1;
}

__device__ inline bool overlap(const Level& a, const Level& b) {
  return a.start < b.start + area(b) && b.start < a.start + area(a);
}

// Each warp has its own sums of the whole tile and gathers from every kGatherWarps-th run of queries;
// then the sums of the warps are added in order. Levels may overlap: the first level that contains a row
// of value owns it, and its tiles gather the points of the other levels too. Rows of no level are not
// written: `grad_value` is zeros before.
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
  read_levels<Points::kReadsPixels>(table, problem, levels);
  const bool on = first_channel + lane < problem.head_dim;
  const int runs = static_cast<int>(runs_of(problem, run));
  const auto row_of = [&](int64_t row) {
    return grad_value + problem.value_at(batch, row, head) + first_channel + lane;
  };

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
        // Consecutive lanes take consecutive points, which lie next to each other in memory.
        for (int item = lane; item - lane < total; item += kWarp) {
          // The pixels of the tile that this lane's point samples; -1: outside.
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
            find_pixels<int64_t>(foot, location.at[0], location.at[1], levels.level[l],
                                 mask_of(table, problem, batch));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (foot.on[i])
                slot[i] = slot_in<kWidth>(tile, l, foot.x + (i & 1), foot.y + (i >> 1), levels);
              hit = hit || slot[i] >= 0;
            }
            if (hit) {  // few points hit the tile: the weight is read for these only
              const Acc weight = points.weight(points.reopen(problem, batch, query, head), k);
              // weight() takes more registers, and a corner without a slot is not added
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

}  // namespace deform_attn
