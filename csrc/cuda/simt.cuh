// How a kernel is launched: what nvcc expects here. The emulator of the tests defines its own before
// it includes the kernels, and so runs them on a CPU.
#pragma once

#if !defined(LAUNCH)
#include <cuda_runtime.h>

#define LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#endif
