// From a call to launches: which kernels, with which dtype, vector width and offsets, in which blocks.
//
//   KernelCall                       the operands of a call, as the kernels take them
//   Device                           where it runs
//   LaunchConfig                     the blocks of forward_teams and backward_teams
//   choose_backward, plan_backward   how the gradient of value is computed, and the memory that takes
//   launch_forward, launch_backward  launch the kernels of a call, for one dtype
//
// Each dtype and pass is instantiated in a source of its own (forward_float.cu ...), which compile in
// parallel.
//
// After any edit: make kernels traffic
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "baseline.cuh"
#include "errors.cuh"
#include "forward.cuh"
#include "gather.cuh"
#include "scatter.cuh"
#include "sums.cuh"
#include "tiles.cuh"

namespace deform_attn {

struct KernelCall {
  Problem problem;
  LevelTable levels;     // and value_mask
  Type type;             // of value, output and their gradients
  bool weights_are_acc;  // weights have acc_dtype, not the dtype of value
  const void* value;
  const void* locations;  // in a fused call: offsets, in the dtype of weights
  const void* weights;    // in a fused call: logits
  Fused fused;
  void* frames;  // working memory of `frames_bytes`, filled by the first kernel of a call
};

// The working memory of both passes, in bytes: the Frames of rotated boxes.
inline size_t frames_bytes(const KernelCall& in) {
  if (in.fused.size != kRotatedBox) return 0;
  const int64_t boxes = in.problem.batch * in.problem.queries * in.fused.levels;
  return static_cast<size_t>(boxes * kFrame) *
         (in.type == Type::kDouble ? sizeof(double) : sizeof(float));
}

struct Device {
  int processors;  // multiprocessors
  int capability;  // 90 for 9.0
  cudaStream_t stream;
  bool long_offsets = false;  // int64_t offsets everywhere, for tests
};

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Calls body with GivenPoints or FusedPoints. `statistics`: of FusedPoints.
template <typename T, typename Body>
void with_points(const KernelCall& in, void* statistics, const Body& body) {
  const bool pairs = in.problem.points % 2 == 0 && aligned(in.locations) && aligned(in.weights);
  if (!in.fused.reference) {
    return body(GivenPoints<T>{static_cast<const AccOf<T>*>(in.locations), in.weights,
                               in.weights_are_acc, pairs});
  }
  const bool rotated = in.fused.size == kRotatedBox;
  body(FusedPoints<T>{static_cast<const AccOf<T>*>(rotated ? in.frames : in.fused.reference),
                      in.locations, in.weights, static_cast<AccOf<T>*>(statistics),
                      static_cast<AccOf<T>>(in.fused.offset_scale), in.fused.levels,
                      rotated ? kFrame : in.fused.size, in.weights_are_acc, pairs});
}

template <int kVec_, typename Offset_>
struct Access {
  static constexpr int kVec = kVec_;
  using Offset = Offset_;
};

// Calls body with an Access: 16 bytes at a time where channels and addresses allow it (`aligned`) and
// unsigned offsets in that unit suffice, and rows have 28 bits (PixelOffsets); else one element at a time with
// int64_t offsets.
template <typename T, typename Body>
void with_access(const Problem& problem, bool aligned, bool long_offsets, const Body& body) {
  constexpr int kVec = kWidest<T>;
  const int64_t packs = problem.rows * problem.row_stride() / kVec;
  if (long_offsets || !aligned || problem.head_dim % kVec != 0 || packs > UINT32_MAX - 1 ||
      problem.rows >> 28 != 0) {
    return body(Access<1, int64_t>());
  }
  body(Access<kVec, unsigned>());
}

// The blocks of forward_teams and backward_teams.
struct LaunchConfig {
  BlockLayout blocks;
  unsigned threads;  // of a block
  int64_t count;     // of blocks
};

// Large problems get blocks of 64 queries, a tile of an encoder's map. Small ones get smaller blocks, so
// that each multiprocessor has `least_blocks`, and their warps work on fewer queries at a time: several
// groups of lanes share the points of a query; `least_split_bits`: at least so many.
inline LaunchConfig launch_config(const Problem& problem, int vec, int least_lane_bits,
                                  bool split_channels, int processors, int least_split_bits = 0,
                                  int least_blocks = 4) {
  BlockLayout blocks = {};
  blocks.lane_bits = least_lane_bits;
  blocks.split_bits = least_split_bits;
  while (blocks.lane_bits + least_split_bits < 5 && (vec << blocks.lane_bits) < problem.head_dim) {
    ++blocks.lane_bits;
  }
  const int channels = vec << blocks.lane_bits;
  const int64_t pieces = split_channels ? (problem.head_dim + channels - 1) / channels : 1;
  blocks.positions = 64;
  const auto tiles = [&] { return (problem.queries + blocks.positions - 1) / blocks.positions; };
  const auto count = [&] { return problem.batch * problem.heads * pieces * tiles(); };
  while (blocks.positions > 1 && count() < least_blocks * processors) blocks.positions /= 2;
  const auto teams = [&] { return kWarp >> (blocks.lane_bits + blocks.split_bits); };
  while (teams() > std::max(1, blocks.positions / 2) && (1 << blocks.split_bits) < problem.points) {
    ++blocks.split_bits;
  }
  const int warps = std::clamp(blocks.positions / teams(), 1, kBlock / kWarp);
  blocks.warp_positions = blocks.positions / warps;
  const auto divider = [](int64_t divisor) {
    return divider_by(static_cast<unsigned>(std::min<int64_t>(divisor, (int64_t{1} << 31) - 1)));
  };
  blocks.by_head = count() < 8 * processors;  // all resident at once, see part_of
  const int64_t dealt_to = blocks.by_head ? processors : 1;
  blocks.processors = divider(dealt_to);
  blocks.each = static_cast<unsigned>(count() / dealt_to);
  blocks.more = static_cast<unsigned>(count() % dealt_to);
  blocks.pieces = divider(pieces);
  blocks.inner = divider(blocks.by_head ? tiles() : problem.heads);
  blocks.outer = divider(blocks.by_head ? problem.heads : tiles());
  return {blocks, static_cast<unsigned>(warps * kWarp), count()};
}

// The architectures that the kernels were compiled for, as nvcc lists them.
#define DEFORM_ATTN_TEXT_(...) #__VA_ARGS__
#define DEFORM_ATTN_TEXT(...) DEFORM_ATTN_TEXT_(__VA_ARGS__)
#if defined(__CUDA_ARCH_LIST__)
constexpr const char* kArchitectures = DEFORM_ATTN_TEXT(__CUDA_ARCH_LIST__);
#else
constexpr const char* kArchitectures = "";
#endif

inline void check_launch(const char* kernel, const Device& device) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw std::runtime_error(launch_error(kernel, error, cudaGetErrorString(error), device.capability,
                                        architectures(kArchitectures)));
}

inline unsigned grid_of(const char* kernel, int64_t blocks) {
  if (blocks < (int64_t{1} << 31)) return static_cast<unsigned>(blocks);
  throw std::runtime_error(std::string("deform_attn: CUDA kernel ") + kernel + " would take " +
                           std::to_string(blocks) + " blocks, more than the 2**31 - 1 of a launch");
}

inline unsigned grid_striding(int64_t threads) {
  const int64_t blocks = (threads + kBlock - 1) / kBlock;
  return static_cast<unsigned>(blocks < (1 << 30) ? blocks : (1 << 30));
}

// Fills the working memory of rotated boxes, which the kernels read.
template <typename T>
void launch_frames(const KernelCall& in, const Device& device) {
  using Acc = AccOf<T>;
  const int64_t boxes = in.problem.batch * in.problem.queries * in.fused.levels;
  if (in.fused.size != kRotatedBox || boxes == 0) return;
  LAUNCH(frame_boxes<Acc>, grid_striding(boxes), kBlock, device.stream,
         static_cast<const Acc*>(in.fused.reference), static_cast<Acc*>(in.frames), boxes);
  check_launch("frame_boxes", device);
}

template <typename T>
void launch_forward(const KernelCall& in, void* output, const Device& device, bool baseline) {
  const Problem& problem = in.problem;
  const int64_t numbers = problem.batch * problem.queries * problem.row_stride();
  if (numbers == 0) return;
  const LevelTable levels = fitted_table(in.levels, problem);
  const T* const value = static_cast<const T*>(in.value);
  T* const to = static_cast<T*>(output);
  if (baseline) {
    const GivenPoints<T> points = {static_cast<const AccOf<T>*>(in.locations), in.weights,
                                   in.weights_are_acc, false};
    LAUNCH(forward_baseline<T>, grid_striding(numbers), kBlock, device.stream, problem, levels,
           points, value, to);
    return check_launch("forward_baseline", device);
  }
  launch_frames<T>(in, device);
  with_points<T>(in, nullptr, [&](const auto& points) {
    using Points = std::decay_t<decltype(points)>;
    with_access<T>(problem, aligned(value) && aligned(to), device.long_offsets, [&](auto access) {
      using A = decltype(access);
      const LaunchConfig config = launch_config(problem, A::kVec, 0, true, device.processors);
      LAUNCH((forward_teams<T, A::kVec, typename A::Offset, Points>),
             grid_of("forward_teams", config.count), config.threads, device.stream, problem, levels,
             config.blocks, points, value, to);
      check_launch("forward_teams", device);
    });
  });
}

// How the gradient of value is computed.
//   kBaseline  as in 2020
//   kScatter   atomics
//   kTiles     atomics, after adding up what a tile of queries adds to a pixel, where `in_tiles`; elsewhere
//              as kScatter
//   kFixed     as kTiles or kScatter, with sums in fixed point; for float64 as kGather
//   kGather    no atomics: pixels collect from points
// kFixed and kGather give the same bits every time.
enum class BackwardAlgorithm { kBaseline, kScatter, kTiles, kFixed, kGather };

// Which of the gradients that take extra work are requested; the others are always computed.
struct OutputMask {
  bool value = true, reference = true;
};

// The working memory of a backward call, in bytes.
struct BackwardPlan {
  BackwardAlgorithm algorithm;
  bool tiles;  // by backward_tiles, where alignment allows it
  // The caller fills the gradient of value with zeros; else the kernels write all of it.
  bool zeros;
  // Filled with zeros by the caller. Of a 16-bit value: its gradient in float, rounded once; of kFixed: the
  // gradient in int64, and the TermBounds.
  size_t sums;
  size_t bounds;      // of backward_gather
  size_t statistics;  // of FusedPoints
  size_t by_weight;   // of FusedPointGradients
  size_t parts;       // of FusedPointGradients
};

// Queries that share a Rectangle: those of a block where the queries may be the pixels of the levels, so
// that they are neighbours; else one.
inline int queries_of_run(const Problem& problem, const LaunchConfig& config) {
  return problem.queries == problem.rows ? config.blocks.positions : 1;
}

inline bool nothing_to_do(const Problem& problem) {
  return problem.batch * problem.queries * problem.row_stride() == 0 || problem.points == 0;
}

// The blocks of backward_tiles; smaller ones where each multiprocessor would not have two.
inline LaunchConfig tiles_config(const Problem& problem, int processors) {
  LaunchConfig config = launch_config(problem, kTileVec, 0, false, processors, 0, 2);
  config.threads = kBlock;
  while (kTileVec << config.blocks.lane_bits > kTileChannels) --config.blocks.lane_bits;
  return config;
}

// Whether backward_tiles can run.
inline bool fits_tiles(const KernelCall& in, const Device& device) {
  const Problem& problem = in.problem;
  const int64_t limit = int64_t{1} << 32;  // of an offset, in units of kTileVec
  return in.type != Type::kDouble && problem.head_dim % kTileVec == 0 && !device.long_offsets &&
         std::max(problem.queries, problem.rows) * problem.row_stride() / kTileVec < limit;
}

// Whether it takes fewer reductions: the queries may be the pixels of the levels, so that those of a block
// sample the same pixels.
inline bool in_tiles(const KernelCall& in, const Device& device) {
  return fits_tiles(in, device) && in.problem.queries == in.problem.rows;
}

// Tiles pay off where their blocks fill the multiprocessors and points fill their turns
// (docs/design-gpu.md). `plan_backward` replaces kFixed by kGather for float64.
inline BackwardAlgorithm choose_backward(const KernelCall& in, const Device& device,
                                         bool deterministic) {
  if (deterministic) return BackwardAlgorithm::kFixed;
  int in_turns = 0;  // points that the turns of a query have room for
  for (int l = 0; l < in.levels.count; ++l) {
    const int points = in.levels.first_point[l + 1] - in.levels.first_point[l];
    in_turns += (points + kTurnPoints - 1) / kTurnPoints * kTurnPoints;
  }
  const bool pays = tiles_config(in.problem, 0).count >= 4 * device.processors &&
                    2 * in.problem.points > in_turns;
  return pays && in_tiles(in, device) ? BackwardAlgorithm::kTiles : BackwardAlgorithm::kScatter;
}

inline BackwardPlan plan_backward(const KernelCall& in, BackwardAlgorithm algorithm,
                                  const Device& device, const OutputMask& output_mask = {}) {
  const Problem& problem = in.problem;
  const bool narrow = in.type == Type::kHalf || in.type == Type::kBFloat16;
  const int64_t acc_bytes = in.type == Type::kDouble ? sizeof(double) : sizeof(float);
  const int64_t items = problem.batch * problem.queries * problem.heads;
  const int64_t numbers = problem.batch * problem.rows * problem.row_stride();
  const auto bytes = [&](int64_t numbers) { return static_cast<size_t>(numbers * acc_bytes); };
  if (algorithm == BackwardAlgorithm::kFixed && in.type == Type::kDouble) {
    algorithm = BackwardAlgorithm::kGather;
  }
  BackwardPlan plan = {algorithm, false, true, 0, 0, 0, 0, 0};
  if (nothing_to_do(problem)) return plan;
  if (!output_mask.value) {
    plan.zeros = false;
  } else if (algorithm == BackwardAlgorithm::kGather) {
    const int run = queries_of_run(problem, launch_config(problem, 1, 2, false, device.processors));
    const int64_t runs = (problem.queries + run - 1) / run;
    plan.bounds = static_cast<size_t>(problem.batch * problem.heads * problem.levels * runs) *
                  sizeof(Rectangle);
  } else if (algorithm == BackwardAlgorithm::kFixed) {
    plan.zeros = false;
    plan.tiles = in_tiles(in, device);
    plan.sums = static_cast<size_t>(numbers) * sizeof(int64_t) +
                static_cast<size_t>(problem.batch * problem.heads) * sizeof(TermBound);
  } else if (narrow) {
    plan.zeros = false;
    plan.sums = bytes(numbers);
  }
  if (output_mask.value && algorithm == BackwardAlgorithm::kTiles)
    plan.tiles = in_tiles(in, device);
  if (in.fused.reference) {
    const bool repeatable =
        algorithm == BackwardAlgorithm::kFixed || algorithm == BackwardAlgorithm::kGather;
    if (plan.tiles || (output_mask.value && repeatable)) {
      plan.statistics = bytes(2 * items);
    }
    if (problem.points * kWarp / 4 > (acc_bytes == 8 ? kKept<double> : kKept<float>)) {
      plan.by_weight = bytes(items * problem.points);
    }
    if (output_mask.reference) {
      const int size = in.fused.size == kRotatedBox ? kFrame : in.fused.size;
      plan.parts = bytes(items * in.fused.levels * size);
    }
  }
  return plan;
}

struct Outputs {
  void* value;      // [B, S, M, D]; null: not requested
  void* locations;  // [B, Q, M, K, 2]; of a fused call: of offsets
  void* weights;    // [B, Q, M, K]; of a fused call: of logits
  void* reference;  // of a fused call; null: not requested
  void* sums;       // this and what follows: as planned
  void* bounds;
  void* statistics;
  void* by_weight;
  void* parts;
};

template <typename T>
GivenPointGradients<T> gradients_of(const GivenPoints<T>& points, const Outputs& out) {
  return {static_cast<AccOf<T>*>(out.locations), out.weights, points.wide,
          points.pairs && aligned(out.locations) && aligned(out.weights)};
}
template <typename T>
FusedPointGradients<T> gradients_of(const FusedPoints<T>& points, const Outputs& out) {
  return {out.locations, out.weights, static_cast<AccOf<T>*>(out.parts),
          static_cast<AccOf<T>*>(out.by_weight), points.wide};
}

template <typename T, typename Points>
void gather_value(const KernelCall& in, const LevelTable& levels, const Points& points,
                  const T* grad_output, const Outputs& out, const Device& device) {
  const Problem& problem = in.problem;
  const LaunchConfig config = launch_config(problem, 1, 2, false, device.processors);
  const int run = queries_of_run(problem, config);
  LAUNCH((bound_queries<T, Points>), grid_of("bound_queries", config.count), config.threads,
         device.stream, problem, levels, config.blocks, points, static_cast<Rectangle*>(out.bounds),
         run);
  check_launch("bound_queries", device);
  // Level sizes on the device are unknown here: enough blocks for maps as large as value. A block without
  // a tile ends at once; where there are more tiles than blocks, each takes several.
  constexpr int kWidth = kTileWidth<T>;
  int64_t tiles = problem.levels;
  if (levels.shapes) {
    tiles += problem.rows * 5 / (4 * kTileHeight * kWidth);
  } else {
    for (int l = 0; l < problem.levels; ++l) {
      tiles += ((levels.height[l] + kTileHeight - 1) / kTileHeight) *
               ((levels.width[l] + kWidth - 1) / kWidth);
    }
  }
  const int64_t planes = problem.batch * problem.heads * ((problem.head_dim + kWarp - 1) / kWarp);
  const int64_t most = ((int64_t{1} << 31) - 1) / planes;
  if (tiles > most) tiles = most;
  LAUNCH((backward_gather<T, Points>), grid_of("backward_gather", planes * tiles),
         kGatherWarps * kWarp, device.stream, problem, levels, points, grad_output,
         static_cast<const Rectangle*>(out.bounds), static_cast<T*>(out.value), run);
  check_launch("backward_gather", device);
}

template <typename T, typename Points>
void sum_fixed(const KernelCall& in, const LevelTable& levels, const Points& points,
               const T* grad_output, const Outputs& out, bool tiles, const Device& device) {
  const Problem& problem = in.problem;
  const int64_t planes = problem.batch * problem.heads;
  const int64_t numbers = problem.batch * problem.rows * problem.row_stride();
  int64_t* const sums = static_cast<int64_t*>(out.sums);
  TermBound* const bounds = reinterpret_cast<TermBound*>(sums + numbers);
  const FixedPoint fixed = fixed_point(problem, bounds);
  constexpr int kWarps = kBlock / kWarp;
  const int64_t blocks = std::clamp<int64_t>(8 * device.processors / planes, 1,
                                             (problem.queries + kWarps - 1) / kWarps);
  LAUNCH((bound_terms<T, Points>), grid_of("bound_terms", planes * blocks), kBlock, device.stream,
         problem, points, grad_output, bounds);
  check_launch("bound_terms", device);
  if (tiles) {
    const LaunchConfig config = tiles_config(problem, device.processors);
    LAUNCH((backward_tiles<T, Points, int64_t>), grid_of("backward_tiles", config.count),
           config.threads, device.stream, problem, levels, config.blocks, points, grad_output, sums,
           fixed);
    check_launch("backward_tiles", device);
  } else {
    const LaunchConfig config = launch_config(problem, 1, 5, false, device.processors);
    LAUNCH((scatter_fixed<T, Points>), grid_of("scatter_fixed", config.count), config.threads,
           device.stream, problem, levels, config.blocks, points, grad_output, sums, fixed);
    check_launch("scatter_fixed", device);
  }
  const int64_t of_image = std::clamp<int64_t>(2 * device.processors / problem.batch, 1,
                                               std::max<int64_t>(1, problem.rows));
  LAUNCH(round_fixed<T>, grid_of("round_fixed", problem.batch * of_image), kBlock, device.stream,
         problem, sums, fixed, static_cast<T*>(out.value));
  check_launch("round_fixed", device);
}

