// The messages of failed launches. Free of CUDA and torch, so that a test compiles it alone.
//
//   version_of       "9.0" of 90
//   architectures    "7.5, 9.0" of nvcc's list "750,900"
//   launch_error     the message: the kernel, the error, and what to do about it
#pragma once

#include <string>

namespace deform_attn {

// The cudaError_t that have a message of their own.
enum LaunchErrors {
  kInvalidDeviceFunction = 98,
  kNoKernelImage = 209,
  kUnsupportedPtx = 222,
  kFirstOfKernels = 700,  // to kLastOfKernels: errors of a kernel while it runs
  kLastOfKernels = 721,
};

inline std::string version_of(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

inline std::string architectures(const std::string& nvcc_list) {
  std::string text;
  const std::string list = nvcc_list + ",";
  size_t from = 0;
  for (size_t to = list.find(','); to != std::string::npos; to = list.find(',', from)) {
    const std::string number = list.substr(from, to - from);
    from = to + 1;
    if (number.size() < 3) continue;
    if (!text.empty()) text += ", ";
    text += version_of(std::stoi(number) / 10);
  }
  return text;
}

// `what`: the message of the CUDA runtime.
inline std::string launch_error(const char* kernel, int error, const char* what, int capability,
                                const std::string& built_for) {
  const std::string name = std::string("deform_attn: CUDA kernel ") + kernel;
  const std::string here = version_of(capability);
  const std::string build = "Build it: TORCH_CUDA_ARCH_LIST=\"" + here +
                            "\" pip install --no-build-isolation "
                            "--no-binary=deform_attn deform_attn, or . in a clone";
  if (error == kNoKernelImage || error == kInvalidDeviceFunction) {
    return name + " was not built for this GPU, which has compute capability " + here +
           "; built for: " + built_for + ". " + build;
  }
  if (error == kUnsupportedPtx) {
    return name + " was not built for this GPU, which has compute capability " + here +
           ", and the driver is too old for the PTX in its place; built for: " + built_for + ". " +
           build;
  }
  const std::string failed = name + " was not launched: " + what;
  if (error >= kFirstOfKernels && error <= kLastOfKernels) {
    return failed +
           " (an earlier kernel failed, perhaps not one of deform_attn; "
           "CUDA_LAUNCH_BLOCKING=1 in the environment shows which)";
  }
  return failed;
}

}  // namespace deform_attn
