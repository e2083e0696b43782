// One call of the operator on the modelled GPU: csrc's own code plans it and launches its kernels, whose
// machine code then runs here instead of on a GPU. Prints what each kernel took and how far the results are
// from float64, as JSON.
//
//   model WORK DTYPE PASS POINTS ALGORITHM CAPABILITY COSTS CODE...
//
//   WORK        encoder, encoder_small, queries
//   DTYPE       float, half, bfloat16
//   PASS        forward, backward
//   POINTS      given; fused (reference points); boxes (fused, with boxes as references)
//   ALGORITHM   planned, deterministic, baseline
//   CAPABILITY  90 or 80
//   COSTS       cycles of a sector that an atomic reduces, separated by commas; the model runs once for each
//   CODE        texts of `nvdisasm -hex`
//
// The emulator of the tests has what the kernels' headers need to compile without nvcc.
#include "simt.h"
#undef LAUNCH

#include <cxxabi.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <typeinfo>

#include "inputs.h"
#include "multiprocessor.h"

namespace cycles {

struct Launched {
  std::string kernel;
  LaunchShape shape;
  int registers, shared_bytes, resident_blocks;
  std::vector<Report> reports;  // one for each cost
};

// What takes the place of a GPU.
struct Gpu {
  Machine machine;
  std::vector<double> costs;  // see COSTS
  std::vector<Disassembly> code;
  Memory memory;
  std::vector<Launched> launched;
};

Gpu* gpu = nullptr;

std::string demangled(const char* name) {
  char* const text = abi::__cxa_demangle(name, nullptr, nullptr, nullptr);
  const std::string found = text ? text : name;
  std::free(text);
  return found;
}

// "forward_teams<float, 4, ...>" of a demangled name that contains it.
std::string kernel_in(const std::string& name) {
  const std::string space = "deform_attn::";
  const size_t at = name.find(space);
  if (at == std::string::npos) return "";
  int depth = 0;
  for (size_t i = at; i < name.size(); ++i) {
    depth += name[i] == '<';
    depth -= name[i] == '>';
    if (depth == 0 && name[i] == '>') {
      return name.substr(at + space.size(), i + 1 - at - space.size());
    }
  }
  return "";
}

const Kernel& find_kernel(const std::string& kernel) {
  for (Disassembly& text : gpu->code) {
    for (const std::string& name : text.names()) {
      if (kernel_in(demangled(name.c_str())) == kernel) return text.kernel(name);
    }
  }
  throw Error("no machine code of the kernel " + kernel);
}

// Blocks are dealt out to the multiprocessors in turn. One of them is modelled, the blocks of the others are
// executed.
void launch(const std::string& name, LaunchShape shape, const std::vector<uint8_t>& parameters) {
  const Kernel& kernel = find_kernel(name);
  const uint32_t processors = static_cast<uint32_t>(gpu->machine.processors);
  std::vector<uint32_t> own;
  for (uint32_t block = 0; block < shape.blocks; block += processors) own.push_back(block);
  Launched launched = {name, shape, kernel.registers, kernel.shared_bytes, 0, {}};
  std::vector<std::vector<uint8_t>> before;
  if (gpu->costs.size() > 1) before = gpu->memory.saved();
  for (const double cost : gpu->costs) {
    if (!launched.reports.empty()) gpu->memory.restore(before);
    gpu->machine.reduced_sector = cost;
    Executor executor(kernel, parameters, shape, gpu->memory);
    launched.resident_blocks = resident_blocks(gpu->machine, kernel, executor.warps_of_block());
    launched.reports.push_back(Multiprocessor(gpu->machine, executor).run(own));
  }
  Executor executor(kernel, parameters, shape, gpu->memory);
  for (uint32_t block = 0; block < shape.blocks; ++block) {
    if (block % processors != 0) executor.run_block(block);
  }
  gpu->launched.push_back(launched);
}

template <auto kKernel>
struct KernelTag {};

// Appends a parameter as a kernel's constant bank has it.
template <typename T>
void append(std::vector<uint8_t>& parameters, const T& parameter) {
  const size_t at = (parameters.size() + alignof(T) - 1) / alignof(T) * alignof(T);
  parameters.resize(at + sizeof(T));
  std::memcpy(parameters.data() + at, &parameter, sizeof(T));
}

template <typename Function>
struct Launcher;
template <typename... Parameters>
struct Launcher<void (*)(Parameters...)> {
  static void launch(const std::type_info& tag, unsigned blocks, unsigned threads,
                     Parameters... parameters) {
    std::vector<uint8_t> bytes;
    (append(bytes, parameters), ...);
    cycles::launch(kernel_in(demangled(tag.name())), {blocks, threads}, bytes);
  }
};

}  // namespace cycles