// In this order: frame_boxes; backward_teams; the kernels of the gradient of value, unless scattering;
// sum_frames or sum_heads; round_sums. Where backward_teams rounds, backward_tiles comes before it.
template <typename T>
void launch_backward(const KernelCall& in, const void* grad_output, const Outputs& out,
                     const BackwardPlan& plan, const Device& device) {
  const Problem& problem = in.problem;
  if (nothing_to_do(problem)) return;
  const LevelTable levels = fitted_table(in.levels, problem);
  using Acc = AccOf<T>;
  const T* const value = static_cast<const T*>(in.value);
  const T* const grad = static_cast<const T*>(grad_output);
  Acc* const sums = static_cast<Acc*>(plan.sums ? out.sums : out.value);
  const int64_t numbers = problem.batch * problem.rows * problem.row_stride();  // of value
  [[maybe_unused]] bool is_rounded = false;
  if (plan.algorithm == BackwardAlgorithm::kBaseline) {
    const GivenPoints<T> points = {static_cast<const Acc*>(in.locations), in.weights,
                                   in.weights_are_acc, false};
    const int64_t items = problem.batch * problem.queries * problem.heads;
    const int channels = (problem.head_dim + kWarp - 1) / kWarp * kWarp;
    LAUNCH(backward_baseline<T>, grid_of("backward_baseline", items),
           static_cast<unsigned>(channels < kBlock ? channels : kBlock), device.stream, problem,
           levels, points, value, grad, sums, gradients_of(points, out));
    check_launch("backward_baseline", device);
  } else {
    launch_frames<T>(in, device);
    with_points<T>(in, out.statistics, [&](const auto& points) {
      using Points = std::decay_t<decltype(points)>;
      const bool fixed = plan.algorithm == BackwardAlgorithm::kFixed && out.value;
      bool tiles = plan.tiles && out.value;
      const auto add_in_tiles = [&] {
        if constexpr (sizeof(T) < 8) {
          const LaunchConfig config = tiles_config(problem, device.processors);
          LAUNCH((backward_tiles<T, Points, Acc>), grid_of("backward_tiles", config.count),
                 config.threads, device.stream, problem, levels, config.blocks, points, grad, sums,
                 FixedPoint());
          check_launch("backward_tiles", device);
        }
      };
      const bool all_aligned = aligned(value) && aligned(grad) && aligned(sums);
      with_access<T>(problem, all_aligned, device.long_offsets, [&](auto access) {
        using A = decltype(access);
        const int splits = sizeof(T) == 2 && A::kVec > 1;  // see kDotsByMatrices
        const LaunchConfig config =
            launch_config(problem, A::kVec, 2, false, device.processors, splits);
        tiles = tiles && (fixed || std::is_same_v<typename A::Offset, unsigned>);
        const bool gathers = plan.algorithm == BackwardAlgorithm::kGather;
        const bool scatters = out.value && !tiles && !fixed && !gathers;
        Rounding<T> rounding = {};
        if constexpr (kRounds<T, Points>) {
          is_rounded = tiles && !fixed;
          if (is_rounded) {
            add_in_tiles();
            rounding = {sums, static_cast<T*>(out.value), numbers};
          }
        }
        LAUNCH((backward_teams<T, A::kVec, typename A::Offset, Points>),
               grid_of("backward_teams", config.count), config.threads, device.stream, problem,
               levels, config.blocks, points, value, grad, scatters ? sums : nullptr,
               gradients_of(points, out), rounding);
        check_launch("backward_teams", device);
      });
      if constexpr (sizeof(T) < 8) {
        if (fixed) {
          sum_fixed<T>(in, levels, points, grad, out, tiles, device);
        } else if (tiles && !is_rounded) {
          add_in_tiles();
        }
      }
      if (out.value && plan.algorithm == BackwardAlgorithm::kGather) {
        gather_value<T>(in, levels, points, grad, out, device);
      }
      if (Points::kFused && out.reference && in.fused.size == kRotatedBox) {
        const int64_t boxes = problem.batch * problem.queries * in.fused.levels;
        LAUNCH(sum_frames<Acc>, grid_striding(boxes), kBlock, device.stream, problem, levels,
               static_cast<const Acc*>(out.parts), static_cast<const Acc*>(in.fused.reference),
               static_cast<Acc*>(out.reference), in.fused.levels);
        check_launch("sum_frames", device);
      } else if (Points::kFused && out.reference) {
        const int64_t numbers = problem.batch * problem.queries * in.fused.levels * in.fused.size;
        LAUNCH(sum_heads<Acc>, grid_striding(numbers), kBlock, device.stream, problem, levels,
               static_cast<const Acc*>(out.parts), static_cast<Acc*>(out.reference),
               in.fused.levels, in.fused.size);
        check_launch("sum_heads", device);
      }
    });
  }
  if constexpr (sizeof(T) == 2) {
    if (plan.sums && plan.algorithm != BackwardAlgorithm::kFixed && !is_rounded) {
      LAUNCH(round_sums<T>, grid_striding((numbers + kRounded - 1) / kRounded), kBlock,
             device.stream, Rounding<T>{sums, static_cast<T*>(out.value), numbers});
      check_launch("round_sums", device);
    }
  }
}

}  // namespace deform_attn
