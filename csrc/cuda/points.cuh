// Where sampling points come from, and how the lanes of a warp share them.
//
//   Sample           location and weight of one point
//   GivenPoints      points from sampling_locations and attention_weights
//   FusedPoints      points from reference_points, sampling_offsets and attention_logits
//   mask_of, find_pixels   the four pixels of a point, without masked ones
//   Corner           the same with their weights
//   point_gradient   the gradients of a point
//
// After any edit: make kernels traffic
#pragma once

#include "../bilinear.h"
#include "levels.cuh"
#include "work.cuh"

namespace deform_attn {

template <typename Acc>
struct Sample {
  Acc x, y, weight;
};

// A source of points (GivenPoints, FusedPoints) has, for one query and head:
//
//   open      Query: what its points have in common. Called by all lanes of a warp together, lane i
//             for the query of team teams.query_of(i), counted from the first of the block; where it is
//             not `present`, the lane gets no points
//   reopen    the same in a later kernel, for one lane
//   find      the same without what `weight` needs
//   location  (x, y) of point k, which samples `level`
//   weight    its attention weight
//   at        location and weight
//   read_two  Two: what memory has of point k, and where `next` of point k + 1; then k is even
//   of_two    location and weight of one of them

// The gradients of GivenPoints.
template <typename T>
struct GivenPointGradients {
  AccOf<T>* locations;
  void* weights;
  bool wide;
  bool pairs;  // as in GivenPoints

  __device__ void set(int64_t point, const Sample<AccOf<T>>& gradient) const {
    *reinterpret_cast<Pack<AccOf<T>, 2>*>(locations + 2 * point) = {gradient.x, gradient.y};
    if (wide) {
      static_cast<AccOf<T>*>(weights)[point] = gradient.weight;
    } else {
      static_cast<T*>(weights)[point] = static_cast<T>(gradient.weight);
    }
  }
  // Of a point, and where `next` of the following one.
  __device__ void set_two(int64_t point, const Sample<AccOf<T>> (&gradient)[2], bool next) const {
    if (!pairs || !next) {
      set(point, gradient[0]);
      if (next) set(point + 1, gradient[1]);
      return;
    }
    store<4>(locations + 2 * point, {gradient[0].x, gradient[0].y, gradient[1].x, gradient[1].y});
    if (wide) {
      store<2>(static_cast<AccOf<T>*>(weights) + point, {gradient[0].weight, gradient[1].weight});
    } else {
      store<2>(static_cast<T*>(weights) + point,
               {static_cast<T>(gradient[0].weight), static_cast<T>(gradient[1].weight)});
    }
  }
};

// The gradients of FusedPoints.
template <typename T>
struct FusedPointGradients {
  using Acc = AccOf<T>;
  void* offsets;
  void* logits;
  Acc* reference_parts;  // [B, Q, M, L or 1, 2, 4 or 6]: what each head adds to the gradient of
                         // FusedPoints::reference; null: not requested
  Acc* by_weight;        // [B, Q, M, K]: working memory, where shared memory is too small for it
  bool wide;             // offsets and logits have acc_dtype, not the dtype of value

  __device__ void set_offset(int64_t point, Acc x, Acc y) const {
    if (wide) {
      *reinterpret_cast<Pack<Acc, 2>*>(static_cast<Acc*>(offsets) + 2 * point) = {x, y};
    } else {
      *reinterpret_cast<Pack<T, 2>*>(static_cast<T*>(offsets) + 2 * point) = {static_cast<T>(x),
                                                                              static_cast<T>(y)};
    }
  }
  __device__ void set_logit(int64_t point, Acc number) const {
    if (wide) {
      static_cast<Acc*>(logits)[point] = number;
    } else {
      static_cast<T*>(logits)[point] = static_cast<T>(number);
    }
  }
};

// The kSize numbers of a point, and where `next` those of the following one. `pairs`: one load can read both.
template <int kSize, typename T>
__device__ Pack<T, 2 * kSize> load_two(const T* from, int64_t point, bool pairs, bool next) {
  if (pairs && next) return load<2 * kSize>(from + kSize * point);
  const auto one = load<kSize>(from + kSize * point);
  Pack<T, kSize> other = {};
  if (next) other = load<kSize>(from + kSize * (point + 1));
  Pack<T, 2 * kSize> both;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    both.at[i] = one.at[i];
    both.at[kSize + i] = other.at[i];
  }
  return both;
}
// The same of an array in T, or in acc_dtype where `wide`.
template <int kSize, typename T>
__device__ Pack<AccOf<T>, 2 * kSize> load_two_of(const void* from, bool wide, int64_t point,
                                                 bool pairs, bool next) {
  if (wide) return load_two<kSize>(static_cast<const AccOf<T>*>(from), point, pairs, next);
  const auto narrow = load_two<kSize>(static_cast<const T*>(from), point, pairs, next);
  Pack<AccOf<T>, 2 * kSize> numbers;
#pragma unroll
  for (int i = 0; i < 2 * kSize; ++i) numbers.at[i] = static_cast<AccOf<T>>(narrow.at[i]);
  return numbers;
}