#define LAUNCH(kernel, grid, block, stream, ...)                                             \
  ::cycles::Launcher<decltype(+kernel)>::launch(typeid(::cycles::KernelTag<kernel>), (grid), \
                                                (block), __VA_ARGS__)
// after LAUNCH
#include "cuda/dispatch.cuh"

namespace cycles {

using namespace deform_attn;

constexpr float kUnwritten = NAN;

struct Error64 {
  const char* what;
  double error;  // largest, as a share of the largest number
};

template <typename T>
Error64 compared(const char* what, const std::vector<double>& expected, const T* found) {
  double error = 0, largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference =
        std::fabs(expected[i] - static_cast<double>(static_cast<float>(found[i])));
    error = std::isnan(difference) ? INFINITY : std::max(error, difference);
    largest = std::max(largest, std::fabs(expected[i]));
  }
  return {what, error / largest};
}

template <typename T>
std::vector<T> narrowed(std::vector<float>& numbers) {
  std::vector<T> narrow;
  for (float& number : numbers) {
    narrow.push_back(static_cast<T>(number));
    number = static_cast<float>(narrow.back());
  }
  return narrow;
}

template <typename T>
constexpr Type kType = Type::kFloat;
template <>
constexpr Type kType<__half> = Type::kHalf;
template <>
constexpr Type kType<__nv_bfloat16> = Type::kBFloat16;

struct Call {
  std::string pass, points, algorithm;
};

template <typename T>
std::vector<Error64> run(Inputs inputs, const Call& call) {
  const Work& work = inputs.work;
  Memory& memory = gpu->memory;
  const bool fused = call.points != "given";
  const std::vector<T> value = narrowed<T>(inputs.value), grad = narrowed<T>(inputs.grad_output);

  KernelCall in = {};
  in.problem = {1,
                work.rows(),
                work.queries,
                work.heads,
                work.head_dim,
                work.num_levels(),
                work.num_points()};
  in.levels.count = work.num_levels();
  for (int l = 0; l < work.num_levels(); ++l) {
    std::tie(in.levels.height[l], in.levels.width[l]) = work.levels[l];
    in.levels.start[l] = -1;
    in.levels.first_point[l + 1] = (l + 1) * work.points;
  }
  in.type = kType<T>;
  in.weights_are_acc = true;
  in.value = memory.add(value);
  in.locations = memory.add(fused ? inputs.sampling_offsets : inputs.sampling_locations);
  in.weights = memory.add(fused ? inputs.attention_logits : inputs.attention_weights);
  if (fused) {
    in.fused = {memory.add(inputs.reference_points), 1, inputs.reference_size, inputs.offset_scale};
  }
  const Device device = {gpu->machine.processors, gpu->machine.capability, nullptr};

  if (call.pass == "forward") {
    T* const output = memory.add(std::vector<T>(grad.size(), static_cast<T>(kUnwritten)));
    forward_call(in, output, device, call.algorithm == "baseline");
    return {compared("output", reference_output(inputs), output)};
  }
  const BackwardAlgorithm algorithm =
      call.algorithm == "baseline" ? BackwardAlgorithm::kBaseline
                                   : choose_backward(in, device, call.algorithm == "deterministic");
  const BackwardPlan plan = plan_backward(in, algorithm, device);
  const auto floats = [&](size_t count) {
    return memory.add(std::vector<float>(count, kUnwritten));
  };
  const auto bytes = [&](size_t count, uint8_t fill) -> void* {
    return count == 0 ? nullptr : memory.add(std::vector<uint8_t>(count, fill));
  };
  T* const grad_value =
      memory.add(std::vector<T>(value.size(), static_cast<T>(plan.zeros ? 0 : kUnwritten)));
  float* const locations = floats(inputs.sampling_locations.size());
  float* const weights = floats(inputs.attention_weights.size());
  float* const reference = fused ? floats(inputs.reference_points.size()) : nullptr;
  const Outputs out = {grad_value,
                       locations,
                       weights,
                       reference,
                       bytes(plan.sums, 0),
                       bytes(plan.bounds, 0xff),
                       bytes(plan.statistics, 0xff),
                       bytes(plan.by_weight, 0xff),
                       bytes(plan.parts, 0xff)};
  backward_call(in, memory.add(grad), out, plan, device);
  const Gradients expected = reference_gradients(inputs);
  if (!fused) {
    return {compared("grad_value", expected.value, grad_value),
            compared("grad_locations", expected.locations, locations),
            compared("grad_weights", expected.weights, weights)};
  }
  return {compared("grad_value", expected.value, grad_value),
          compared("grad_offsets", expected.offsets, locations),
          compared("grad_logits", expected.logits, weights),
          compared("grad_reference", expected.reference, reference)};
}

