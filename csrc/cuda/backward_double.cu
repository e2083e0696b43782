#include "launch.cuh"

template void deform_attn::launch_backward<double>(const KernelCall&, const void*, const Outputs&,
                                                   const BackwardPlan&, const Device&);