// Points as the caller gives them. Weights have the dtype of value, or acc_dtype where `wide`.
template <typename T>
struct GivenPoints {
  static constexpr bool kFused = false;
  static constexpr bool kReadsPixels = false;  // BlockLevels::pixel
  using Gradients = GivenPointGradients<T>;

  const AccOf<T>* locations;  // [B, Q, M, K, 2]
  const void* weights;        // [B, Q, M, K]
  bool wide;
  bool pairs;  // K is even, and the addresses of points allow reading two at once

  struct Query {
    int64_t first_point;
  };
  struct Two {
    Pack<AccOf<T>, 4> locations;
    Pack<AccOf<T>, 2> weights;
  };

  __device__ Query open(const Problem& problem, const Part& part, int query, bool,
                        const Teams&) const {
    return {part.first_point(problem) + int64_t{query} * (problem.heads * problem.points)};
  }
  // The same, given the first point of the first query of the block.
  __device__ Query open_at(const Problem& problem, int64_t first_point, int query) const {
    return {first_point + wide_product(query, problem.heads * problem.points)};
  }
  __device__ Query reopen(const Problem& problem, int64_t batch, int64_t query, int head) const {
    return find(problem, batch, query, head);
  }
  __device__ Query find(const Problem& problem, int64_t batch, int64_t query, int head) const {
    return {problem.point_at(batch, query, head)};
  }
  __device__ Pack<AccOf<T>, 2> location(const Query& query, int k, int, const BlockLevels&) const {
    return load<2>(locations + 2 * (query.first_point + k));
  }
  __device__ AccOf<T> weight(const Query& query, int k) const {
    const int64_t point = query.first_point + k;
    return wide ? static_cast<const AccOf<T>*>(weights)[point]
                : static_cast<AccOf<T>>(static_cast<const T*>(weights)[point]);
  }
  __device__ Sample<AccOf<T>> at(const Query& query, int k, int level,
                                 const BlockLevels& levels) const {
    const auto place = location(query, k, level, levels);
    return {place.at[0], place.at[1], weight(query, k)};
  }
  __device__ Two read_two(const Query& query, int k, bool next) const {
    const int64_t point = query.first_point + k;
    return {load_two<2>(locations, point, pairs, next),
            load_two_of<1, T>(weights, wide, point, pairs, next)};
  }
  __device__ Sample<AccOf<T>> of_two(const Query&, const Two& two, bool second, int,
                                     const BlockLevels&) const {
    const auto& at = two.locations.at;
    return {second ? at[2] : at[0], second ? at[3] : at[1],
            second ? two.weights.at[1] : two.weights.at[0]};
  }
};

// Numbers of a Frame, which the kernels read in place of a rotated box: sines and cosines take registers
// that the pixels need. With a, b the sides of the box as vectors, (w cos, w sin) and (-h sin, h cos):
// (cx, cy, a.x, b.y, b.x, a.y). For an angle of 0 the first four are the box and the last two are 0.
constexpr int kFrame = 6;

// Points of a fused call: offsets from reference points or boxes, and logits whose softmax over all
// points of a query and head gives the weights. Locations and weights are never written to memory.
template <typename T>
struct FusedPoints {
  static constexpr bool kFused = true;
  using Gradients = FusedPointGradients<T>;
  using Acc = AccOf<T>;
  static constexpr bool kReadsPixels = sizeof(Acc) == 4;

  const Acc* reference;  // [B, Q, L or 1, 2, 4 or 6]: (x, y), (x, y, width, height), or the Frame
                         // of a rotated box
  const void* offsets;   // [B, Q, M, K, 2]: in pixels, or in parts of the box
  const void* logits;    // [B, Q, M, K]
  Acc* statistics;       // [B, Q, M, 2], for `reopen`; null: not needed
  Acc offset_scale;
  int reference_levels;
  int reference_size;
  bool wide;   // offsets and logits have acc_dtype, not the dtype of value
  bool pairs;  // as in GivenPoints

