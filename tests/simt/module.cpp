// The shipped kernels and their launchers, run by the emulator and bound to Python. Tensors come as
// addresses, so that every dtype of torch fits.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "simt.h"
// after simt.h
#include "cuda/dispatch.cuh"
#if defined(SIMT_TRAFFIC)
#include "traffic.h"
#endif

namespace py = pybind11;
using namespace deform_attn;

namespace {

template <typename T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

KernelCall kernel_call(const py::dict& call) {
  KernelCall in = {};
  const auto number = [&](const char* name) { return call[name].cast<int64_t>(); };
  in.problem.batch = number("batch");
  in.problem.rows = number("rows");
  in.problem.queries = number("queries");
  in.problem.heads = static_cast<int>(number("heads"));
  in.problem.head_dim = static_cast<int>(number("head_dim"));
  in.problem.levels = static_cast<int>(number("levels"));
  in.problem.points = static_cast<int>(number("points"));
  in.levels.count = in.problem.levels;
  in.levels.shapes = at<const int64_t>(call["shapes"].cast<uintptr_t>());
  in.levels.starts = at<const int64_t>(call["starts"].cast<uintptr_t>());
  in.levels.mask = at<const uint8_t>(call["mask"].cast<uintptr_t>());
  const auto sizes = call["sizes"].cast<std::vector<std::pair<int64_t, int64_t>>>();
  for (size_t l = 0; l < sizes.size(); ++l) {
    in.levels.height[l] = sizes[l].first;
    in.levels.width[l] = sizes[l].second;
  }
  std::fill(in.levels.start, in.levels.start + kMaxLevels, -1);
  const auto first_point = call["first_point"].cast<std::vector<int>>();
  std::copy(first_point.begin(), first_point.end(), in.levels.first_point);
  in.type = static_cast<Type>(number("type"));
  in.weights_are_acc = call["weights_are_acc"].cast<bool>();
  in.value = at(call["value"].cast<uintptr_t>());
  in.locations = at(call["locations"].cast<uintptr_t>());
  in.weights = at(call["weights"].cast<uintptr_t>());
  in.fused = {at(call["reference"].cast<uintptr_t>()), static_cast<int>(number("reference_levels")),
              static_cast<int>(number("reference_size")), call["offset_scale"].cast<double>()};
  return in;
}

Device device(int processors, bool long_offsets) {
  return {processors, kAtomicFloats == 4 ? 90 : 80, nullptr, long_offsets};
}

BackwardPlan plan(const KernelCall& in, const std::string& name, const Device& device,
                  const OutputMask& output_mask) {
  const BackwardAlgorithm algorithm = name == "baseline"  ? BackwardAlgorithm::kBaseline
                                      : name == "scatter" ? BackwardAlgorithm::kScatter
                                      : name == "tiles"   ? BackwardAlgorithm::kTiles
                                      : name == "fixed"   ? BackwardAlgorithm::kFixed
                                      : name == "gather"
                                          ? BackwardAlgorithm::kGather
                                          : choose_backward(in, device, name == "deterministic");
  return plan_backward(in, algorithm, device, output_mask);
}

const char* name_of(BackwardAlgorithm algorithm) {
  return algorithm == BackwardAlgorithm::kBaseline  ? "baseline"
         : algorithm == BackwardAlgorithm::kScatter ? "scatter"
         : algorithm == BackwardAlgorithm::kTiles   ? "tiles"
         : algorithm == BackwardAlgorithm::kFixed   ? "fixed"
                                                    : "gather";
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, module) {
  module.attr("atomic_floats") = kAtomicFloats;
  module.attr("max_levels") = kMaxLevels;

  module.def("forward", [](const py::dict& call, uintptr_t output, bool baseline, int processors,
                           bool long_offsets) {
    KernelCall in = kernel_call(call);
    std::vector<unsigned char> frames(frames_bytes(in), 0xff);
    in.frames = frames.data();
    const py::gil_scoped_release release;
    forward_call(in, at(output), device(processors, long_offsets), baseline);
  });
  // the algorithm, and bytes of working memory in the order of Outputs
  module.def("plan", [](const py::dict& call, const std::string& name, int processors,
                        bool long_offsets, bool value, bool reference) {
    const BackwardPlan it =
        plan(kernel_call(call), name, device(processors, long_offsets), {value, reference});
    return py::make_tuple(
        name_of(it.algorithm), it.zeros,
        py::make_tuple(it.sums, it.bounds, it.statistics, it.by_weight, it.parts));
  });
  module.def("backward", [](const py::dict& call, uintptr_t grad_output, const py::tuple& outputs,
                            const std::string& name, int processors, bool long_offsets) {
    KernelCall in = kernel_call(call);
    std::vector<unsigned char> frames(frames_bytes(in), 0xff);
    in.frames = frames.data();
    const auto address = [&](size_t i) { return at(outputs[i].cast<uintptr_t>()); };
    const Outputs out = {address(0), address(1), address(2), address(3), address(4),
                         address(5), address(6), address(7), address(8)};
    const Device on = device(processors, long_offsets);
    const BackwardPlan planned =
        plan(in, name, on, {out.value != nullptr, out.reference != nullptr});
    const py::gil_scoped_release release;
    backward_call(in, at(grad_output), out, planned, on);
  });
  module.def("set_order", [](const std::string& order, unsigned seed) {
    simt::options.order = order == "reversed"   ? simt::Order::kReversed
                          : order == "shuffled" ? simt::Order::kShuffled
                                                : simt::Order::kForward;
    simt::options.seed = seed;
  });
  module.def("launches", [] { return simt::launches(); });
  module.def("plant_error",
             [](int error) { simt::planted_error = static_cast<cudaError_t>(error); });
#if defined(SIMT_TRAFFIC)
  // ranges: [(name, address, bytes)]; the multiprocessors `modelled` run
  module.def("watch", [](const std::vector<std::tuple<std::string, uintptr_t, size_t>>& ranges,
                         int processors, const std::vector<int64_t>& modelled) {
    traffic::start(ranges, processors, modelled);
  });
  // {(kernel, tensor, "read" | "write" | "atomic"):
  //  the numbers of traffic::Figures}
  module.def("counts", [] { return traffic::stop(); });
#endif
}
