#include "launch.cuh"

template void deform_attn::launch_forward<__nv_bfloat16>(const KernelCall&, void*, const Device&,
                                                         bool);
