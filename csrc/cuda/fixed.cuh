// Sums of the gradient of value in 64-bit fixed point, which do not depend on the order of the terms.
//
//   TermBound      what bounds the terms of an image and head
//   FixedPoint     their scale
//   bound_terms    fills the TermBounds of a call
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
