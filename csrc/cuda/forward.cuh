// The forward kernel: the output from value and sampling points.
//
// After any edit: make kernels traffic
#pragma once

#include "points.cuh"

namespace deform_attn {

// A block works on `positions` queries of one head, a team of lanes on each query. Each lane stages the
// corners of points of query i % teams in shared memory; then each team reads those of its query.
template <typename T, int kVec, typename Offset, typename Points>
__global__ void __launch_bounds__(kBlock, 4)
    forward_teams(Problem problem, LevelTable table, Points points, const T* __restrict__ value,
                  T* __restrict__ output, int positions, int lane_bits) {
  using Acc = AccOf<T>;
  __shared__ BlockLevels levels;
  __shared__ Part part;  // not in registers: the pixels need them
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
