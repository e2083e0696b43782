#include "launch.cuh"

template void deform_attn::launch_forward<float>(const KernelCall&, void*, const Device&, bool);
