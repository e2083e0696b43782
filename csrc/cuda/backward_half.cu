#include "launch.cuh"

template void deform_attn::launch_backward<__half>(const KernelCall&, const void*, const Outputs&,
                                                   const BackwardPlan&, const Device&);
