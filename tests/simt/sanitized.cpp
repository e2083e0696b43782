// A program that runs kernels under the emulator, to be built with a sanitizer.
//
//   sanitized kernels    all kernels on small hostile calls; each against forward_baseline or
//                        backward_baseline on the same call, fused calls too; then each kernel's name
//                        and the number of cases that reach it
//   sanitized able       tests of the emulator's functions
//   sanitized NAME       one kernel of selftest.h with its fault
//   sanitized ok:NAME    the same kernel without it
//
// Exit status 0: all correct; 1: a wrong result; 2: the emulator refused, with a message.
#include <cmath>
#include <cstdio>
#include <set>

#include "simt.h"
// after simt.h
#include "cuda/dispatch.cuh"
#include "selftest.h"

using namespace deform_attn;

namespace {

int failures = 0;

void expect(bool right, const std::string& what) {
  if (right) return;
  ++failures;
  std::fprintf(stderr, "wrong: %s\n", what.c_str());
}

// ---- the shipped kernels

struct Case {
  std::vector<std::pair<int64_t, int64_t>> levels;
  std::vector<int64_t> starts;  // empty: one behind the other
  std::vector<int> counts;      // points of each level
  int64_t batch, queries;       // queries 0: the pixels
  int heads, head_dim;
  bool invalid;  // level sizes on the device that do not fit into value
};

const Case kCases[] = {
    {{{9, 12}, {5, 6}}, {}, {4, 4}, 1, 0, 2, 32, false},           // an encoder
    {{{5, 7}, {3, 4}, {2, 1}}, {}, {3, 6, 3}, 2, 5, 2, 8, false},  // a list of counts
    {{{5, 7}, {1, 1}}, {}, {2, 2}, 1, 37, 3, 30, false},
    {{{4, 5}, {2, 3}}, {}, {1, 1}, 1, 3, 1, 71, false},
    {{{4, 5}}, {}, {5}, 2, 3, 2, 1, false},
    {{{3, 3}}, {}, {23}, 1, 2, 1, 128, false},
    {{{4, 5}, {5, 4}, {2, 3}}, {0, 0, 7}, {2, 0, 2}, 1, 9, 2, 4, false},  // overlapping levels
    {{{4, 5}, {2, 3}}, {3, 30}, {2, 2}, 1, 9, 2, 16, false},              // gaps
    {{{1000000, 1000000}, {-3, 5}, {4, 4}}, {0, 5, 12}, {2, 2, 2}, 1, 9, 2, 16, true},
    {{{4, 5}, {2, 3}}, {-7, int64_t{1} << 62}, {2, 2}, 1, 9, 2, 16, true},
};

template <typename T>
std::vector<T> drawn(size_t count, std::mt19937& random, float low, float high) {
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<T> numbers(count);
  for (T& number : numbers) number = static_cast<T>(uniform(random));
  return numbers;
}

int level_of_point(const KernelCall& in, int k) {
  int l = 0;
  while (k >= in.levels.first_point[l + 1]) ++l;
  return l;
}

template <typename T>
bool close(const std::vector<T>& a, const std::vector<T>& b, double tolerance) {
  double largest = 1e-3;
  for (const T& number : a) {
    if (std::isfinite(static_cast<double>(number))) {
      largest = std::max(largest, std::abs(static_cast<double>(number)));
    }
  }
  for (size_t i = 0; i < a.size(); ++i) {
    const double x = static_cast<double>(a[i]), y = static_cast<double>(b[i]);
    if (!(std::abs(x - y) <= tolerance * largest)) return false;
  }
  return true;
}

// The results of a backward call; of a fused one, locations and weights are offsets and logits.
template <typename T>
struct Gradients {
  std::vector<T> value;
  std::vector<AccOf<T>> locations, wide, reference;
  std::vector<T> narrow_offsets, narrow;
};

template <typename T>
Gradients<T> backward(const KernelCall& in, const T* grad, BackwardAlgorithm algorithm,
                      const Device& device) {
  const Problem& problem = in.problem;
  const size_t numbers = static_cast<size_t>(problem.batch * problem.rows * problem.row_stride());
  const size_t queries = static_cast<size_t>(problem.batch * problem.queries);
  const size_t points = queries * static_cast<size_t>(problem.heads * problem.points);
  const BackwardPlan plan = plan_backward(in, algorithm, device);
  Gradients<T> found;
  found.value.assign(numbers, static_cast<T>(plan.zeros ? 0.0f : NAN));
  found.locations.resize(2 * points);
  found.narrow_offsets.resize(2 * points);
  found.wide.resize(points);
  found.narrow.resize(points);
  found.reference.resize(queries * static_cast<size_t>(in.fused.levels * in.fused.size));
  std::vector<unsigned char> sums(plan.sums), work[4];
  const size_t sizes[] = {plan.bounds, plan.statistics, plan.by_weight, plan.parts};
  for (int i = 0; i < 4; ++i) work[i].assign(sizes[i], 0xff);
  const bool wide = in.weights_are_acc;
  const bool narrow_offsets = in.fused.reference && !wide;
  const Outputs out = {
      found.value.data(),
      narrow_offsets ? static_cast<void*>(found.narrow_offsets.data()) : found.locations.data(),
      wide ? static_cast<void*>(found.wide.data()) : found.narrow.data(),
      found.reference.data(),
      sums.data(),
      work[0].data(),
      work[1].data(),
      work[2].data(),
      work[3].data()};
  backward_call(in, grad, out, plan, device);
  return found;
}

// A fused call, compared with the baseline kernels on the same locations and weights.
template <typename T>
void run_fused(KernelCall in, const Case& test, size_t index, const std::string& name,
               double tolerance, const std::vector<T>& grad, const Device& device) {
  using Acc = AccOf<T>;
  const Problem& problem = in.problem;
  std::mt19937 random(static_cast<unsigned>(index));
  const size_t queries = static_cast<size_t>(problem.batch * problem.queries);
  const size_t heads = static_cast<size_t>(problem.heads);
  const size_t count = static_cast<size_t>(problem.points), points = queries * heads * count;
  const int sizes[] = {4, 2, kRotatedBox};
  const int size = sizes[index % 3], levels = index % 2 ? problem.levels : 1;
  const double scale = 0.5;
  const auto reference = drawn<Acc>(queries * static_cast<size_t>(levels * size), random, 0.2f, 1);
  const auto narrow_offsets = drawn<T>(2 * points, random, -2, 2);
  const auto narrow_logits = drawn<T>(points, random, -2, 2);
  const std::vector<Acc> offsets(narrow_offsets.begin(), narrow_offsets.end());
  const std::vector<Acc> logits(narrow_logits.begin(), narrow_logits.end());

  // how far an offset moves the location along its axis, and along the other one
  std::vector<Acc> locations(2 * points), weights(points), steps(2 * points), across(2 * points);
  for (size_t i = 0; i < queries * heads; ++i) {
    Acc sum = 0;
    for (size_t k = 0; k < count; ++k) sum += std::exp(logits[i * count + k]);
    for (size_t k = 0; k < count; ++k) {
      const int l = level_of_point(in, static_cast<int>(k));
      const size_t point = i * count + k;
      const Acc* const from = reference.data() + (i / heads * static_cast<size_t>(levels) +
                                                  static_cast<size_t>(levels > 1 ? l : 0)) *
                                                     static_cast<size_t>(size);
      weights[point] = std::exp(logits[point]) / sum;
      for (size_t j = 0; j < 2; ++j) {
        const auto [height, width] = test.levels[static_cast<size_t>(l)];
        const Acc side =
            size >= 4 ? static_cast<Acc>(from[2 + j] * scale / test.counts[static_cast<size_t>(l)])
                      : Acc(1) / static_cast<Acc>(j ? height : width);
        const Acc turn = size == kRotatedBox ? from[4] : Acc(0);
        steps[2 * point + j] = side * std::cos(turn);
        across[2 * point + j] = (j ? -side : side) * std::sin(turn);
      }
      for (size_t j = 0; j < 2; ++j) {
        locations[2 * point + j] = from[j] + offsets[2 * point + j] * steps[2 * point + j] +
                                   offsets[2 * point + 1 - j] * across[2 * point + 1 - j];
      }
    }
  }
  KernelCall given = in;
  given.locations = locations.data();
  given.weights = weights.data();
  given.weights_are_acc = true;
  in.locations = in.weights_are_acc ? static_cast<const void*>(offsets.data())
                                    : static_cast<const void*>(narrow_offsets.data());
  in.weights = in.weights_are_acc ? static_cast<const void*>(logits.data())
                                  : static_cast<const void*>(narrow_logits.data());
  in.fused = {reference.data(), levels, size, scale};
  std::vector<unsigned char> frames(frames_bytes(in), 0xff);
  in.frames = frames.data();

  std::vector<T> plain(grad.size()), output(grad.size());
  forward_call(given, plain.data(), device, true);
  forward_call(in, output.data(), device);
  const auto alike = [&](const auto& a, const auto& b, const char* what) {
    expect(test.invalid || close(a, b, tolerance), name + "fused, " + what);
  };
  alike(plain, output, "forward");
  const Gradients<T> by_given = backward(given, grad.data(), BackwardAlgorithm::kBaseline, device);
  std::vector<Acc> by_offset(2 * points), by_logit(points), by_reference(reference.size());
  for (size_t i = 0; i < queries * heads; ++i) {
    Acc mean = 0;
    for (size_t k = i * count; k < (i + 1) * count; ++k) mean += weights[k] * by_given.wide[k];
    for (size_t k = 0; k < count; ++k) {
      const int l = level_of_point(in, static_cast<int>(k));
      const size_t point = i * count + k;
      Acc* const to = by_reference.data() + (i / heads * static_cast<size_t>(levels) +
                                             static_cast<size_t>(levels > 1 ? l : 0)) *
                                                static_cast<size_t>(size);
      by_logit[point] = weights[point] * (by_given.wide[point] - mean);
      for (size_t j = 0; j < 2; ++j) {
        const Acc by = by_given.locations[2 * point + j];
        const Acc by_other = by_given.locations[2 * point + 1 - j];
        const Acc by_offset_j = by * steps[2 * point + j] + by_other * across[2 * point + j];
        by_offset[2 * point + j] = by_offset_j;
        to[j] += by;
        // a side scales what its offset adds to the location
        const Acc* const from = reference.data() + (to - by_reference.data());
        if (size >= 4) to[2 + j] += by_offset_j * offsets[2 * point + j] / from[2 + j];
        // d/d angle: what is added, turned by a right angle
        if (size == kRotatedBox) {
          const Acc moved = locations[2 * point + 1 - j] - from[1 - j];
          to[4] += (j ? moved : -moved) * by;
        }
      }
    }
  }
  for (const BackwardAlgorithm algorithm :
       {BackwardAlgorithm::kScatter, BackwardAlgorithm::kTiles, BackwardAlgorithm::kFixed,
        BackwardAlgorithm::kGather}) {
    const Gradients<T> found = backward(in, grad.data(), algorithm, device);
    alike(by_given.value, found.value, "value");
    alike(by_reference, found.reference, "reference points");
    if (in.weights_are_acc) {
      alike(by_offset, found.locations, "offsets");
      alike(by_logit, found.wide, "logits");
    } else {
      alike(by_offset, std::vector<Acc>(found.narrow_offsets.begin(), found.narrow_offsets.end()),
            "offsets");
      alike(by_logit, std::vector<Acc>(found.narrow.begin(), found.narrow.end()), "logits");
    }
  }
}

template <typename T>
void run(const Case& test, Type type, size_t index) {
  using Acc = AccOf<T>;
  KernelCall in = {};
  Problem& problem = in.problem;
  std::vector<int64_t> shapes, starts = test.starts;
  int64_t rows = 0;
  for (size_t l = 0; l < test.levels.size(); ++l) {
    const auto [height, width] = test.levels[l];
    shapes.push_back(height);
    shapes.push_back(width);
    if (!test.invalid) rows = std::max(rows, (starts.empty() ? rows : starts[l]) + height * width);
    in.levels.start[l] = -1;
    in.levels.first_point[l + 1] = in.levels.first_point[l] + test.counts[l];
  }
  if (test.invalid) rows = 28;
  in.levels.count = problem.levels = static_cast<int>(test.levels.size());
  in.levels.shapes = shapes.data();
  in.levels.starts = starts.empty() ? nullptr : starts.data();
  problem.points = in.levels.first_point[problem.levels];
  problem.batch = test.batch;
  problem.rows = rows;
  problem.queries = test.queries ? test.queries : rows;
  problem.heads = test.heads;
  problem.head_dim = test.head_dim;
  in.type = type;
  in.weights_are_acc = index % 2;

  std::mt19937 random(static_cast<unsigned>(index));
  const size_t width = static_cast<size_t>(problem.row_stride());
  const size_t outputs = static_cast<size_t>(problem.batch * problem.queries) * width;
  const size_t points = static_cast<size_t>(problem.batch * problem.queries) *
                        static_cast<size_t>(problem.heads * problem.points);
  auto value = drawn<T>(static_cast<size_t>(problem.batch * rows) * width, random, -1, 1);
  std::vector<uint8_t> mask(index % 3 ? static_cast<size_t>(problem.batch * rows) : 0);
  for (size_t i = 0; i < mask.size(); ++i) {  // masked rows hold NaN
    mask[i] = random() % 3 == 0;
    for (size_t c = 0; c < width && mask[i]; ++c) value[i * width + c] = static_cast<T>(NAN);
  }
  in.levels.mask = mask.empty() ? nullptr : mask.data();
  const auto grad = drawn<T>(outputs, random, -1, 1);
  auto locations = drawn<Acc>(2 * points, random, -0.3f, 1.3f);
  for (size_t i = 0; i < locations.size(); i += 11) {
    locations[i] = i % 3 ? NAN : static_cast<Acc>(1e30);
  }
  const auto narrow = drawn<T>(points, random, 0, 1);
  const std::vector<Acc> wide(narrow.begin(), narrow.end());
  in.value = value.data();
  in.locations = locations.data();
  in.weights = in.weights_are_acc ? static_cast<const void*>(wide.data()) : narrow.data();

  const double tolerance = sizeof(T) == 2 ? 2e-2 : sizeof(T) == 4 ? 1e-5 : 1e-13;
  const std::string name =
      "case " + std::to_string(index) + ", " + std::to_string(sizeof(T)) + " bytes: ";
  const Device device = {4, 90, nullptr, index % 4 == 3};
  std::vector<T> plain(outputs), output(outputs);
  forward_call(in, plain.data(), device, true);
  forward_call(in, output.data(), device);
  expect(close(plain, output, tolerance), name + "forward");

  const Gradients<T> expected = backward(in, grad.data(), BackwardAlgorithm::kBaseline, device);
  for (const BackwardAlgorithm algorithm :
       {BackwardAlgorithm::kScatter, BackwardAlgorithm::kTiles, BackwardAlgorithm::kFixed,
        BackwardAlgorithm::kGather}) {
    const Gradients<T> result = backward(in, grad.data(), algorithm, device);
    const std::string what = name + (algorithm == BackwardAlgorithm::kScatter ? "scatter"
                                     : algorithm == BackwardAlgorithm::kTiles ? "tiles"
                                     : algorithm == BackwardAlgorithm::kFixed ? "fixed"
                                                                              : "gather");
    expect(close(expected.value, result.value, tolerance), what + ", value");
    expect(close(expected.locations, result.locations, tolerance), what + ", locations");
    expect(close(expected.wide, result.wide, tolerance), what + ", weights");
    expect(close(expected.narrow, result.narrow, tolerance), what + ", weights");
  }
  run_fused(in, test, index, name, tolerance, grad, device);
}

void kernels() {
  size_t index = 0;
  std::map<std::string, int> cases;  // that reach a kernel
  for (const Case& test : kCases) {
    simt::launches().clear();
    run<float>(test, Type::kFloat, index);
    run<__half>(test, Type::kHalf, index);
    run<__nv_bfloat16>(test, Type::kBFloat16, index + 1);
    if (index % 3 == 0) run<double>(test, Type::kDouble, index);
    ++index;
    std::set<std::string> reached;
    for (const auto& launch : simt::launches()) {
      const std::string& full = launch.first;  // void deform_attn::name<...>
      const size_t end = full.find('<'), begin = full.rfind(':', end) + 1;
      reached.insert(full.substr(begin, end - begin));
    }
    for (const std::string& name : reached) ++cases[name];
  }
  std::printf("%zu cases\n", index);
  for (const auto& [name, count] : cases) std::printf("%d %s\n", count, name.c_str());
}

// ---- the emulator

void able() {
  using namespace selftest;
  std::vector<float> in(kThreads), sums(kThreads), down(kThreads);
  std::vector<unsigned> votes(kThreads);
  for (int t = 0; t < kThreads; ++t) in[t] = static_cast<float>(t);
  LAUNCH(collectives, 1, kThreads, nullptr, in.data(), sums.data(), votes.data(), down.data());
  for (int t = 0; t < kThreads; ++t) {
    const int warp = t / 32, lane = t % 32;
    float sum = static_cast<float>(warp ? 32 * 32 + 496 : 496);
    if (lane < 16) sum += static_cast<float>(warp * 32 + 5 + 1000);
    expect(sums[t] == sum, "shuffles");
    expect(votes[t] == (0x49249249u & (lane < 16 ? 0xffffu : 0xffff0000u)), "votes of half a warp");
    expect(down[t] == static_cast<float>(lane < 29 ? t + 3 : t), "__shfl_down_sync");
  }

  float f = 0;
  double d = 0;
  int i = 0;
  float2 f2 = {0, 0};
  float4 f4 = {0, 0, 0, 0};
  __half2 h2 = __floats2half2_rn(0, 0);
  __nv_bfloat162 b2 = __floats2bfloat162_rn(0, 0);
  LAUNCH(all_atomics, 2, kThreads, nullptr, &f, &d, &i, &f2, &f4, &h2, &b2);
  expect(f == 64 && d == 32 && i == 256 && f2.y == 256 && f4.x == 128 && f4.w == 512, "atomics");
  expect(__low2float(h2) == 128 && __high2float(h2) == 256, "half2 atomics");
  expect(__low2float(b2) == 128 && __high2float(b2) == 256, "bfloat162 atomics");

  std::vector<int> from(3 * kThreads), to(3 * kThreads);
  for (size_t t = 0; t < from.size(); ++t) from[t] = static_cast<int>(t);
  for (const bool dynamic : {false, true}) {
    simt::launch(reinterpret_cast<void*>(&reverse), 3, kThreads, kThreads * sizeof(int), nullptr,
                 [&] { reverse(from.data(), to.data(), dynamic); });
    for (int t = 0; t < 3 * kThreads; ++t) {
      expect(to[t] == t / kThreads * kThreads + kThreads - 1 - t % kThreads, "shared memory");
    }
  }
}

void fault(const std::string& name, bool planted) {
  using namespace selftest;
  std::vector<int> in(kThreads), out(kThreads);
  float sum = 0;
  const auto is = [&](const char* kernel) { return name == kernel; };
  if (is("missing_barrier")) {
    LAUNCH(missing_barrier, 1, kThreads, nullptr, in.data(), out.data(), planted);
  } else if (is("missing_warp_barrier")) {
    LAUNCH(missing_warp_barrier, 1, kThreads, nullptr, in.data(), out.data(), planted);
  } else if (is("non_atomic_add")) {
    LAUNCH(non_atomic_add, 1, kThreads, nullptr, &sum, planted);
  } else if (is("non_atomic_add_of_blocks")) {
    LAUNCH(non_atomic_add_of_blocks, 2, kThreads, nullptr, &sum, planted);
  } else if (is("out_of_bounds_read")) {
    LAUNCH(out_of_bounds_read, 1, kThreads, nullptr, in.data(), out.data(), planted);
  } else if (is("out_of_bounds_shared")) {
    LAUNCH(out_of_bounds_shared, 1, kThreads, nullptr, out.data(), planted);
  } else if (is("divergent_barrier")) {
    LAUNCH(divergent_barrier, 1, kThreads, nullptr, out.data(), planted);
  } else if (is("divergent_lanes")) {
    LAUNCH(divergent_lanes, 1, kThreads, nullptr, out.data(), planted);
  } else if (is("lane_left_early")) {
    LAUNCH(lane_left_early, 1, kThreads, nullptr, out.data(), planted);
  } else if (is("lane_outside_its_mask")) {
    LAUNCH(lane_outside_its_mask, 1, kThreads, nullptr, out.data(), planted);
  } else {
    throw std::invalid_argument("no kernel " + name);
  }
}

}  // namespace

int main(int count, char** arguments) {
  try {
    for (int i = 1; i < count; ++i) {
      const std::string what = arguments[i];
      if (what == "--reversed") {
        simt::options.order = simt::Order::kReversed;
      } else if (what == "kernels") {
        kernels();
      } else if (what == "able") {
        able();
      } else if (what.rfind("ok:", 0) == 0) {
        fault(what.substr(3), false);
      } else {
        fault(what, true);
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "refused: %s\n", error.what());
    return 2;
  }
  return failures ? 1 : 0;
}
