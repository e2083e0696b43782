// HOST_DEVICE: a function for the CPU and the GPU.
//
// On the CPU it is always inlined. The CPU kernels are compiled once per instruction set, and the
// linker keeps one copy of an out-of-line function: that copy could hold instructions which the
// processor lacks.
#pragma once

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif
