// Runs the CPU kernels without torch, to be built with a sanitizer or for an emulator. Every tensor
// is an allocation of its own, so that a sanitizer sees an access outside it.
//
// Built with one file of csrc/cpu/kernels_*.cpp; DEFORM_ATTN_KERNELS is the name of its Kernels.
//
//   cpu_kernels          small hostile calls. One thread: compared with a loop in double. Several
//                        threads, with streaming stores, and one head after the other: the same bits
//   cpu_kernels short    a value that lacks a row: AddressSanitizer must report it
//   cpu_kernels twice    two threads with the same share: ThreadSanitizer must report it
//
// Exit status 0: every result is right; 1: one is wrong, stderr names it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/simd.h"

using namespace deform_attn;
using namespace deform_attn::cpu;

namespace {

constexpr int kThreads = 3;

int failures = 0;

void expect(bool correct, const std::string& what) {
  if (correct) return;
  ++failures;
  std::fprintf(stderr, "wrong: %s\n", what.c_str());
}

struct Case {
  std::vector<Level> levels;
  std::vector<int> counts;  // points of each level
  int64_t batch, queries;   // queries 0: the pixels
  int heads, head_dim;
};

const Case kCases[] = {
    {{{0, 9, 20}, {180, 5, 6}}, {4, 4}, 2, 0, 2, 32},                // an encoder
    {{{0, 5, 7}, {35, 3, 4}, {47, 2, 1}}, {3, 6, 3}, 2, 5, 8, 8},    // a list of counts
    {{{0, 5, 7}, {35, 1, 1}}, {2, 2}, 1, 37, 3, 30},                 //
    {{{0, 4, 5}, {20, 2, 3}}, {1, 1}, 1, 3, 1, 71},                  //
    {{{0, 4, 5}}, {5}, 2, 3, 2, 1},                                  //
    {{{0, 3, 3}}, {23}, 1, 2, 1, 256},                               //
    {{{0, 4, 5}, {0, 5, 4}, {7, 2, 3}}, {2, 0, 2}, 1, 19, 4, 16},    // overlapping levels
    {{{3, 4, 5}, {30, 1, 6}, {40, 6, 1}}, {2, 2, 1}, 1, 19, 4, 64},  // gaps, lines
    {{{0, 2, 2}}, {0}, 1, 3, 2, 4},                                  // no points
    {{{0, 2, 2}}, {3}, 1, 0, 1, 3},                                  //
    {{{0, 6, 5}, {30, 3, 2}}, {2, 2}, 2, 7, 4, 12},                  //
};

// Aligned to cache lines, as torch allocates: streaming stores require it.
template <typename T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <typename U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kCacheLine}));
  }
  void deallocate(T* at, size_t) { ::operator delete(at, std::align_val_t{kCacheLine}); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
template <typename T>
using Lines = std::vector<T, Aligned<T>>;

// What a call writes.
template <typename T, typename Acc, typename Weight>
struct Results {
  std::vector<T> output, value;
  std::vector<Acc> reference;
  Lines<Acc> locations;
  Lines<Weight> weights;
  std::vector<Weight> offsets;

  template <typename Member>
  static bool same_bits(const Member& a, const Member& b) {
    return a.size() == b.size() &&
           (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a.data()[0])) == 0);
  }
  bool operator==(const Results& other) const {
    return same_bits(output, other.output) && same_bits(value, other.value) &&
           same_bits(locations, other.locations) && same_bits(reference, other.reference) &&
           same_bits(weights, other.weights) && same_bits(offsets, other.offsets);
  }
};

// The expected results: the definition of the operator, in double.
struct Expected {
  std::vector<double> output, value, locations, weights;

