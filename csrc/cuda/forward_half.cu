#include "launch.cuh"

template void deform_attn::launch_forward<__half>(const KernelCall&, void*, const Device&, bool);