  struct Two {
    Pack<Acc, 4> offsets;
    Pack<Acc, 2> logits;
  };
  struct Query {
    int64_t first_point;
    int64_t item;              // batch * queries + query
    Acc largest, inverse_sum;  // of the logits, and of their exponentials
  };

  __device__ Acc logit(int64_t point) const {
    return wide ? static_cast<const Acc*>(logits)[point]
                : static_cast<Acc>(static_cast<const T*>(logits)[point]);
  }
  // Whether each lane of a team can read its logits at once, as four neighbours. Not in float64, which has no
  // registers for them.
  __device__ bool reads_fours(int points, int lanes) const {
    return points % 4 == 0 && points <= 4 * lanes && reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  }
  __device__ Pack<Acc, 4> four_logits(int64_t point) const {
    if (wide) return load<4>(static_cast<const Acc*>(logits) + point);
    const auto narrow = load<4>(static_cast<const T*>(logits) + point);
    Pack<Acc, 4> numbers;
#pragma unroll
    for (int i = 0; i < 4; ++i) numbers.at[i] = static_cast<Acc>(narrow.at[i]);
    return numbers;
  }
  __device__ Pack<Acc, 2> offset(int64_t point) const {
    if (wide) return load<2>(static_cast<const Acc*>(offsets) + 2 * point);
    const auto narrow = load<2>(static_cast<const T*>(offsets) + 2 * point);
    return {static_cast<Acc>(narrow.at[0]), static_cast<Acc>(narrow.at[1])};
  }
  __device__ Acc weight(const Query& query, int k) const {
    using std::exp;
    return exp(logit(query.first_point + k) - query.largest) * query.inverse_sum;
  }
  // The query's reference point or box of a level.
  __device__ const Acc* reference_of(int64_t item, int level) const {
    const int64_t row = item * reference_levels + (reference_levels > 1 ? level : 0);
    return reference + row * reference_size;
  }
  // An offset of 1, as a fraction of the side of a box.
  __device__ Acc portion(int level, const BlockLevels& levels) const {
    const int points = levels.first_point[level + 1] - levels.first_point[level];
    return offset_scale / static_cast<Acc>(max(points, 1));
  }
  // How far an offset of 1 along an axis moves the location along that axis.
  __device__ Acc step_of(int64_t item, int level, const BlockLevels& levels, int axis) const {
    if (reference_size >= 4) return reference_of(item, level)[2 + axis] * portion(level, levels);
    if constexpr (kReadsPixels) return levels.pixel[level].at[axis];
    const Level& map = levels.level[level];
    return Acc(1) / static_cast<Acc>(axis ? map.height : map.width);
  }
  // How far an offset of 1 along the other axis moves the location along an axis; rotated boxes only.
  __device__ Acc step_across(int64_t item, int level, const BlockLevels& levels, int axis) const {
    return reference_of(item, level)[4 + axis] * portion(level, levels);
  }
  __device__ bool rotated() const { return reference_size == kFrame; }
  __device__ Query open(const Problem& problem, const Part& part, int query, bool present,
                        const Teams& teams) const {
    using std::exp;
    Query opened;
    opened.first_point =
        part.first_point(problem) + int64_t{query} * (problem.heads * problem.points);
    opened.item = part.first_item(problem) + query;
    opened.largest = -INFINITY;
    const int first = teams.round_of(teams.lane), count = present ? problem.points : 0;
    bool fours = false;
    [[maybe_unused]] Pack<float, 4> own;
    if constexpr (sizeof(Acc) == 4) {
      fours = reads_fours(problem.points, teams.lanes());
      own = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
      if (fours && 4 * first < count) own = four_logits(opened.first_point + 4 * first);
      opened.largest = max(max(own.at[0], own.at[1]), max(own.at[2], own.at[3]));
    }
#pragma unroll 1  // unrolled, the kernel spills registers
    for (int k = first; !fours && k < count; k += teams.lanes()) {
      opened.largest = max(opened.largest, logit(opened.first_point + k));
    }
    for (int step = teams.count(); step < kWarp; step *= 2) {
      opened.largest = max(opened.largest, __shfl_xor_sync(kAllLanes, opened.largest, step));
    }
    Acc sum = 0;
    if constexpr (sizeof(Acc) == 4) {
#pragma unroll
      for (int i = 0; fours && i < 4; ++i) sum += exp(own.at[i] - opened.largest);
    }
#pragma unroll 1
    for (int k = first; !fours && k < count; k += teams.lanes()) {
      sum += exp(logit(opened.first_point + k) - opened.largest);
    }
    for (int step = teams.count(); step < kWarp; step *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, step);
    }
    opened.inverse_sum = Acc(1) / sum;
    if (statistics && present && teams.lane < teams.count()) {
      const int64_t at = 2 * (opened.item * problem.heads + part.head);
      *reinterpret_cast<Pack<Acc, 2>*>(statistics + at) = {opened.largest, opened.inverse_sum};
    }
    return opened;
  }
  __device__ Query reopen(const Problem& problem, int64_t batch, int64_t query, int head) const {
    Query opened = find(problem, batch, query, head);
    const auto kept = load<2>(statistics + 2 * (opened.item * problem.heads + head));
    opened.largest = kept.at[0];
    opened.inverse_sum = kept.at[1];
    return opened;
  }
  __device__ Query find(const Problem& problem, int64_t batch, int64_t query, int head) const {
    return {problem.point_at(batch, query, head), batch * problem.queries + query, 0, 0};
  }
  // Calls to step_of instead of this code make the float64 kernels spill registers.
  __device__ Pack<Acc, 2> location(const Query& query, int k, int level,
                                   const BlockLevels& levels) const {
    return moved(query, [&] { return offset(query.first_point + k); }, level, levels);
  }
  // `offset_of`: returns the offset.
  template <typename OffsetOf>
  __device__ Pack<Acc, 2> moved(const Query& query, const OffsetOf& offset_of, int level,
                                const BlockLevels& levels) const {
    const Acc* const from = reference_of(query.item, level);
    Pack<Acc, 2> step;
    const Pack<Acc, 2> by = offset_of();
    if (reference_size >= 4) {
      const Acc part = portion(level, levels);
      step = {from[2] * part, from[3] * part};
      if (rotated()) {
        const Acc x = Numbers<Acc>::multiply_add(by.at[1], from[4] * part, from[0]);
        const Acc y = Numbers<Acc>::multiply_add(by.at[0], from[5] * part, from[1]);
        return {Numbers<Acc>::multiply_add(by.at[0], step.at[0], x),
                Numbers<Acc>::multiply_add(by.at[1], step.at[1], y)};
      }
    } else {
      if constexpr (kReadsPixels) {
        step = levels.pixel[level];
      } else {
        step = {Acc(1) / static_cast<Acc>(levels.level[level].width),
                Acc(1) / static_cast<Acc>(levels.level[level].height)};
      }
    }
    return {Numbers<Acc>::multiply_add(by.at[0], step.at[0], from[0]),
            Numbers<Acc>::multiply_add(by.at[1], step.at[1], from[1])};
  }
  __device__ Sample<Acc> at(const Query& query, int k, int level, const BlockLevels& levels) const {
    const Pack<Acc, 2> place = location(query, k, level, levels);
    return {place.at[0], place.at[1], weight(query, k)};
  }
  __device__ Two read_two(const Query& query, int k, bool next) const {
    const int64_t point = query.first_point + k;
    return {load_two_of<2, T>(offsets, wide, point, pairs, next),
            load_two_of<1, T>(logits, wide, point, pairs, next)};
  }
  __device__ Sample<Acc> of_two(const Query& query, const Two& two, bool second, int level,
                                const BlockLevels& levels) const {
    const auto& at = two.offsets.at;
    const Pack<Acc, 2> by = {second ? at[2] : at[0], second ? at[3] : at[1]};
    const Pack<Acc, 2> place = moved(query, [&] { return by; }, level, levels);
    using std::exp;
    const Acc logit = second ? two.logits.at[1] : two.logits.at[0];
    return {place.at[0], place.at[1], exp(logit - query.largest) * query.inverse_sum};
  }
};

