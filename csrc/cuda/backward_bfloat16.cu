#include "launch.cuh"

template void deform_attn::launch_backward<__nv_bfloat16>(const KernelCall&, const void*,
                                                          const Outputs&, const BackwardPlan&,
                                                          const Device&);
