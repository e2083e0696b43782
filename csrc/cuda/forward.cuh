// Forward kernels: the output from value, points and weights.
//
//   forward_baseline   a thread per output number: the design of 2020, kept as the yardstick and as
//                   the text to read first
//   forward_teams   16-byte loads; each point's coordinates are computed once a query and head and
//                   shared by its lanes; neighbouring queries of an encoder run together
//
// Free of torch: the tests compile these for a CPU too.
#pragma once

#include "points.cuh"

namespace deform_attn {

constexpr int kBlock = 256;  // the most threads of a block

// Blocks that are half of a multiprocessor's threads, or more. Kernels whose shared memory leaves no
// room for a fourth where there are 1536, take its registers.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kLeastBlocks = 3;
#else
constexpr int kLeastBlocks = 4;
#endif

template <typename T>
__global__ void __launch_bounds__(kBlock)
    forward_baseline(Problem problem, LevelTable table, GivenPoints<T> points,
                     const T* __restrict__ value, T* __restrict__ output) {
  using Acc = AccOf<T>;
  __shared__ BlockLevels levels;
  read_levels(table, problem, levels);
  const int64_t total = problem.batch * problem.queries * problem.row_stride();
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
    const int channel = static_cast<int>(i % problem.head_dim);
    const int64_t item = i / problem.head_dim;  // (batch, query, head)
    const int head = static_cast<int>(item % problem.heads);
    const int64_t batch = item / problem.heads / problem.queries;
    const T* const source = value + problem.value_at(batch, 0, head) + channel;
    Acc sum = 0;
    for (int l = 0; l < table.count; ++l) {
      const Level level = levels.level[l];
      for (int k = levels.first_point[l]; k < levels.first_point[l + 1]; ++k) {
        const Sample<Acc> sample = points.at({item * problem.points}, k, l, levels);
        Footprint<Acc> foot;
        foot.place(sample.x, sample.y, level.height, level.width);
        const auto corner =
            corner_of<Acc, int64_t>(foot, level, sample.weight, problem.row_stride());
        for (int j = 0; j < 4; ++j) {
          if (foot.on[j]) sum += corner.weight[j] * static_cast<Acc>(source[corner.at[j]]);
        }
      }
    }
    output[i] = static_cast<T>(sum);
  }
}

// A block works on `positions` queries of one head; its warps take them by turns, a team of lanes
// for each query. Points go through shared memory, kStaged a warp at a time: there lane i computes
// points that belong to query i % teams, and every team reads its own.
template <typename T, int kVec, typename Offset, typename Points>
__global__ void __launch_bounds__(kBlock, 4)
    forward_teams(Problem problem, LevelTable table, Points points, const T* __restrict__ value,
                  T* __restrict__ output, int positions, int lane_bits) {
  using Acc = AccOf<T>;
  __shared__ BlockLevels levels;
  __shared__ Part part;  // here and not in registers, which the pixels need
  __shared__ Corner<Acc, Offset> all_corners[kBlock / kWarp][kStaged<Acc>];
  if (threadIdx.x == 0) part = part_of(blockIdx.x, problem, positions, kVec << lane_bits);
  read_levels(table, problem, levels);

  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Teams teams = {lane_bits, static_cast<int>(threadIdx.x % kWarp)};
  Corner<Acc, Offset>* const corners = all_corners[warp];
  const int slots = kStaged<Acc> / teams.count();  // points of a query in one pass
  const int channel = part.channel + teams.channel_lane() * kVec;
  const T* const source = value + problem.value_at(part.batch, 0, part.head) + channel;

  for (int turn = warp * teams.count(); turn < part.count; turn += warps * teams.count()) {
    const int staged = turn + teams.lane % teams.count();
    const auto query =
        points.open(problem, part.batch,
                    staged < part.count ? query_at(part.first + staged, levels, table.count) : -1,
                    part.head, teams.count());
    const int mine = turn + teams.team();
    const bool active = mine < part.count && channel < problem.head_dim;
    Acc sum[kVec] = {};
    int level = 0;
    for (int first = 0; first < problem.points; first += slots) {
      __syncwarp();
      for (int entry = teams.lane; entry < kStaged<Acc>; entry += kWarp) {
        const int k = first + entry / teams.count();
        if (query.first_point < 0 || k >= problem.points) break;
        level = level_of(k, level, levels);
        const Sample<Acc> sample = points.at(query, k, level, levels);
        Footprint<Acc> foot;
        foot.place(sample.x, sample.y, levels.level[level].height, levels.level[level].width);
        corners[entry] =
            corner_of<Acc, Offset>(foot, levels.level[level], sample.weight, problem.row_stride());
      }
      __syncwarp();
      const int count = active ? min(slots, problem.points - first) : 0;
#pragma unroll(sizeof(T) == 4 && sizeof(Offset) == 4 ? 2 : 1)
      for (int k = 0; k < count; ++k) {
        const Corner<Acc, Offset> corner = corners[k * teams.count() + teams.team()];
        Pack<T, kVec> pixel[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          pixel[i] = load_if<kVec>(corner.at[i] >= 0, source + corner.at[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int c = 0; c < kVec; ++c) {
            sum[c] += corner.weight[i] * static_cast<Acc>(pixel[i].at[c]);
          }
        }
      }
    }
    if (active) {
      Pack<T, kVec> result;
#pragma unroll
      for (int c = 0; c < kVec; ++c) result.at[c] = static_cast<T>(sum[c]);
      const int64_t to_query = query_at(part.first + mine, levels, table.count);
      T* const to = output + problem.output_at(part.batch, to_query, part.head) + channel;
      *reinterpret_cast<Pack<T, kVec>*>(to) = result;
    }
  }
}

}  // namespace deform_attn