// Which rows of an image are masked. The address of its part is computed where there is a mask.
struct ImageMask {
  const uint8_t* rows;  // of all images; null: no row is masked
  int64_t first;        // row of the image

  __device__ explicit operator bool() const { return rows; }
  template <typename Row>
  __device__ bool operator[](Row row) const {
    return rows[first + row];
  }
};

__device__ inline ImageMask mask_of(const LevelTable& table, const Problem& problem,
                                    int64_t batch) {
  return {table.mask, batch * problem.rows};
}

// `foot`: the pixels of a point in a level. A masked pixel is dropped as if it were off the map. Row: unsigned
// where the rows of value fit, else int64_t; off the map it may wrap.
template <typename Row, typename Acc>
__device__ void find_pixels(Footprint<Acc>& foot, Acc x, Acc y, const Level& level,
                            const ImageMask& mask) {
  foot.place(x, y, level.height, level.width);
  const uint8_t* const masked = mask ? mask.rows + mask.first : nullptr;
  if (!masked) return;
  const Row first = static_cast<Row>(level.start) + static_cast<Row>(foot.y) * level.width + foot.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    foot.on[i] = foot.on[i] && !masked[first + (i & 1) + (i & 2 ? level.width : 0)];
  }
}

// Of a point that has pixels on the map: bit i where pixel i is on the map, and not masked. Fewer instructions
// than Footprint::on.
template <typename Acc>
__device__ unsigned pixels_on(const Footprint<Acc>& foot, const Level& level,
                              const ImageMask& mask) {
  const unsigned columns = (foot.x >= 0 ? 1u : 0) | (foot.x + 1 < level.width ? 2u : 0);
  unsigned on = (foot.y >= 0 ? columns : 0) | (foot.y + 1 < level.height ? columns << 2 : 0);
  if (!mask) return on;
  const int64_t first = level.start + int64_t{foot.y} * level.width + foot.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (on >> i & 1 && mask[first + (i & 1) + (i & 2 ? level.width : 0)]) on &= ~(1u << i);
  }
  return on;
}

