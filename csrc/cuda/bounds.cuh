// The rectangles of pixels that queries sample, for backward_gather.
//
// After any edit: make kernels traffic
#pragma once

#include "points.cuh"

namespace deform_attn {

// The pixels from `low` to `high`, both (x, y) and inclusive; empty where high < low.
struct alignas(16) Rectangle {
  int low[2], high[2];
};

__device__ inline int64_t runs_of(const Problem& problem, int run) {
  return (problem.queries + run - 1) / run;
}

// Fills bounds [batch, heads, levels, runs]: the pixels that each run of queries samples. A run is `run`
// consecutive positions of query_at: all of the block's, or one. The warps of the block share the
// levels, a lane works on a query.
template <typename T, typename Points>
__global__ void __launch_bounds__(kBlock, 2)
    bound_queries(Problem problem, LevelTable table, Blocks blocks, Points points,
                  Rectangle* __restrict__ bounds, int run) {
  __shared__ BlockLevels levels;
  const Part part = part_of(blockIdx.x, problem, blocks, problem.head_dim);
  read_levels(table, problem, levels);
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

}  // namespace deform_attn
