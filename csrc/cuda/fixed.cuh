// Sums of the gradient of value in 64-bit fixed point, which do not depend on the order of the terms.
//
//   TermBound      what bounds the terms of an image and head
//   FixedPoint     their scale
//   bound_terms    fills the TermBounds of a call
//   scatter_fixed  adds each term to memory; backward_tiles adds up those of a tile of queries before
//   round_fixed    the sums to the gradient
//
// The terms of an image and head share a power of two as their scale, so that a sum of all of them fits.
// With 2**n points of a head, a term is rounded to 2**(n - 62) of the largest possible one; in a float, the
// largest one itself is rounded to 2**-24. Where a weight or a gradient of the output is not finite, the
// gradient of value of its image and head is NaN.
//
// After any edit: make kernels traffic
#pragma once

#include <climits>

#include "points.cuh"

namespace deform_attn {

// Bits of floats without their signs, which have the order of the numbers. Zeros before bound_terms.
struct TermBound {
  unsigned weight, gradient;

  // Less than 2**exponent; infinity and NaN have the largest exponent.
  __device__ static int exponent(unsigned bits) { return static_cast<int>(bits >> 23) - 126; }
};

// 2**exponent, for -126 <= exponent <= 127.
__device__ inline float power_of_two(int exponent) {
  const unsigned bits = static_cast<unsigned>(exponent + 127) << 23;
  float number;
  memcpy(&number, &bits, sizeof(number));
  return number;
}

struct FixedPoint {
  static constexpr int kNone = INT_MIN;
  const TermBound* bounds;  // [batch * heads]
  int sum_bits;             // a sum has at most 2**sum_bits terms