void print(const std::vector<Error64>& errors) {
  std::printf("{\"errors\": {");
  const char* separator = "";
  for (const Error64& each : errors) {
    std::printf("%s\"%s\": %.2e", separator, each.what, each.error);
    separator = ", ";
  }
  std::printf("},\n \"kernels\": [");
  separator = "";
  for (const Launched& each : gpu->launched) {
    std::printf(
        "%s\n  {\"kernel\": \"%s\", \"blocks\": %u, \"threads\": %u, \"registers\": %d, "
        "\"shared_bytes\": %d, \"resident_blocks\": %d, \"reports\": [",
        separator, each.kernel.c_str(), each.shape.blocks, each.shape.threads, each.registers,
        each.shared_bytes, each.resident_blocks);
    separator = ",";
    for (size_t i = 0; i < each.reports.size(); ++i) {
      const Report& report = each.reports[i];
      std::printf(
          "%s\n   {\"reduced_sector_cost\": %g, \"cycles\": %llu, \"instructions\": %llu, "
          "\"reduced_sectors\": %llu, \"read_sectors\": %llu, \"missed_sectors\": %llu, "
          "\"written_sectors\": %llu, \"cache_busy\": %.3f, \"warps\": %.1f}",
          i == 0 ? "" : ",", gpu->costs[i], static_cast<unsigned long long>(report.cycles),
          static_cast<unsigned long long>(report.instructions),
          static_cast<unsigned long long>(report.reduced_sectors),
          static_cast<unsigned long long>(report.read_sectors),
          static_cast<unsigned long long>(report.missed_sectors),
          static_cast<unsigned long long>(report.written_sectors), report.cache_busy, report.warps);
    }
    std::printf("]}");
  }
  std::printf("]}\n");
}

int main(const std::vector<std::string>& arguments) {
  if (arguments.size() < 8)
    throw Error("expected WORK DTYPE PASS POINTS ALGORITHM CAPABILITY COSTS CODE...");
  const auto expect = [](const char* what, const std::string& got,
                         const std::vector<std::string>& names) {
    std::string all;
    for (const std::string& name : names) {
      if (got == name) return;
      all += (all.empty() ? "" : ", ") + name;
    }
    throw Error(std::string(what) + ": expected one of " + all + ", got " + got);
  };
  expect("DTYPE", arguments[1], {"float", "half", "bfloat16"});
  expect("PASS", arguments[2], {"forward", "backward"});
  expect("POINTS", arguments[3], {"given", "fused", "boxes"});
  expect("ALGORITHM", arguments[4], {"planned", "deterministic", "baseline"});
  const Call call = {arguments[2], arguments[3], arguments[4]};
  Gpu own;
  gpu = &own;
  own.machine = machine_of(std::atoi(arguments[5].c_str()));
  std::istringstream costs(arguments[6]);
  for (std::string cost; std::getline(costs, cost, ',');) own.costs.push_back(std::stod(cost));
  for (size_t i = 7; i < arguments.size(); ++i) {
    std::ifstream file(arguments[i]);
    if (!file) throw Error("CODE: cannot read " + arguments[i]);
    std::stringstream text;
    text << file.rdbuf();
    own.code.emplace_back(text.str());
  }
  Inputs inputs = draw(work_of(arguments[0]));
  if (call.points == "boxes") use_boxes(inputs);
  print(arguments[1] == "float"  ? run<float>(inputs, call)
        : arguments[1] == "half" ? run<__half>(inputs, call)
                                 : run<__nv_bfloat16>(inputs, call));
  return 0;
}

}  // namespace cycles

int main(int count, char** arguments) {
  try {
    return cycles::main({arguments + 1, arguments + count});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