// Points that a warp stages in shared memory at a time.
template <typename Acc>
constexpr int kStaged = sizeof(Acc) == 8 ? 32 : 64;

// The four pixels of a point. Offset: unsigned where the offsets into value fit, else int64_t.
template <typename Acc, typename Offset>
struct Corner {
  static constexpr Offset kNone = static_cast<Offset>(-1);
  Pack<Offset, 4> at;   // of the pixel's first channel, in units of a load; kNone: not on the map
  Pack<Acc, 4> weight;  // bilinear weight times attention weight
};

// Corners in shared memory. Offsets and weights lie apart: lanes that read corners one after the other
// then have no bank conflicts.
template <typename Acc, typename Offset, int kCount>
struct Corners {
  Pack<Offset, 4> at[kCount];
  Pack<Acc, 4> weight[kCount];

  __device__ void set(int i, const Corner<Acc, Offset>& corner) {
    at[i] = corner.at;
    weight[i] = corner.weight;
  }
  __device__ Corner<Acc, Offset> operator[](int i) const { return {at[i], weight[i]}; }
};

// The level of point k of a query, given the level of an earlier point.
__device__ inline int level_of(int k, int level, const BlockLevels& levels) {
  while (k >= levels.first_point[level + 1]) ++level;
  return level;
}

// `row_stride`: from a row of value to the next, in the unit of Corner::at. Masked pixels are dropped
// as in find_pixels. Each kernel uses the function with which it spills no register.
template <typename Acc, typename Offset>
__device__ Corner<Acc, Offset> corner_of(Footprint<Acc>& foot, const Level& level, Acc weight,
                                         Offset row_stride, const ImageMask& mask = {}) {
  using Corner = deform_attn::Corner<Acc, Offset>;
  Corner corner;
  const Offset left =
      static_cast<Offset>(level.start) + static_cast<Offset>(foot.y) * level.width + foot.x;
  const auto row_of = [&](int i) { return left + (i & 1) + (i & 2 ? level.width : 0); };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    corner.at.at[i] = foot.on[i] ? row_of(i) * row_stride : Corner::kNone;
    corner.weight.at[i] = foot.weight(i) * weight;
  }
  if (mask) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (corner.at.at[i] == Corner::kNone || !mask[row_of(i)]) continue;
      foot.on[i] = false;
      corner.at.at[i] = Corner::kNone;
    }
  }
  return corner;
}

// The gradients of a point's coordinates and weight, from the dot products of its four pixels with
// grad_output.
template <typename Acc>
__device__ Sample<Acc> point_gradient(const Footprint<Acc>& foot, const Level& level, Acc weight,
                                      const Acc (&dot)[4]) {
  Sample<Acc> gradient;
  foot.pull_back(dot, gradient.weight, gradient.x, gradient.y);
  gradient.x *= weight * static_cast<Acc>(level.width);
  gradient.y *= weight * static_cast<Acc>(level.height);
  return gradient;
}

}  // namespace deform_attn