  // A term of an image and head is multiplied by 2**exponent; kNone: there is no such number. The weights
  // alone must not become infinite.
  __device__ int exponent(int64_t plane) const {
    const int weight = TermBound::exponent(bounds[plane].weight);
    const int gradient = TermBound::exponent(bounds[plane].gradient);
    if (max(weight, gradient) > 128) return kNone;
    const int most = min(126, 120 - weight);
    const int found = min(most, 62 - sum_bits - weight - gradient);
    return found < -126 ? kNone : found;
  }
};

inline FixedPoint fixed_point(const Problem& problem, const TermBound* bounds) {
  FixedPoint found = {bounds, 0};
  while ((int64_t{1} << found.sum_bits) < problem.queries * problem.points) ++found.sum_bits;
  return found;
}

__device__ inline unsigned magnitude(float number) {
  unsigned bits;
  memcpy(&bits, &number, sizeof(bits));
  return bits & 0x7fffffffu;
}

// Blocks blockIdx.x, blockIdx.x + images * heads ... work on the same image and head, a warp on a query. Of a
// fused call the kernel reads what `open` has kept, which is finite where the weights are at most 1.
template <typename T, typename Points>
__global__ void __launch_bounds__(kBlock)
    bound_terms(Problem problem, Points points, const T* __restrict__ grad_output,
                TermBound* __restrict__ bounds) {
  const unsigned planes = static_cast<unsigned>(problem.batch * problem.heads);
  const unsigned plane = blockIdx.x % planes;
  const int64_t batch = plane / problem.heads;
  const int head = static_cast<int>(plane % problem.heads);
  const int lane = threadIdx.x % kWarp;
  const int64_t step = int64_t{gridDim.x / planes} * (kBlock / kWarp);
  TermBound bound = {0, 0};
#pragma unroll 1
  for (int64_t query = int64_t{blockIdx.x / planes} * (kBlock / kWarp) + threadIdx.x / kWarp;
       query < problem.queries; query += step) {
    const T* const gradient = grad_output + problem.output_at(batch, query, head);
    for (int c = lane; c < problem.head_dim; c += kWarp) {
      bound.gradient = max(bound.gradient, magnitude(static_cast<float>(gradient[c])));
    }
    const auto opened = points.reopen(problem, batch, query, head);
    if constexpr (Points::kFused) {
      bound.weight = max(bound.weight, max(magnitude(1), magnitude(opened.inverse_sum)));
    } else {
      for (int k = lane; k < problem.points; k += kWarp) {
        bound.weight = max(bound.weight, magnitude(points.weight(opened, k)));
      }
    }
  }
  for (int by = kWarp / 2; by > 0; by /= 2) {
    bound.weight = max(bound.weight, __shfl_xor_sync(kAllLanes, bound.weight, by));
    bound.gradient = max(bound.gradient, __shfl_xor_sync(kAllLanes, bound.gradient, by));
  }
  if (lane == 0) {
    atomicMax(&bounds[plane].weight, bound.weight);
    atomicMax(&bounds[plane].gradient, bound.gradient);
  }
}

__device__ inline void add_term(int64_t& sum, float weight, float number) {
  sum += llrintf(weight * number);
}

// A warp works on a query of its Part at a time: each lane stages a point, then each lane adds the terms of its
// channels. `grad_value`: zeros before.
template <typename T, typename Points>
__global__ void __launch_bounds__(kBlock)
    scatter_fixed(Problem problem, LevelTable table, BlockLayout blocks, Points points,
                  const T* __restrict__ grad_output, int64_t* __restrict__ grad_value,
                  FixedPoint fixed) {
  using Corner = deform_attn::Corner<float, int64_t>;
  __shared__ BlockLevels levels;
  __shared__ Corners<float, int64_t, kWarp> all_corners[kBlock / kWarp];
  const Part part = part_of(blockIdx.x, problem, blocks, problem.head_dim);
  read_levels<Points::kReadsPixels>(table, problem, levels);
  const int exponent = fixed.exponent(int64_t{part.batch} * problem.heads + part.head);
  const float scale = exponent == FixedPoint::kNone ? 0 : power_of_two(exponent);
  int64_t* const target = grad_value + problem.value_at(part.batch, 0, part.head);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  auto& corners = all_corners[warp];
  const int end = min((warp + 1) * blocks.warp_positions, part.count);
#pragma unroll 1
  for (int i = warp * blocks.warp_positions; i < end; ++i) {
    const int64_t query = part.first + i;
    const auto opened = points.reopen(problem, part.batch, query, part.head);
    const T* const gradient = grad_output + problem.output_at(part.batch, query, part.head);
    int level = 0;
#pragma unroll 1
    for (int first = 0; first < problem.points; first += kWarp) {
      const int count = min(kWarp, problem.points - first);
      __syncwarp();
      if (lane < count) {
        level = level_of(first + lane, level, levels);
        const Sample<float> sample = points.at(opened, first + lane, level, levels);
        Footprint<float> foot;
        foot.place(sample.x, sample.y, levels.level[level].height, levels.level[level].width);
        corners.set(lane, corner_of<float, int64_t>(foot, levels.level[level],
                                                    sample.weight * scale, problem.row_stride(),
                                                    mask_of(table, problem, part.batch)));
      }
      __syncwarp();
#pragma unroll 1
      for (int c = lane; c < problem.head_dim; c += kWarp) {
        const float number = static_cast<float>(gradient[c]);
#pragma unroll 1
        for (int k = 0; k < count; ++k) {
          const Corner corner = corners[k];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (corner.at.at[j] == Corner::kNone) continue;
            int64_t term = 0;
            add_term(term, corner.weight.at[j], number);
            atomic_add<1>(target + corner.at.at[j] + c, &term);
          }
        }
      }
    }
  }
}

// The images share the blocks in turn; a thread has the same channels in each of its rows.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    round_fixed(Problem problem, const int64_t* __restrict__ sums, FixedPoint fixed,
                T* __restrict__ rounded) {
  const int batches = static_cast<int>(problem.batch);
  const int batch = static_cast<int>(blockIdx.x) % batches;
  const int channels = static_cast<int>(problem.row_stride()), width = min(channels, kBlock);
  const int rows_at_once = kBlock / width, own_row = static_cast<int>(threadIdx.x) / width;
  if (own_row >= rows_at_once) return;
  const int64_t step = int64_t{gridDim.x} / batches * rows_at_once;
  for (int c = static_cast<int>(threadIdx.x) % width; c < channels; c += width) {
    const int exponent = fixed.exponent(int64_t{batch} * problem.heads + c / problem.head_dim);
    const float unscaled = exponent == FixedPoint::kNone ? NAN : power_of_two(-exponent);
    for (int64_t row = int64_t{blockIdx.x} / batches * rows_at_once + own_row; row < problem.rows;
         row += step) {
      const int64_t at = problem.value_at(batch, row, 0) + c;
      rounded[at] = static_cast<T>(static_cast<float>(sums[at]) * unscaled);
    }
  }
}

}  // namespace deform_attn
