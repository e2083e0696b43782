// What comes before and after the kernels of points.
//
//   frame_boxes  rotated boxes to the Frames that the kernels read
//   sum_heads    what the heads add to the gradient of reference_points
//   sum_frames   the same of rotated boxes
//   round_sums   a float32 sum to a 16-bit gradient
//
// After any edit: make kernels traffic
#pragma once

#include "points.cuh"

namespace deform_attn {

constexpr int kRotatedBox = 5;  // numbers: (cx, cy, w, h, angle)

// boxes [count, 5] to frames [count, 6]: a thread per box.
template <typename Acc>
__global__ void __launch_bounds__(kBlock)
    frame_boxes(const Acc* __restrict__ boxes, Acc* __restrict__ frames, int64_t count) {
  using std::cos, std::sin;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    const Acc* const box = boxes + i * kRotatedBox;
    Acc* const frame = frames + i * kFrame;
    const Acc c = cos(box[4]), s = sin(box[4]);
    frame[0] = box[0];
    frame[1] = box[1];
    frame[2] = box[2] * c;
    frame[3] = box[3] * c;
    frame[4] = -box[3] * s;
    frame[5] = box[2] * s;
  }
}

// parts [B, Q, M, L or 1, 6] of frames to grad_reference [B, Q, L or 1, 5]: a thread per box.
template <typename Acc>
__global__ void __launch_bounds__(kBlock)
    sum_frames(Problem problem, LevelTable table, const Acc* __restrict__ parts,
               const Acc* __restrict__ boxes, Acc* __restrict__ grad_reference,
               int reference_levels) {
  using std::cos, std::sin;
  const int row = reference_levels * kFrame;
  const int64_t total = problem.batch * problem.queries * reference_levels;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
    const Acc* const box = boxes + i * kRotatedBox;
    const Acc c = cos(box[4]), s = sin(box[4]);  // before the sums, which would be spilled
    const int l = static_cast<int>(i % reference_levels);
    const bool none = reference_levels > 1 && table.first_point[l] == table.first_point[l + 1];
    const Acc* const first = parts + i / reference_levels * problem.heads * row + l * kFrame;
    Acc sum[kFrame] = {};
    for (int head = 0; head < problem.heads && !none; ++head) {
#pragma unroll
      for (int j = 0; j < kFrame; ++j) sum[j] += first[int64_t{head} * row + j];
    }
    Acc* const to = grad_reference + i * kRotatedBox;
    to[0] = sum[0];
    to[1] = sum[1];
    to[2] = c * sum[2] + s * sum[5];
    to[3] = c * sum[3] - s * sum[4];
    // da/d(angle) = w (-sin, cos), db/d(angle) = -h (cos, sin)
    to[4] = box[2] * (c * sum[5] - s * sum[2]) - box[3] * (c * sum[4] + s * sum[3]);
  }
}

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
__global__ void __launch_bounds__(kBlock) round_sums(Rounding<T> rounding) {
  rounding.run();
}

}  // namespace deform_attn