  Expected(const Inputs& in, const Case& test, const std::vector<double>& from,
           const std::vector<double>& at, const std::vector<double>& weight,
           const std::vector<double>& grad)
      : output(grad.size()), value(from.size()), locations(at.size()), weights(weight.size()) {
    const Problem& p = in.problem;
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t q = 0; q < p.queries; ++q) {
        for (int m = 0; m < p.heads; ++m) {
          size_t point = static_cast<size_t>(p.point_at(b, q, m));
          const int64_t to = p.output_at(b, q, m);
          for (size_t l = 0; l < test.levels.size(); ++l) {
            for (int k = 0; k < test.counts[l]; ++k, ++point) {
              sample(in, test.levels[l], b, m, to, point, from, at, weight, grad);
            }
          }
        }
      }
    }
  }

 private:
  void sample(const Inputs& in, const Level& level, int64_t b, int m, int64_t to, size_t point,
              const std::vector<double>& from, const std::vector<double>& at,
              const std::vector<double>& weight, const std::vector<double>& grad) {
    const double x = at[2 * point] * level.width - 0.5, y = at[2 * point + 1] * level.height - 0.5;
    if (!(x > -1 && x < level.width && y > -1 && y < level.height)) return;
    const double left = std::floor(x), top = std::floor(y);
    for (int i = 0; i < 4; ++i) {
      const double column = left + i % 2, row = top + i / 2;
      if (column < 0 || column >= level.width || row < 0 || row >= level.height) continue;
      const double across = i % 2 ? x - left : 1 - (x - left);
      const double along = i / 2 ? y - top : 1 - (y - top);
      const int64_t value_row =
          level.start + static_cast<int64_t>(row) * level.width + static_cast<int64_t>(column);
      if (in.mask && in.mask[b * in.problem.rows + value_row]) continue;
      const int64_t pixel = in.problem.value_at(b, value_row, m);
      for (int d = 0; d < in.problem.head_dim; ++d) {
        const size_t source = static_cast<size_t>(pixel + d), out = static_cast<size_t>(to + d);
        output[out] += weight[point] * across * along * from[source];
        value[source] += weight[point] * across * along * grad[out];
        weights[point] += across * along * from[source] * grad[out];
        const double product = weight[point] * from[source] * grad[out];
        locations[2 * point] += product * along * (i % 2 ? 1 : -1) * level.width;
        locations[2 * point + 1] += product * across * (i / 2 ? 1 : -1) * level.height;
      }
    }
  }
};

template <typename T>
std::vector<T> drawn(size_t count, std::mt19937& random, float low, float high) {
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<T> numbers(count);
  for (T& number : numbers) {
    using Acc = AccOf<T>;
    from_acc(static_cast<Acc>(uniform(random)), number);
  }
  return numbers;
}

template <typename Numbers>
std::vector<double> doubles(const Numbers& numbers) {
  std::vector<double> to(numbers.size());
  for (size_t i = 0; i < to.size(); ++i) to[i] = static_cast<double>(to_acc(numbers[i]));
  return to;
}

template <typename Numbers>
void expect_close(const Numbers& got, const std::vector<double>& expected, double tolerance,
                  const std::string& what) {
  double largest = 1e-3, error = 0;
  for (const double number : expected) largest = std::max(largest, std::abs(number));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double off = std::abs(static_cast<double>(to_acc(got[i])) - expected[i]);
    error = off <= error ? error : off;  // keeps a NaN
  }
  expect(got.size() == expected.size() && error <= tolerance * largest, what);
}

// The same for sums that were rounded once to T: each may be half a unit of its last bit further off.
template <typename T>
void expect_rounded(const std::vector<T>& got, const std::vector<double>& expected,
                    double tolerance, const std::string& what) {
  const double half_unit = std::is_same_v<T, BFloat16> ? 0x1p-8 : sizeof(T) == 2 ? 0x1p-11 : 0;
  double largest = 1e-3;
  for (const double number : expected) largest = std::max(largest, std::abs(number));
  bool close = got.size() == expected.size();
  for (size_t i = 0; i < expected.size(); ++i) {
    const double off = std::abs(static_cast<double>(to_acc(got[i])) - expected[i]);
    const double subnormal = sizeof(T) == 2 ? 0x1p-25 : 0;
    close &= off <=
             (1 + half_unit) * tolerance * largest + half_unit * std::abs(expected[i]) + subnormal;
  }
  expect(close, what);
}

// Calls run(thread) on `threads` threads.
template <typename Run>
void side_by_side(int threads, const Run& run) {
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread)
    others.emplace_back([&, thread] { run(thread); });
  run(0);
  for (std::thread& other : others) other.join();
}

Lines<char> scratch_of(const Kernels& kernels, const Inputs& in, int copied = 0) {
  return Lines<char>(kernels.scratch_bytes(in, copied));
}

template <typename T, typename Weight>
class Call {
 public:
  using Acc = AccOf<T>;

  Call(const Kernels& kernels, const Case& test, Type type, size_t index)
      : kernels_(kernels), test_(test), random_(static_cast<unsigned>(index)) {
    Problem& p = in_.problem;
    first_point_.push_back(0);
    for (size_t l = 0; l < test.levels.size(); ++l) {
      const Level& level = test.levels[l];
      p.rows = std::max(p.rows, level.start + int64_t{level.height} * level.width);
      first_point_.push_back(first_point_.back() + test.counts[l]);
    }
    p.batch = test.batch;
    p.queries = test.queries ? test.queries : p.rows;
    p.heads = test.heads;
    p.head_dim = test.head_dim;
    p.levels = static_cast<int>(test.levels.size());
    p.points = first_point_.back();
    in_.heads = p.heads;
    in_.levels = test.levels.data();
    in_.first_point = first_point_.data();
    in_.queries_are_pixels = test.queries == 0;
    in_.value_type = type;
    in_.weights_are_acc = std::is_same_v<Weight, Acc>;
    const auto pixels = static_cast<size_t>(p.batch * p.rows * p.row_stride());
    const auto outputs = static_cast<size_t>(p.batch * p.queries * p.row_stride());
    points_ = static_cast<size_t>(p.point_at(p.batch, 0, 0));
    value_ = drawn<T>(pixels, random_, -1, 1);
    grad_ = drawn<T>(outputs, random_, -1, 1);
    locations_ = drawn<Acc>(2 * points_, random_, -0.3f, 1.3f);
    for (size_t i = 0; i < locations_.size(); i += 11) {
      locations_[i] = i % 3 ? static_cast<Acc>(NAN) : static_cast<Acc>(1e30);
    }
    weights_ = drawn<Weight>(points_, random_, 0, 1);
    in_.value = value_.data();
    in_.locations = locations_.data();
    in_.weights = weights_.data();
    if (!in_.queries_are_pixels && index % 2) {
      order_.resize(static_cast<size_t>(p.batch * p.queries));
      for (int64_t b = 0; b < p.batch; ++b) kernels.sort(in_, b, order_.data() + b * p.queries);
      in_.order = order_.data();
    }
  }

  // Masks rows, which hold NaN: a third of them, and the last quarter.
  void mask() {
    const Problem& p = in_.problem;
    mask_.resize(static_cast<size_t>(p.batch * p.rows));
    for (size_t i = 0; i < mask_.size(); ++i) {
      const auto row = static_cast<int64_t>(i) % p.rows;
      mask_[i] = random_() % 3 == 0 || 4 * row >= 3 * p.rows;
      for (int64_t c = 0; c < p.row_stride() && mask_[i]; ++c) {
        from_acc(static_cast<Acc>(NAN),
                 value_[i * static_cast<size_t>(p.row_stride()) + static_cast<size_t>(c)]);
      }
    }
    in_.mask = mask_.data();
  }

