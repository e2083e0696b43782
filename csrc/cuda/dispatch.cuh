// The entry points of the CUDA kernels: forward_call and backward_call, for every dtype.
//
// Free of torch: the extension and the emulator of the tests call the same functions.
#pragma once

#include "launch.cuh"

namespace deform_attn {

// forward_float.cu and the others instantiate these.
#if defined(DEFORM_ATTN_SEPARATE)
#define DEFORM_ATTN_EXTERN(T)                                                             \
  extern template void launch_forward<T>(const KernelCall&, void*, const Device&, bool);  \
  extern template void launch_backward<T>(const KernelCall&, const void*, const Outputs&, \
                                          const BackwardPlan&, const Device&);
DEFORM_ATTN_EXTERN(double)
DEFORM_ATTN_EXTERN(float)
DEFORM_ATTN_EXTERN(__half)
DEFORM_ATTN_EXTERN(__nv_bfloat16)
#undef DEFORM_ATTN_EXTERN
#endif

// Calls body with a null T* for the dtype.
template <typename Body>
void with_type(Type type, const Body& body) {
  switch (type) {
    case Type::kDouble:
      return body(static_cast<double*>(nullptr));
    case Type::kFloat:
      return body(static_cast<float*>(nullptr));
    case Type::kHalf:
      return body(static_cast<__half*>(nullptr));
    case Type::kBFloat16:
      return body(static_cast<__nv_bfloat16*>(nullptr));
  }
}

// Writes every element of output [B, Q, M, D].
inline void forward_call(const KernelCall& in, void* output, const Device& device,
                         bool baseline = false) {
  with_type(in.type, [&](auto* type) {
    launch_forward<std::remove_pointer_t<decltype(type)>>(in, output, device, baseline);
  });
}

inline void backward_call(const KernelCall& in, const void* grad_output, const Outputs& out,
                          const BackwardPlan& plan, const Device& device) {
  with_type(in.type, [&](auto* type) {
    launch_backward<std::remove_pointer_t<decltype(type)>>(in, grad_output, out, plan, device);
  });
}

}  // namespace deform_attn
