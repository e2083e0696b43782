// The forward kernel: the output from value and sampling points.
//
// After any edit: make kernels traffic
#pragma once

#include "points.cuh"

namespace deform_attn {

// Whether pixels that are not on the map are zeros in registers; else what they would add is left out. The
// latter takes a predicate for each pixel, too many for the two points at a time of float32, and in a fused
// call more registers than sm_86, sm_89 and sm_120 have.
template <typename T, typename Points>
constexpr bool kMakesZeros = sizeof(T) >= 4 || (Points::kFused && kLeastBlocks == 3);

// A block works on the queries of its Part, a team of lanes on each. Each lane stages the corners of points
// of query query_of(lane) in shared memory; then each team reads those of its query.
template <typename T, int kVec, typename Offset, typename Points>
__global__ void __launch_bounds__(kBlock, 4)
    forward_teams(Problem problem, LevelTable table, BlockLayout blocks, Points points,
                  const T* __restrict__ value, T* __restrict__ output) {
  using Acc = AccOf<T>;
  using Corner = deform_attn::Corner<Acc, Offset>;
  __shared__ BlockLevels levels;
  __shared__ Corners<Acc, Offset, kStaged<Acc>> all_corners[kBlock / kWarp];
  const Part part = part_of(blockIdx.x, problem, blocks, kVec << blocks.lane_bits);
  read_levels<Points::kReadsPixels>(table, problem, levels);

  const int warp = threadIdx.x / kWarp;
  const Teams teams = {blocks.lane_bits + blocks.split_bits, static_cast<int>(threadIdx.x % kWarp)};
  auto& corners = all_corners[warp];
  const int slots = kStaged<Acc> >> (5 - teams.lane_bits);  // points of a query in one pass
  const int split = teams.channel_lane() >> blocks.lane_bits;
  const int channel = part.channel + (teams.channel_lane() & ((1 << blocks.lane_bits) - 1)) * kVec;
  const auto* const source = reinterpret_cast<const Pack<T, kVec>*>(
      value + problem.value_at(part.batch, 0, part.head) + channel);
  const Offset row_stride = static_cast<Offset>(problem.row_stride() / kVec);

  // Queries are numbered from part.first on. Lane i holds the i-th of the warp.
  const int begin = warp * blocks.warp_positions;
  const int end = min(begin + blocks.warp_positions, part.count);
  int own_query = 0;
  if (begin + teams.lane < end) {
    own_query = static_cast<int>(query_at(part.first + begin + teams.lane, levels, table.count) -
                                 part.first);
  }
  for (int turn = begin; turn < end; turn += teams.count()) {
    const int staged = turn + teams.query_of(teams.lane), mine = turn + teams.team();
    const int staged_query = __shfl_sync(kAllLanes, own_query, staged - begin);
    const auto query = points.open(problem, part, staged_query, staged < end, teams);
    const bool active = mine < end && channel < problem.head_dim;
    Acc sum[kVec] = {};
    int level = 0;
    for (int first = 0; first < problem.points; first += slots) {
      __syncwarp();
      const auto stage = [&](int entry, const Sample<Acc>& sample) {
        Footprint<Acc> foot;
        foot.place(sample.x, sample.y, levels.level[level].height, levels.level[level].width);
        corners.set(entry, corner_of<Acc, Offset>(foot, levels.level[level], sample.weight,
                                                  row_stride, mask_of(table, problem, part.batch)));
      };
      if constexpr (kStaged<Acc> == kWarp) {
        const int k = first + teams.round_of(teams.lane);
        if (staged < end && k < problem.points) {
          level = level_of(k, level, levels);
          stage(teams.lane, points.at(query, k, level, levels));
        }
      } else {  // two neighbouring points a lane, if there are so many
        const int each = problem.points > teams.lanes() ? 2 : 1;
        const int round = each * teams.round_of(teams.lane);
        const int count = min(each, problem.points - first - round);
        if (staged < end && count > 0) {
          const auto two = points.read_two(query, first + round, count == 2);
#pragma unroll 1
          for (int i = 0; i < count; ++i) {
            level = level_of(first + round + i, level, levels);
            stage((round + i) * teams.count() + teams.query_of(teams.lane),
                  points.of_two(query, two, i, level, levels));
          }
        }
      }
      __syncwarp();
      const int count = active ? min(slots, problem.points - first) : 0;
      int entry = split * teams.count() + teams.team();
      Loaded<T, kVec> pixel[4] = {};  // here, so that staging has these registers
#pragma unroll(sizeof(T) == 4 && sizeof(Offset) == 4 ? 2 : 1)
      for (int k = split; k < count; k += 1 << blocks.split_bits) {
        const Corner corner = corners[entry];
        entry += teams.count() << blocks.split_bits;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool there = corner.at.at[i] != Corner::kNone;
          const auto* const from = source + corner.at.at[i];
          if constexpr (kMakesZeros<T, Points>) {
            pixel[i] = load_if(there, from);
          } else {
            load_where(there, from, pixel[i]);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int c = 0; c < kVec; ++c) {
            if constexpr (kMakesZeros<T, Points>) {
              sum[c] += corner.weight.at[i] * pixel[i][c];
            } else {
              add_where(corner.at.at[i] != Corner::kNone, sum[c], corner.weight.at[i], pixel[i][c]);
            }
          }
        }
      }
    }
    for (int step = 1 << blocks.lane_bits; step < teams.lanes(); step *= 2) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) sum[c] += __shfl_xor_sync(kAllLanes, sum[c], step);
    }
    const int my_query = __shfl_sync(kAllLanes, own_query, mine - begin);
    if (active && split == 0) {
      Pack<T, kVec> result;
#pragma unroll
      for (int c = 0; c < kVec; ++c) result.at[c] = static_cast<T>(sum[c]);
      T* const to = output + part.first_output(problem) + my_query * problem.row_stride() + channel;
      *reinterpret_cast<Pack<T, kVec>*>(to) = result;
    }
  }
}

}  // namespace deform_attn