  // One thread compared with the expected results, several threads with one.
  void check(const std::string& name) {
    const auto one = run(1, false);
    const Expected expected(in_, test_, doubles(value_), doubles(locations_), doubles(weights_),
                            doubles(grad_));
    const double exact = sizeof(Acc) == 4 ? 2e-5 : 1e-13;
    const double rounded = sizeof(T) == 2 ? 1e-2 : exact;
    expect_close(one.output, expected.output, rounded, name + "output");
    expect_rounded(one.value, expected.value, exact, name + "gradient of value");
    expect_close(one.locations, expected.locations, exact, name + "gradient of locations");
    expect_close(one.weights, expected.weights, sizeof(Weight) == 2 ? 1e-2 : exact,
                 name + "gradient of weights");
    expect_the_same(one, name);
  }

  // A fused call on the same value, with reference points (size 2), boxes (4) or rotated boxes (5).
  void check_fused(const std::string& name, int size) {
    const Problem& p = in_.problem;
    const int levels = p.levels % 2 ? p.levels : 1;
    const auto references = static_cast<size_t>(p.batch * p.queries * levels * size);
    const auto reference = drawn<Acc>(references, random_, 0.1f, 0.9f);
    const auto offsets = drawn<Weight>(2 * points_, random_, -2, 2);
    const auto logits = drawn<Weight>(points_, random_, -3, 3);
    in_.fused = {reference.data(), levels, size, 0.5};
    in_.locations = offsets.data();
    in_.weights = logits.data();

    // how far an offset moves the location along its axis, and along the other one
    std::vector<double> scale(2 * points_), across(2 * points_);
    std::vector<double> at(2 * points_), weights(points_);
    const auto each_point = [&](const auto& use) {
      for (int64_t query = 0; query < p.batch * p.queries; ++query) {
        for (int m = 0; m < p.heads; ++m) {
          const auto head = static_cast<size_t>((query * p.heads + m) * p.points);
          for (int l = 0; l < p.levels; ++l) {
            const auto from = static_cast<size_t>((query * levels + (levels > 1 ? l : 0)) * size);
            for (int k = first_point_[l]; k < first_point_[l + 1]; ++k) {
              use(head, head + static_cast<size_t>(k), l, from);
            }
          }
        }
      }
    };
    each_point([&](size_t head, size_t point, int l, size_t from) {
      double sum = 0;
      for (int k = 0; k < p.points; ++k) {
        sum += std::exp(static_cast<double>(to_acc(logits[head + static_cast<size_t>(k)])));
      }
      weights[point] = std::exp(static_cast<double>(to_acc(logits[point]))) / sum;
      const Level& level = test_.levels[static_cast<size_t>(l)];
      const auto offset = [&](size_t i) {
        return static_cast<double>(to_acc(offsets[2 * point + i]));
      };
      for (size_t i = 0; i < 2; ++i) {
        const double side = size == 2 ? 1.0 / (i ? level.height : level.width)
                                      : static_cast<double>(reference[from + 2 + i]) * 0.5 /
                                            test_.counts[static_cast<size_t>(l)];
        const double turn = size == 5 ? static_cast<double>(reference[from + 4]) : 0;
        scale[2 * point + i] = side * std::cos(turn);
        across[2 * point + i] = (i ? -side : side) * std::sin(turn);
      }
      for (size_t i = 0; i < 2; ++i) {
        at[2 * point + i] = static_cast<double>(reference[from + i]) +
                            offset(i) * scale[2 * point + i] +
                            offset(1 - i) * across[2 * point + 1 - i];
      }
    });
    const Expected expected(in_, test_, doubles(value_), at, weights, doubles(grad_));
    std::vector<double> grad_offsets(2 * points_), grad_logits(points_), grad_reference(references);
    each_point([&](size_t head, size_t point, int l, size_t from) {
      double mean = 0;
      for (int k = 0; k < p.points; ++k) {
        const size_t other = head + static_cast<size_t>(k);
        mean += weights[other] * expected.weights[other];
      }
      grad_logits[point] = weights[point] * (expected.weights[point] - mean);
      for (size_t i = 0; i < 2; ++i) {
        const double slope = expected.locations[2 * point + i];
        const double other = expected.locations[2 * point + 1 - i];
        const double by_offset = slope * scale[2 * point + i] + other * across[2 * point + i];
        grad_offsets[2 * point + i] = by_offset;
        grad_reference[from + i] += slope;
        if (size >= 4) {  // a side scales what its offset adds to the location
          grad_reference[from + 2 + i] += by_offset *
                                          static_cast<double>(to_acc(offsets[2 * point + i])) /
                                          static_cast<double>(reference[from + 2 + i]);
        }
        if (size == 5) {  // by the angle: what is added, turned by a right angle
          const double moved = at[2 * point + 1 - i] - static_cast<double>(reference[from + 1 - i]);
          grad_reference[from + 4] += (i ? moved : -moved) * slope;
        }
      }
    });
    const auto one = run(1, false);
    const double exact = sizeof(Acc) == 4 ? 1e-4 : 1e-12;
    const double rounded = sizeof(Weight) == 2 ? 1e-2 : exact;
    expect_close(one.output, expected.output, sizeof(T) == 2 ? 1e-2 : exact,
                 name + "fused, output");
    expect_rounded(one.value, expected.value, exact, name + "fused, gradient of value");
    expect_close(one.reference, grad_reference, exact, name + "fused, gradient of references");
    expect_close(one.offsets, grad_offsets, rounded, name + "fused, gradient of offsets");
    expect_close(one.weights, grad_logits, rounded, name + "fused, gradient of logits");
    expect_the_same(one, name + "fused, ");
  }

