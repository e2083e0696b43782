// The innermost loops of the CPU kernels, each in a function of its own: test_cpu_kernels.py counts
// the instructions that the compiler makes of them.
#include "cpu/backward.h"

using namespace deform_attn::cpu;

constexpr int kLanes = kNativeLanes<float>;
constexpr int kVecs = 32 / kLanes;  // a head of 32 channels: most models

#define DEFORM_ATTN_LOOPS(T)                                                                     \
  extern "C" void forward_##T(const T* value, const T* next, const Run<float>& run, T* output) { \
    sum_points<kLanes, kVecs, T, float>(value, next, run, output, 0);                            \
  }                                                                                              \
  extern "C" void backward_##T(const T* value, const T* grad_output, const Run<float>& run,      \
                               float* sums, const Reached& reached, Quad<float>* products,       \
                               int head) {                                                       \
    visit_points<kLanes, kVecs, sizeof(T) == 2 ? kNarrow : 1, T, float>(                         \
        value, grad_output, run, nullptr, sums, reached, products, true, 0, head, 32, false);    \
  }
DEFORM_ATTN_LOOPS(float)
DEFORM_ATTN_LOOPS(Half)
DEFORM_ATTN_LOOPS(BFloat16)
