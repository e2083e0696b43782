// Kernels that try the emulator: what it can do, and faults that it must find.
//
// Each fault stands beside the same kernel without it, so that a check which always fires is caught.
#pragma once

#include "simt.h"

namespace selftest {

constexpr int kThreads = 64;

// ---- what it can do

// out[t]: sum of in over the warp, by shuffles; then the votes of two halves on their own.
__global__ void collectives(const float* in, float* sums, unsigned* votes, float* down) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  float sum = in[t];
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  sums[t] = sum;
  down[t] = __shfl_down_sync(0xffffffffu, in[t], 3);
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  votes[t] = __ballot_sync(half, lane % 3 == 0);
  if (lane < 16) {
    sums[t] += __shfl_sync(half, in[t], 5) + (__all_sync(half, true) ? 1000 : 0);
  }
}

__global__ void all_atomics(float* f, double* d, int* i, float2* f2, float4* f4, __half2* h2,
                            __nv_bfloat162* b2) {
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
  atomicAdd(i, 2);
  atomicAdd(f2, make_float2(1, 2));
  atomicAdd(f4, make_float4(1, 2, 3, 4));
  atomicAdd(h2, __floats2half2_rn(1, 2));
  atomicAdd(b2, __floats2bfloat162_rn(1, 2));
}

// Reverses each block's part through shared memory, static and dynamic.
__global__ void reverse(const int* in, int* out, bool dynamic) {
  __shared__ int kept[kThreads];
  int* const place = dynamic ? reinterpret_cast<int*>(simt::worker->dynamic_shared.data()) : kept;
  const int t = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x * blockDim.x);
  place[t] = in[first + t];
  __syncthreads();
  out[first + t] = place[kThreads - 1 - t];
}

// ---- faults, and the same without

__global__ void missing_barrier(const int* in, int* out, bool fault) {
  __shared__ int kept[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  kept[t] = in[t];
  if (!fault) __syncthreads();
  out[t] = kept[kThreads - 1 - t];
}

__global__ void missing_warp_barrier(const int* in, int* out, bool fault) {
  __shared__ int kept[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  kept[t] = in[t];
  if (fault) {
    __shfl_sync(0xffffffffu, t, 0);  // lanes meet, but memory is not ordered
  } else {
    __syncwarp();
  }
  out[t] = kept[t ^ 31];
}

__global__ void non_atomic_add(float* sum, bool fault) {
  if (fault) {
    *sum += 1;
  } else {
    atomicAdd(sum, 1.0f);
  }
}

// A race between blocks, with one thread each.
__global__ void non_atomic_add_of_blocks(float* sum, bool fault) {
  if (threadIdx.x == 0) non_atomic_add(sum, fault);
}

__global__ void out_of_bounds_read(const int* in, int* out, bool fault) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[fault ? t + 1 : t];
}

__global__ void out_of_bounds_shared(int* out, bool fault) {
  __shared__ int kept[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  kept[t] = t;
  __syncthreads();
  out[t] = kept[fault ? t + 1 : t];
}

__global__ void divergent_barrier(int* out, bool fault) {
  if (!fault || threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void divergent_lanes(int* out, bool fault) {
  const bool left = fault && threadIdx.x % 32 < 16;
  if (left) {
    out[threadIdx.x] = static_cast<int>(__ballot_sync(0xffffffffu, true));
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
  }
}

__global__ void lane_left_early(int* out, bool fault) {
  if (fault && threadIdx.x == 7) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void lane_outside_its_mask(int* out, bool fault) {
  const unsigned mask = fault ? 0xfffffffeu : 0xffffffffu;
  out[threadIdx.x] = __shfl_xor_sync(mask, 1, 2);
}

}  // namespace selftest
