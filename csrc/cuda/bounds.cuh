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
__global__ void __launch_bounds__(kBlock, kLeastBlocks)
    bound_queries(Problem problem, LevelTable table, BlockLayout blocks, Points points,
                  Rectangle* __restrict__ bounds, int run) {
  __shared__ BlockLevels levels;
  const Part part = part_of(blockIdx.x, problem, blocks, problem.head_dim);
  read_levels<Points::kReadsPixels>(table, problem, levels);
  const int lane = threadIdx.x % kWarp;
  for (int l = threadIdx.x / kWarp; l < problem.levels; l += blockDim.x / kWarp) {
    const int64_t plane = (part.batch * problem.heads + part.head) * problem.levels + l;
    Rectangle* const to = bounds + plane * runs_of(problem, run) + part.first / run;
    const int size[2] = {levels.level[l].width, levels.level[l].height};
    const Rectangle none = {{size[0], size[1]}, {-1, -1}};
    Rectangle box = none;
#pragma unroll 1
    for (int i = lane; i < part.count; i += kWarp) {
      if (run == 1) box = none;
      const int64_t at = query_at(part.first + i, levels, problem.levels);
      const auto query = points.find(problem, part.batch, at, part.head);
#pragma unroll 1
      for (int k = levels.first_point[l]; k < levels.first_point[l + 1]; ++k) {
        const auto location = points.location(query, k, l, levels);
#pragma unroll
        for (int axis = 0; axis < 2; ++axis) {
          using Acc = std::decay_t<decltype(location.at[axis])>;
          int pixel;
          Acc fraction;
          if (!pixel_of<Numbers<Acc>>(location.at[axis], size[axis], pixel, fraction)) continue;
          box.low[axis] = min(box.low[axis], max(pixel, 0));
          box.high[axis] = max(box.high[axis], min(pixel + 1, size[axis] - 1));
        }
      }
      if (run == 1) to[i] = box;
    }
    if (run == 1) continue;
    for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
      for (int axis = 0; axis < 2; ++axis) {
        box.low[axis] = min(box.low[axis], __shfl_xor_sync(kAllLanes, box.low[axis], step));
        box.high[axis] = max(box.high[axis], __shfl_xor_sync(kAllLanes, box.high[axis], step));
      }
    }
    if (lane == 0) *to = box;
  }
}

}  // namespace deform_attn
