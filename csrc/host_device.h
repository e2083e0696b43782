// HOST_DEVICE: a function that the CPU and the GPU both run.
//
// On the CPU it is always inlined: the CPU kernels are compiled several times for different
// processors, and a shared out-of-line copy could carry instructions that the oldest one lacks.
#pragma once

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif
