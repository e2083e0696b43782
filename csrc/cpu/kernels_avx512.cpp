// The CPU kernels compiled for processors with AVX-512 (F, BW, VL, DQ).
#define DEFORM_ATTN_KERNELS kAvx512
#define DEFORM_ATTN_KERNELS_NAME "AVX-512"
#include "kernels.inc"
