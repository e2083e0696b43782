// The CPU kernels compiled for processors with AVX2, FMA and F16C.
#define DEFORM_ATTN_KERNELS kAvx2
#define DEFORM_ATTN_KERNELS_NAME "AVX2"
#include "kernels.inc"
