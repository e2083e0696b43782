// The CUDA library: registers the CUDA kernels through torch's stable ABI.
//
//   CallContext                 the device and stream of a call, current while it lasts
//   level_table                 the levels as the kernels take them; never waits for the device
//   forward, backward, fused_forward, fused_backward
//   forward_by, backward_by     forward and backward by a named algorithm, for benchmarks
//   build                       what this library was built with

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <memory>
#include <tuple>

#include "../boxed.h"
#include "../checks.h"
#if defined(__CUDACC__)
#define DEFORM_ATTN_SEPARATE
#endif
#include "dispatch.cuh"

namespace deform_attn {

namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

void check(const char* what, cudaError_t error) {
  DEFORM_ATTN_REQUIRE(error == cudaSuccess, "deform_attn, built with CUDA ", CUDART_VERSION / 1000,
                      ".", CUDART_VERSION % 1000 / 10, ": ", what, ": ", cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
  int number = 0;
  check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&number, which, device));
  return number;
}

// Makes the tensor's device current, so that a tensor on a second GPU runs there.
class CallContext {
 public:
  explicit CallContext(const Tensor& tensor) : guard_(tensor.get_device()) {
    const int index = tensor.get_device();
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    device.stream = static_cast<cudaStream_t>(stream);
    device.processors = attribute(cudaDevAttrMultiProcessorCount, index);
    device.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                        attribute(cudaDevAttrComputeCapabilityMinor, index);
  }
  Device device;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The levels as the kernels take them, and the tensors that must live until the launch.
struct Levels {
  LevelTable table = {};
  std::vector<Tensor> held;
};

Levels level_table(const Call& call) {
  Levels levels;
  LevelTable& table = levels.table;
  table.count = call.problem.levels;
  DEFORM_ATTN_REQUIRE(table.count <= kMaxLevels, "spatial_shapes: the CUDA kernels take up to ",
                      kMaxLevels, " levels, got ", table.count);
  if (call.mask) table.mask = static_cast<const uint8_t*>(call.mask->const_data_ptr());
  for (size_t l = 0; l < call.first_point.size(); ++l) table.first_point[l] = call.first_point[l];
  const auto on_device = [&](const Tensor& numbers) {
    levels.held.push_back(Call::contiguous_of(numbers.scalar_type() == ScalarType::Long
                                                  ? numbers
                                                  : torch::stable::to(numbers, ScalarType::Long)));
    return static_cast<const int64_t*>(levels.held.back().const_data_ptr());
  };
  const bool shapes_on_device = call.shapes && call.shapes->is_cuda();
  const bool starts_on_device = call.starts && call.starts->is_cuda();
  if (shapes_on_device) table.shapes = on_device(*call.shapes);
  if (starts_on_device) table.starts = on_device(*call.starts);
  if (!shapes_on_device && !starts_on_device) {  // all on the host, which refuses invalid levels
    const std::vector<Level> known = levels_on_host(call);
    for (size_t l = 0; l < known.size(); ++l) {
      table.height[l] = known[l].height;
      table.width[l] = known[l].width;
      table.start[l] = known[l].start;
    }
    return levels;
  }
  if (!shapes_on_device) {
    const std::vector<int64_t> sizes = call.shapes ? numbers_of(*call.shapes) : call.sizes;
    for (int l = 0; l < table.count; ++l) {
      table.height[l] = sizes[static_cast<size_t>(2 * l)];
      table.width[l] = sizes[static_cast<size_t>(2 * l + 1)];
    }
  }
  if (!starts_on_device) {
    std::vector<int64_t> starts(static_cast<size_t>(table.count), -1);  // one after the other
    if (call.starts) starts = numbers_of(*call.starts);
    for (int l = 0; l < table.count; ++l) table.start[l] = starts[static_cast<size_t>(l)];
  }
  return levels;
}

// The kernels read locations in pairs: copies a view whose start is not aligned to a pair.
Tensor pairwise_aligned(const Tensor& locations) {
  const size_t pair = 2 * locations.element_size();
  const bool fits = reinterpret_cast<uintptr_t>(locations.const_data_ptr()) % pair == 0;
  return fits ? locations : torch::stable::clone(locations);
}

Tensor bytes_of(const Tensor& like, size_t count, bool zeros) {
  const std::vector<int64_t> shape = {static_cast<int64_t>(count)};
  return zeros ? torch::stable::new_zeros(like, shape, ScalarType::Byte)
               : torch::stable::new_empty(like, shape, ScalarType::Byte);
}

// `frames`: holds the working memory that the kernels of rotated boxes need.
KernelCall kernel_call(const Call& call, const Levels& levels, const Tensor& locations,
                       double offset_scale = 0, Tensor* frames = nullptr) {
  KernelCall in = {};
  in.problem = call.problem;
  in.levels = levels.table;
  in.type = type_of(call.type);
  in.weights_are_acc = call.weights_are_acc;
  in.value = call.value.const_data_ptr();
  in.locations = locations.const_data_ptr();
  in.weights = call.weights.const_data_ptr();
  in.fused = {};
  if (call.reference) {
    in.fused = {call.reference->const_data_ptr(), static_cast<int>(call.reference->size(2)),
                static_cast<int>(call.reference->size(3)), offset_scale};
    if (const size_t bytes = frames_bytes(in)) {
      *frames = bytes_of(call.value, bytes, false);
      in.frames = frames->mutable_data_ptr();
    }
  }
  return in;
}

Tensor grad_value_like(const Tensor& value, bool requested, const BackwardPlan& plan) {
  if (!requested) return Tensor();
  return plan.zeros ? torch::stable::new_zeros(value, value.sizes())
                    : torch::stable::new_empty(value, value.sizes());
}

Tensor forward_with(bool baseline, const Tensor& value, const MaybeTensor& spatial_shapes,
                    const MaybeTensor& level_start_index, const Tensor& sampling_locations,
                    const Tensor& attention_weights, const MaybeSizes& level_sizes,
                    const MaybeSizes& num_points, const MaybeTensor& value_mask) {
  const CallContext context(value);
  const Call call(value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
                  level_sizes, num_points, value_mask);
  const Levels levels = level_table(call);
  const Tensor locations = pairwise_aligned(call.locations);
  Tensor output = torch::stable::new_empty(call.value, call.output_shape());
  forward_call(kernel_call(call, levels, locations), output.mutable_data_ptr(), context.device,
               baseline);
  return output;
}

// `choose` returns the algorithm of a call.
template <typename Choose>
Gradients backward_with(const Choose& choose, const Tensor& grad_output, const Tensor& value,
                        const MaybeTensor& spatial_shapes, const MaybeTensor& level_start_index,
                        const Tensor& sampling_locations, const Tensor& attention_weights,
                        const MaybeSizes& level_sizes, const MaybeSizes& num_points,
                        const Flags& output_mask, const MaybeTensor& value_mask) {
  const CallContext context(value);
  const Call call(value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
                  level_sizes, num_points, value_mask);
  const Levels levels = level_table(call);
  const Tensor locations = pairwise_aligned(call.locations);
  const Tensor gradient = call.checked_gradient(grad_output, output_mask);
  const KernelCall in = kernel_call(call, levels, locations);
  const BackwardPlan plan =
      plan_backward(in, choose(in, context.device), context.device, {output_mask[0]});

  Tensor grad_value = grad_value_like(call.value, output_mask[0], plan);
  Tensor grad_locations = torch::stable::new_empty(call.locations, call.locations.sizes());
  Tensor grad_weights = torch::stable::new_empty(call.weights, call.weights.sizes());
  const Tensor sums = bytes_of(call.value, plan.sums, true);
  const Tensor bounds = bytes_of(call.value, plan.bounds, false);
  Outputs out = {};
  out.value = data_of(grad_value);
  out.locations = grad_locations.mutable_data_ptr();
  out.weights = grad_weights.mutable_data_ptr();
  out.sums = sums.mutable_data_ptr();
  out.bounds = bounds.mutable_data_ptr();
  backward_call(in, gradient.const_data_ptr(), out, plan, context.device);
  return {grad_value, if_requested(output_mask[1], grad_locations),
          if_requested(output_mask[2], grad_weights)};
}

Tensor forward(const Tensor value, const MaybeTensor spatial_shapes,
               const MaybeTensor level_start_index, const Tensor sampling_locations,
               const Tensor attention_weights, const MaybeSizes level_sizes,
               const MaybeSizes num_points, const MaybeTensor value_mask) {
  return forward_with(false, value, spatial_shapes, level_start_index, sampling_locations,
                      attention_weights, level_sizes, num_points, value_mask);
}

Gradients backward(const Tensor grad_output, const Tensor value, const MaybeTensor spatial_shapes,
                   const MaybeTensor level_start_index, const Tensor sampling_locations,
                   const Tensor attention_weights, const MaybeSizes level_sizes,
                   const MaybeSizes num_points, bool deterministic, const Flags output_mask,
                   const MaybeTensor value_mask) {
  const auto choose = [&](const KernelCall& in, const Device& device) {
    return choose_backward(in, device, deterministic);
  };
  return backward_with(choose, grad_output, value, spatial_shapes, level_start_index,
                       sampling_locations, attention_weights, level_sizes, num_points, output_mask,
                       value_mask);
}

BackwardAlgorithm named(const std::string& name) {
  if (name == "baseline") return BackwardAlgorithm::kBaseline;
  if (name == "scatter") return BackwardAlgorithm::kScatter;
  if (name == "tiles") return BackwardAlgorithm::kTiles;
  if (name == "fixed") return BackwardAlgorithm::kFixed;
  if (name == "gather") return BackwardAlgorithm::kGather;
  throw std::runtime_error("algorithm: expected baseline, scatter, tiles, fixed or gather, got " +
                           name);
}

Tensor forward_by(const std::string algorithm, const Tensor value, const MaybeTensor spatial_shapes,
                  const MaybeTensor level_start_index, const Tensor sampling_locations,
                  const Tensor attention_weights, const MaybeSizes level_sizes,
                  const MaybeSizes num_points) {
  return forward_with(named(algorithm) == BackwardAlgorithm::kBaseline, value, spatial_shapes,
                      level_start_index, sampling_locations, attention_weights, level_sizes,
                      num_points, std::nullopt);
}

Gradients backward_by(const std::string algorithm, const Tensor grad_output, const Tensor value,
                      const MaybeTensor spatial_shapes, const MaybeTensor level_start_index,
                      const Tensor sampling_locations, const Tensor attention_weights,
                      const MaybeSizes level_sizes, const MaybeSizes num_points) {
  const auto choose = [&](const KernelCall&, const Device&) { return named(algorithm); };
  return backward_with(choose, grad_output, value, spatial_shapes, level_start_index,
                       sampling_locations, attention_weights, level_sizes, num_points,
                       {true, true, true}, std::nullopt);
}

Tensor fused_forward(const Tensor value, const MaybeTensor spatial_shapes,
                     const MaybeTensor level_start_index, const Tensor reference_points,
                     const Tensor sampling_offsets, const Tensor attention_logits,
                     const MaybeSizes level_sizes, const MaybeSizes num_points, double offset_scale,
                     const MaybeTensor value_mask) {
  const CallContext context(value);
  const Call call(value, spatial_shapes, level_start_index, reference_points, sampling_offsets,
                  attention_logits, level_sizes, num_points, value_mask);
  const Levels levels = level_table(call);
  const Tensor offsets = pairwise_aligned(call.locations);
  Tensor output = torch::stable::new_empty(call.value, call.output_shape()), frames;
  forward_call(kernel_call(call, levels, offsets, offset_scale, &frames), output.mutable_data_ptr(),
               context.device);
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(
    const Tensor grad_output, const Tensor value, const MaybeTensor spatial_shapes,
    const MaybeTensor level_start_index, const Tensor reference_points,
    const Tensor sampling_offsets, const Tensor attention_logits, const MaybeSizes level_sizes,
    const MaybeSizes num_points, double offset_scale, bool deterministic, const Flags output_mask,
    const MaybeTensor value_mask) {
  const CallContext context(value);
  const Call call(value, spatial_shapes, level_start_index, reference_points, sampling_offsets,
                  attention_logits, level_sizes, num_points, value_mask);
  const Levels levels = level_table(call);
  const Tensor offsets = pairwise_aligned(call.locations);
  const Tensor gradient = call.checked_gradient(grad_output, output_mask);
  Tensor frames;
  const KernelCall in = kernel_call(call, levels, offsets, offset_scale, &frames);
  const BackwardPlan plan = plan_backward(in, choose_backward(in, context.device, deterministic),
                                          context.device, {output_mask[0], output_mask[1]});

  Tensor grad_value = grad_value_like(call.value, output_mask[0], plan);
  Tensor grad_reference;
  if (output_mask[1]) {  // zeros: without points no kernel writes it
    grad_reference = torch::stable::new_zeros(*call.reference, call.reference->sizes());
  }
  Tensor grad_offsets = torch::stable::new_empty(call.locations, call.locations.sizes());
  Tensor grad_logits = torch::stable::new_empty(call.weights, call.weights.sizes());
  const Tensor sums = bytes_of(call.value, plan.sums, true);
  const Tensor bounds = bytes_of(call.value, plan.bounds, false);
  const Tensor statistics = bytes_of(call.value, plan.statistics, false);
  const Tensor by_weight = bytes_of(call.value, plan.by_weight, false);
  const Tensor parts = bytes_of(call.value, plan.parts, false);
  const Outputs out = {data_of(grad_value),
                       grad_offsets.mutable_data_ptr(),
                       grad_logits.mutable_data_ptr(),
                       data_of(grad_reference),
                       sums.mutable_data_ptr(),
                       bounds.mutable_data_ptr(),
                       statistics.mutable_data_ptr(),
                       by_weight.mutable_data_ptr(),
                       parts.mutable_data_ptr()};
  backward_call(in, gradient.const_data_ptr(), out, plan, context.device);
  return {grad_value, grad_reference, if_requested(output_mask[2], grad_offsets),
          if_requested(output_mask[3], grad_logits)};
}

std::string build() {
  std::string list;
  for (const char c : architectures(kArchitectures))
    list += c == ',' ? std::string("\",") : std::string(1, c);
  size_t at = 0;
  while ((at = list.find(", ", at)) != std::string::npos) list.insert(at += 2, "\"");
  return joined("{\"version\": \"", DEFORM_ATTN_VERSION, "\", \"torch\": \"", DEFORM_ATTN_TORCH,
                "\", \"nvcc\": \"", __CUDACC_VER_MAJOR__, ".", __CUDACC_VER_MINOR__, ".",
                __CUDACC_VER_BUILD__, "\", \"architectures\": [\"", list, "\"]}");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deform_attn, CUDA, library) {
  library.impl("ms_deform_attn", DEFORM_ATTN_BOX(&forward));
  library.impl("ms_deform_attn_backward", DEFORM_ATTN_BOX(&backward));
  library.impl("ms_deform_attn_fused", DEFORM_ATTN_BOX(&fused_forward));
  library.impl("ms_deform_attn_fused_backward", DEFORM_ATTN_BOX(&fused_backward));
  library.impl("ms_deform_attn_by", DEFORM_ATTN_BOX(&forward_by));
  library.impl("ms_deform_attn_by_backward", DEFORM_ATTN_BOX(&backward_by));
}

// Private: benchmarks compare the algorithms with each other and with the baseline.
STABLE_TORCH_LIBRARY_FRAGMENT(deform_attn, library) {
#define DEFORM_ATTN_INPUTS                                            \
  "Tensor value, Tensor? spatial_shapes, Tensor? level_start_index, " \
  "Tensor sampling_locations, Tensor attention_weights, int[]? level_sizes, int[]? num_points"
  library.def("ms_deform_attn_by(str algorithm, " DEFORM_ATTN_INPUTS ") -> Tensor");
  library.def("ms_deform_attn_by_backward(str algorithm, Tensor grad_output, " DEFORM_ATTN_INPUTS
              ") -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(deform_attn, CompositeExplicitAutograd, library) {
  library.impl("cuda_build", DEFORM_ATTN_BOX(&build));
}

}  // namespace deform_attn
