// The whole CUDA library, its host code too, on two GPUs that are not there: tensors of cuda:0 and
// cuda:1 are in host memory, the emulator runs the kernels, and every launch is noted.
//
// A library to be loaded into Python before torch, which asks once what GPUs there are. The first has
// capability 9.0, the second 8.0.
//
//   Guard, Hooks       what torch must know: the current device, how many there are
//   empty, copy        memory; torch's other operators run on the CPU, and their results are copied
//   noted              each launch, with the current device and that of its stream
#include <ATen/ATen.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include "simt.h"
// after simt.h
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace {

// With SIMT_STUCK in the environment the current device stays what it is: a planted fault.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(at::DeviceType) {}
  at::DeviceType type() const override { return at::kCUDA; }
  at::DeviceIndex deviceCount() const noexcept override { return 2; }
  at::Device getDevice() const override { return at::Device(at::kCUDA, now()); }
  at::Device exchangeDevice(at::Device to) const override {
    const at::Device before = getDevice();
    setDevice(to);
    return before;
  }
  void setDevice(at::Device to) const override { uncheckedSetDevice(to); }
  void uncheckedSetDevice(at::Device to) const noexcept override {
    if (std::getenv("SIMT_STUCK") == nullptr) now() = to.index();
  }
  // A stream of torch's own; what kernels are launched on is stream_of below.
  at::Stream getStream(at::Device of) const noexcept override {
    return at::Stream(at::Stream::DEFAULT, of);
  }
  at::Stream exchangeStream(at::Stream stream) const noexcept override {
    return getStream(stream.device());
  }

 private:
  static at::DeviceIndex& now() {
    static thread_local at::DeviceIndex index = 0;
    return index;
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

at::DeviceIndex current() { return Guard().getDevice().index(); }

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 2; }
  at::DeviceIndex getCurrentDevice() const override { return current(); }
};

}  // namespace

namespace at {
using CUDAHooks = ::Hooks;  // the name by which torch asks for them
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

namespace {

at::Tensor blob(void* data, at::IntArrayRef sizes, at::IntArrayRef strides, at::Device device,
                at::ScalarType type, std::function<void(void*)> deleter) {
  return at::for_blob(data, sizes)
      .strides(strides)
      .deleter(std::move(deleter))
      .options(at::TensorOptions().dtype(type).device(device))
      .target_device(device)
      .make_tensor();
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides,
                         std::optional<at::ScalarType> type, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const at::ScalarType of = type.value_or(at::kFloat);
  const size_t bytes = at::detail::computeStorageNbytes(sizes, strides, c10::elementSize(of));
  const at::Device on = device && device->has_index() ? *device : Guard().getDevice();
  void* memory = std::aligned_alloc(256, (bytes / 256 + 1) * 256);
  return blob(memory, sizes, strides, on, of, [](void* at) { std::free(at); });
}

at::Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> type,
                 std::optional<at::Layout> layout, std::optional<at::Device> device,
                 std::optional<bool> pinned, std::optional<at::MemoryFormat>) {
  return empty_strided(sizes, c10::TensorType::contiguousStridesOf(sizes), type, layout, device,
                       pinned);
}

// The same memory as a tensor of the CPU.
at::Tensor seen_by_host(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  return blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), at::kCPU, tensor.scalar_type(),
              [](void*) {});
}

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool) {
  seen_by_host(to).copy_(seen_by_host(from));
  return to;
}

at::Tensor copy_back(const at::Tensor& from, const at::Tensor& to) {  // what a fallback wrote
  TORCH_CHECK(from.sizes() == to.sizes(), "an operator that resizes its result");
  return seen_by_host(to).copy_(seen_by_host(from));
}

void on_the_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>());
}
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("copy_", &copy);
  library.impl("_copy_from_and_resize", &copy_back);
}

void* stream_of(int64_t device) { return reinterpret_cast<void*>(0x1000 + device); }

std::vector<std::string>& noted() {  // "kernel current-device device-of-the-stream"
  static std::vector<std::string> launches;
  return launches;
}
void note(const std::string& kernel, void* stream) {
  const std::string bare = kernel.substr(0, kernel.find('<'));
  noted().push_back(bare.substr(bare.rfind(':') + 1) + " " + std::to_string(current()) + " " +
                    std::to_string(reinterpret_cast<int64_t>(stream) - 0x1000));
}

}  // namespace

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = stream_of(device);
  return AOTI_TORCH_SUCCESS;
}

inline cudaError_t cudaDeviceGetAttribute(int* number, cudaDeviceAttr which, int device) {
  *number = which == cudaDevAttrMultiProcessorCount      ? (device == 0 ? 132 : 108)
            : which == cudaDevAttrComputeCapabilityMajor ? (device == 0 ? 9 : 8)
                                                         : 0;
  return cudaSuccess;
}

#define __CUDACC_VER_MAJOR__ 0
#define __CUDACC_VER_MINOR__ 0
#define __CUDACC_VER_BUILD__ 0
#include "cuda/ops.cu"

TORCH_LIBRARY(two_gpus, library) {
  simt::on_launch = note;
  library.def("on", [](const at::Tensor& tensor, int64_t device) {
    return tensor.to(at::Device(at::kCUDA, static_cast<at::DeviceIndex>(device)));
  });
  library.def("back", [](const at::Tensor& tensor) { return seen_by_host(tensor).clone(); });
  library.def("current", [] { return int64_t{current()}; });
  library.def("set_current", [](int64_t device) {
    Guard().setDevice(at::Device(at::kCUDA, static_cast<at::DeviceIndex>(device)));
  });
  library.def("launches", [] { return std::exchange(noted(), {}); });  // since the last call
}