  void forward_of_a_short_value() {
    const std::vector<T> lacking(value_.begin(), value_.end() - in_.problem.row_stride());
    in_.value = lacking.data();
    run(1, false);
  }

  void backward_twice() {
    std::vector<T> grad_value(value_.size());
    std::vector<Acc> sums(value_.size()), grad_locations(locations_.size());
    std::vector<Weight> grad_weights(points_);
    const Gradients grads{grad_.data(),          grad_value.data(),   sums.data(),
                          grad_locations.data(), grad_weights.data(), false};
    side_by_side(2, [&](int) {
      kernels_.backward(in_, grads, {0, 0, in_.problem.heads, 0, 1},
                        scratch_of(kernels_, in_).data());
    });
  }

 private:
  const Kernels& kernels_;
  const Case& test_;
  std::mt19937 random_;
  Inputs in_ = {};
  std::vector<int> first_point_;
  std::vector<int32_t> order_;
  size_t points_ = 0;
  std::vector<T> value_, grad_;
  std::vector<Acc> locations_;
  std::vector<Weight> weights_;
  std::vector<uint8_t> mask_;

  bool levels_overlap() const {
    for (size_t l = 1; l < test_.levels.size(); ++l) {
      const Level& before = test_.levels[l - 1];
      if (test_.levels[l].start < before.start + int64_t{before.height} * before.width) return true;
    }
    return false;
  }

  // How the backward pass divides the heads.
  enum class Heads {
    kGroups,  // and rows in two bands, where possible
    kNarrow,  // narrow shares
    kCopied,  // with a copy of the pixels of a head, or of two
    kParts,   // with copies of the pixels of two heads, visited one after the other
  };

  static bool has_copies(Heads heads) { return heads == Heads::kCopied || heads == Heads::kParts; }

  std::vector<Share> shares(int threads, Heads heads) const {
    std::vector<Share> found;
    const int groups = has_copies(heads)         ? (in_.problem.heads + 1) / 2
                       : heads == Heads::kNarrow ? kNarrow
                                                 : std::min(threads > 1 ? 2 : 1, in_.problem.heads);
    const Sums sums = has_copies(heads)         ? Sums::kCopied
                      : heads == Heads::kNarrow ? Sums::kNarrow
                      : sizeof(T) == 2          ? Sums::kWhole
                                                : Sums::kNone;
    const int bands = heads == Heads::kGroups && threads > 1 && !levels_overlap() ? 2 : 1;
    for (int64_t b = 0; b < in_.problem.batch; ++b) {
      for (int group = 0; group < groups; ++group) {
        for (int band = 0; band < bands; ++band) {
          found.push_back({b, in_.problem.heads * group / groups,
                           in_.problem.heads * (group + 1) / groups, band, bands, sums});
        }
      }
    }
    return found;
  }

