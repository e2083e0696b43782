// The levels in shared memory, and the order in which a kernel processes the queries.
//
//   BlockLevels    the levels of a call, in shared memory; an invalid level is empty
//   read_levels    fills it, from the kernel's parameter or from tensors on the device
//   query_at       the query at a position of the order
//
// After any edit: make kernels traffic
#pragma once

#include "../problem.h"
#include "vec.cuh"

namespace deform_attn {

struct BlockLevels {
  Level level[kMaxLevels];
  Pack<float, 2> pixel[kMaxLevels];  // 1 / (width, height); where read_levels has kPixels
  int first_point[kMaxLevels + 1];
  bool queries_are_pixels;  // query q is row q of value, as in an encoder

  template <bool kPixels>
  __device__ void set(int l, const Level& to) {
    level[l] = to;
    if constexpr (!kPixels) return;
    pixel[l] = {1 / static_cast<float>(to.width), 1 / static_cast<float>(to.height)};
  }
};

HOST_DEVICE int64_t area(const Level& level) { return int64_t{level.height} * level.width; }

// The table with its levels fitted by the host, where none is on the device.
inline LevelTable fitted_table(const LevelTable& table, const Problem& problem) {
  LevelTable found = table;
  if (table.shapes || table.starts) return found;
  int64_t next = 0;
  bool in_line = true;
  for (int l = 0; l < table.count; ++l) {
    const Level shape = fitted(0, table.height[l], table.width[l], problem.rows);
    const Level level =
        fitted(table.start[l] < 0 ? next : table.start[l], shape.height, shape.width, problem.rows);
    in_line = in_line && level.height > 0 && level.start == next;
    found.start[l] = level.start;
    found.height[l] = level.height;
    found.width[l] = level.width;
    next += area(shape);
  }
  found.is_fitted = true;
  found.queries_are_pixels = in_line && table.count > 0 && next == problem.rows &&
                             problem.queries == problem.rows && problem.rows < (int64_t{1} << 31);
  return found;
}

// Fills `levels`. Called by every thread of the block; ends with a barrier.
template <bool kPixels>
__device__ void read_levels(const LevelTable& table, const Problem& problem, BlockLevels& levels) {
  if (table.is_fitted) {
#pragma unroll 1
    for (int l = threadIdx.x; l <= table.count; l += blockDim.x) {
      levels.first_point[l] = table.first_point[l];
      if (l == table.count) break;
      levels.set<kPixels>(
          l, {table.start[l], static_cast<int>(table.height[l]), static_cast<int>(table.width[l])});
    }
    if (threadIdx.x == 0) levels.queries_are_pixels = table.queries_are_pixels;
  } else if (threadIdx.x < kWarp) {
    const int lane = threadIdx.x;
#pragma unroll 1
    for (int l = lane; l < table.count; l += kWarp) {
      const int64_t height = table.shapes ? table.shapes[2 * l] : table.height[l];
      const int64_t width = table.shapes ? table.shapes[2 * l + 1] : table.width[l];
      levels.level[l] = fitted(0, height, width, problem.rows);
    }
#pragma unroll 1
    for (int l = lane; l <= table.count; l += kWarp) levels.first_point[l] = table.first_point[l];
    __syncwarp();
    bool in_line = true;
    for (int first = 0; first < table.count; first += kWarp) {
      const int l = first + lane;
      Level level = {0, 0, 0};
      if (l < table.count) {
        int64_t before = 0;
#pragma unroll 1
        for (int k = 0; k < l; ++k) before += area(levels.level[k]);
        int64_t start = table.starts ? table.starts[l] : table.start[l];
        if (!table.starts && start < 0) start = before;
        level = levels.level[l];
        level = fitted(start, level.height, level.width, problem.rows);
        in_line = in_line && level.height > 0 && level.start == before;
        if (l == table.count - 1) in_line = in_line && before + area(level) == problem.rows;
      }
      __syncwarp();  // the sizes read above are written below
      if (l < table.count) levels.set<kPixels>(l, level);
      __syncwarp();
    }
    in_line = __all_sync(kAllLanes, in_line);
    if (lane == 0) {
      levels.queries_are_pixels = in_line && table.count > 0 && problem.queries == problem.rows &&
                                  problem.rows < (int64_t{1} << 31);
    }
  }
  __syncthreads();
}

constexpr int kBand = 8;  // image rows of a band

// Where the queries are the pixels of the levels, they are processed in bands of kBand image rows,
// column by column: 64 consecutive positions are a tile of 8 x 8 pixels, whose samples share most of
// their pixels. Elsewhere they are processed in order.
__device__ inline int64_t query_at(int64_t position, const BlockLevels& levels, int count) {
  if (!levels.queries_are_pixels) return position;
  int l = count - 1;
  while (levels.level[l].start > position) --l;
  const Level level = levels.level[l];
  const unsigned pixel = static_cast<unsigned>(position - level.start);
  const unsigned width = level.width, height = level.height;
  const unsigned band = pixel / (kBand * width) * kBand;  // its first image row
  const unsigned rows = min(static_cast<unsigned>(kBand), height - band);
  const unsigned inside = pixel - band * width;
  return level.start + int64_t{band + inside % rows} * width + inside / rows;
}

}  // namespace deform_attn
