#include "launch.cuh"

template void deform_attn::launch_forward<double>(const KernelCall&, void*, const Device&, bool);