  void expect_the_same(const Results<T, Acc, Weight>& one, const std::string& name) const {
    expect(one == run(kThreads, false), name + "several threads");
    expect(one == run(1, true), name + "past the caches");
    expect(one == run(kThreads, true), name + "several threads past the caches");
    if (sizeof(T) == 2 && in_.problem.heads % kNarrow == 0) {
      expect(one == run(1, false, Heads::kNarrow), name + "a few heads after the others");
      expect(one == run(kThreads, true, Heads::kNarrow),
             name + "several threads, a few heads each");
    }
    expect(one == run(1, true, Heads::kCopied), name + "copies of the pixels");
    expect(one == run(kThreads, false, Heads::kCopied),
           name + "several threads, copies of the pixels");
    expect(one == run(1, false, Heads::kParts), name + "copies, a head after the other");
    expect(one == run(kThreads, true, Heads::kParts),
           name + "several threads past the caches, copies, a head after the other");
    for (const int threads : {1, kThreads}) {
      for (const int at_once : {1, in_.problem.heads % 2 ? 1 : 2}) {
        expect(one.same_bits(one.output, output_by_heads(threads, at_once)),
               name + std::to_string(at_once) + " heads after the others");
      }
    }
  }

  // The output of forward passes over some heads after the others.
  std::vector<T> output_by_heads(int threads, int at_once) const {
    const Problem& p = in_.problem;
    std::vector<T> output(grad_.size()), pixels(static_cast<size_t>(p.rows * at_once * p.head_dim));
    Inputs in = in_;
    in.copy = pixels.data();
    in.heads = at_once;
    const int64_t blocks_of_image = kernels_.blocks(in);
    for (int64_t b = 0; b < p.batch; ++b) {
      for (in.first_head = 0; in.first_head < p.heads; in.first_head += at_once) {
        kernels_.copy(in, b, p.rows / 2, p.rows, pixels.data());
        kernels_.copy(in, b, 0, p.rows / 2, pixels.data());
        Blocks blocks{{b * blocks_of_image}, (b + 1) * blocks_of_image, 2};
        side_by_side(threads, [&](int) {
          kernels_.forward(in, output.data(), blocks, scratch_of(kernels_, in).data());
        });
      }
    }
    return output;
  }

