// The CPU kernels compiled for every processor of the architecture.
#define DEFORM_ATTN_KERNELS kPortable
#define DEFORM_ATTN_KERNELS_NAME "portable"
#include "kernels.inc"
