// The kernels of 2020: a thread per channel. The baseline that the other kernels are compared with, and
// the shortest description of what they compute.
//
//   forward_baseline    a thread per output element
//   backward_baseline   a block per (batch, query, head), an atomic per channel and pixel
//
// After any edit: make kernels traffic
#pragma once

#include "points.cuh"

namespace deform_attn {

template <typename T>
__global__ void __launch_bounds__(kBlock)
    forward_baseline(Problem problem, LevelTable table, GivenPoints<T> points,
                     const T* __restrict__ value, T* __restrict__ output) {
  using Acc = AccOf<T>;
  __shared__ BlockLevels levels;
  read_levels<false>(table, problem, levels);
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
        find_pixels<int64_t>(foot, sample.x, sample.y, level, mask_of(table, problem, batch));
        const auto corner =
            corner_of<Acc, int64_t>(foot, level, sample.weight, problem.row_stride());
        for (int j = 0; j < 4; ++j) {
          if (foot.on[j]) sum += corner.weight.at[j] * static_cast<Acc>(source[corner.at.at[j]]);
        }
      }
    }
    output[i] = static_cast<T>(sum);
  }
}

// Adds to `grad_value`, which must be zeros before.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    backward_baseline(Problem problem, LevelTable table, GivenPoints<T> points,
                      const T* __restrict__ value, const T* __restrict__ grad_output,
                      AccOf<T>* __restrict__ grad_value, GivenPointGradients<T> gradients) {
  using Acc = AccOf<T>;
  __shared__ BlockLevels levels;
  __shared__ Acc dots[4][kBlock];
  read_levels<false>(table, problem, levels);
  const int64_t item = blockIdx.x;
  const int head = static_cast<int>(item % problem.heads);
  const int64_t start = problem.value_at(item / problem.heads / problem.queries, 0, head);
  int level = 0;
  for (int k = 0; k < problem.points; ++k) {
    level = level_of(k, level, levels);
    const Sample<Acc> sample = points.at({item * problem.points}, k, level, levels);
    Footprint<Acc> foot;
    foot.place(sample.x, sample.y, levels.level[level].height, levels.level[level].width);
    const auto corner =
        corner_of<Acc, int64_t>(foot, levels.level[level], sample.weight, problem.row_stride(),
                                mask_of(table, problem, item / problem.heads / problem.queries));
    Acc dot[4] = {0, 0, 0, 0};
    for (int channel = threadIdx.x; channel < problem.head_dim; channel += blockDim.x) {
      const Acc grad = static_cast<Acc>(grad_output[item * problem.head_dim + channel]);
      for (int i = 0; i < 4; ++i) {
        if (!foot.on[i]) continue;
        const int64_t at = start + corner.at.at[i] + channel;
        dot[i] += static_cast<Acc>(value[at]) * grad;
        atomicAdd(grad_value + at, corner.weight.at[i] * grad);
      }
    }
    for (int i = 0; i < 4; ++i) dots[i][threadIdx.x] = dot[i];
    __syncthreads();
    for (unsigned count = blockDim.x; count > 1;) {
      const unsigned half = (count + 1) / 2;
      for (int i = 0; i < 4 && threadIdx.x < count / 2; ++i) {
        dots[i][threadIdx.x] += dots[i][threadIdx.x + half];
      }
      count = half;
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      for (int i = 0; i < 4; ++i) dot[i] = dots[i][0];
      const auto gradient = point_gradient(foot, levels.level[level], sample.weight, dot);
      gradients.set(item * problem.points + k, gradient);
    }
    __syncthreads();
  }
}

}  // namespace deform_attn
