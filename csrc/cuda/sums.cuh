// What follows a backward kernel.
//
//   sum_heads    what the heads add to the gradient of reference_points
//   round_sums   a float32 sum to a 16-bit gradient
//
// After any edit: make kernels traffic
#pragma once

#include "points.cuh"

namespace deform_attn {

// parts [B, Q, M, L or 1, size] to grad_reference [B, Q, L or 1, size]: a thread per element. A level
// without points gets zeros.
template <typename Acc>
__global__ void __launch_bounds__(kBlock)
    sum_heads(Problem problem, LevelTable table, const Acc* __restrict__ parts,
              Acc* __restrict__ grad_reference, int reference_levels, int size) {
  const int row = reference_levels * size;
  const int64_t total = problem.batch * problem.queries * row;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
    const int at = static_cast<int>(i % row), l = at / size;
    const bool none = reference_levels > 1 && table.first_point[l] == table.first_point[l + 1];
    const Acc* const first = parts + i / row * problem.heads * row + at;
    Acc sum = 0;
    for (int head = 0; head < problem.heads && !none; ++head) sum += first[int64_t{head} * row];
    grad_reference[i] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kBlock)
    round_sums(const float* __restrict__ sums, T* __restrict__ rounded, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    rounded[i] = static_cast<T>(sums[i]);
  }
}

}  // namespace deform_attn
