// backward_teams: the gradients of points and weights (or of the offsets and logits of a fused call),
// and the gradient of value by atomics. Without kScatter: the rectangles for backward_gather instead of
// the gradient of value.
//
// After any edit: make kernels traffic
#pragma once

#include "bounds.cuh"

namespace deform_attn {

// Gradients by weight that a warp of a fused call keeps in shared memory.
template <typename Acc>
constexpr int kKept = sizeof(Acc) == 8 ? 32 : 128;

// What the lanes of a warp share: 32 points at a time, each staged by one lane. In shared memory and not
// in registers, which the pixels and grad_output need.
template <typename Acc, typename Offset, typename Points>
struct Staged {
  Corner<Acc, Offset> corner[kWarp];
  // The dot products of the four pixels with grad_output; later, in a fused call, the gradients by x and
  // y of the point and the same times its offset.
  Acc dot[kWarp][4];
  typename Points::Query query[kWarp / 4];  // of each team, which has 4 lanes or more
  int64_t output_at[kWarp / 4];             // of each team
  Acc weight[Points::kFused ? kWarp : 1];   // of a fused call, where it takes an exponential
  Acc by_weight[Points::kFused ? kKept<Acc> : 1];
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
        sum += staged.dot[(k - first) * teams.count() + teams.team()][j];
      }
      if (levels.level[level].height == 0) sum = 0;
      if (j >= 2) sum *= portion;
      Acc* const to = row + (shared ? 0 : level * size) + j;
      if (begin < end) *to = begun ? *to + sum : sum;
    }
  }
}

// Divides the work as forward_teams does. With kScatter it adds to `grad_value`, zeros before. Without, it
// writes `bounds` instead, unless that is null.
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
    // Where this lane keeps the gradient by the weight of a point that it stages.
    [[maybe_unused]] const auto by_weight = [&](int k) -> Acc& {
      if constexpr (Points::kFused) {
        if (problem.points * teams.count() > kKept<Acc>) {
          return gradients.by_weight[staged.query[teams.lane % teams.count()].first_point + k];
        }
      }
      return staged.by_weight[k * teams.count() + teams.lane % teams.count()];
    };
    int level = 0;
    [[maybe_unused]] Acc mean = 0;  // of a fused call: the weighted mean of the gradients by weight
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
      // Neighbouring lanes add to neighbouring addresses, for every width of atomics.
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
      if (stages) {  // computes the point again, which takes fewer registers than keeping it
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
    if constexpr (Points::
                      kFused) {  // through the softmax; each lane has the points it staged above
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

}  // namespace deform_attn