  Results<T, Acc, Weight> run(int threads, bool past_caches, Heads heads = Heads::kGroups) const {
    Inputs in = in_;
    in.fetches_pairs = threads > 1;  // prefetches change no result
    const Problem& p = in.problem;
    const bool fused = in.fused.reference != nullptr;
    Results<T, Acc, Weight> to;
    to.output.resize(grad_.size());
    to.value.resize(value_.size());
    // a 16-bit gradient and that of a copy are written, not added to; narrow shares write what they have reached
    if (has_copies(heads) || (sizeof(T) == 2 && heads == Heads::kGroups)) {
      std::memset(to.value.data(), 0xff, sizeof(T) * to.value.size());
    }
    to.locations.resize(locations_.size());
    to.weights.resize(points_);
    Blocks blocks{{0}, kernels_.blocks(in) * p.batch, 2};
    side_by_side(threads, [&](int) {
      kernels_.forward(in, to.output.data(), blocks, scratch_of(kernels_, in).data());
    });
    Lines<Acc> grad_weights(fused ? points_ : 0);
    const bool groups = heads == Heads::kGroups;
    const auto copied = static_cast<size_t>(p.rows * std::min(p.heads, 2) * p.head_dim);
    const size_t numbers = groups                    ? value_.size()
                           : heads == Heads::kNarrow ? value_.size() / kNarrow
                                                     : copied;
    std::vector<std::vector<Acc>> sums(groups ? 1 : static_cast<size_t>(threads),
                                       std::vector<Acc>(numbers));
    const Gradients grads{grad_.data(),
                          to.value.data(),
                          sums[0].data(),
                          to.locations.data(),
                          fused ? static_cast<void*>(grad_weights.data()) : to.weights.data(),
                          past_caches};
    const std::vector<Share> all = shares(threads, heads);
    side_by_side(threads, [&](int thread) {
      auto scratch = scratch_of(kernels_, in, has_copies(heads) ? std::min(p.heads, 2) : 0);
      Inputs own_in = in;
      Gradients own = grads;
      if (!groups) own.sums = sums[static_cast<size_t>(thread)].data();
      std::vector<T> pixels(has_copies(heads) ? copied : 0);
      if (has_copies(heads)) own_in.copy = pixels.data();
      for (size_t i = static_cast<size_t>(thread); i < all.size();
           i += static_cast<size_t>(threads)) {
        const Share& share = all[i];
        if (has_copies(heads)) {
          own_in.heads = heads == Heads::kParts ? 1 : share.last_head - share.first_head;
          T* part = pixels.data();
          for (int head = share.first_head; head < share.last_head; head += own_in.heads) {
            own_in.first_head = head;
            kernels_.copy(own_in, share.batch, 0, p.rows, part);
            part += p.rows * own_in.heads * p.head_dim;
          }
          own_in.first_head = share.first_head;
        }
        kernels_.backward(own_in, own, share, scratch.data());
      }
    });
    for (const std::vector<Acc>& block : sums) {
      expect(std::all_of(block.begin(), block.end(), [](Acc sum) { return sum == 0; }),
             "the sums are zeros after the pass");
    }
    if (!fused) return to;
    to.reference.resize(static_cast<size_t>(p.batch * p.queries * in.fused.levels * in.fused.size));
    to.offsets.resize(2 * points_);
    const FusedGradients finished{to.locations.data(), grad_weights.data(), to.reference.data(),
                                  to.offsets.data(), to.weights.data()};
    const int64_t queries = p.batch * p.queries;
    side_by_side(threads, [&](int thread) {
      kernels_.finish(in, finished, queries * thread / threads, queries * (thread + 1) / threads,
                      scratch_of(kernels_, in).data());
    });
    return to;
  }
};

template <typename T, typename Weight>
void check(const Kernels& kernels, const Case& test, Type type, size_t index) {
  const std::string name = std::string(kernels.name) + ", case " + std::to_string(index) +
                           ", type " + std::to_string(static_cast<int>(type)) + ": ";
  Call<T, Weight> call(kernels, test, type, index);
  if ((index + static_cast<size_t>(type)) % 2) call.mask();
  call.check(name);
  const int sizes[] = {2, 4, 5};
  call.check_fused(name, sizes[index % 3]);
}

}  // namespace

int main(int count, char** arguments) {
  const Kernels& kernels = DEFORM_ATTN_KERNELS;
  const std::string fault = count > 1 ? arguments[1] : "";
  if (fault == "short") {
    Call<float, float>(kernels, kCases[0], Type::kFloat, 0).forward_of_a_short_value();
  } else if (fault == "twice") {
    Call<float, float>(kernels, kCases[0], Type::kFloat, 0).backward_twice();
  } else {
    size_t index = 0;
    for (const Case& test : kCases) {
      check<double, double>(kernels, test, Type::kDouble, index);
      check<float, float>(kernels, test, Type::kFloat, index);
      check<Half, Half>(kernels, test, Type::kHalf, index);
      check<Half, float>(kernels, test, Type::kHalf, index);
      check<BFloat16, BFloat16>(kernels, test, Type::kBFloat16, index);
      check<BFloat16, float>(kernels, test, Type::kBFloat16, index);
      ++index;
    }
    std::printf("%s: %zu cases\n", kernels.name, index);
  }
  return failures ? 1 : 0;
}
