// Where sampling points come from, and the table through which the lanes of a warp share them.
//
//   Sample        location and weight of one point
//   GivenPoints   points as the caller's locations and weights
//   Teams         which (query, head) a lane works for, and on which of its channels
//   Part          which queries, head and channels a block works on
//   Corner        the four pixels of a point and what each counts for
#pragma once

#include "../bilinear.h"
#include "levels.cuh"

namespace deform_attn {

template <typename Sum>
struct Sample {
  Sum x, y, weight;
};

// Weights have the dtype of `value`, or that of the sums where `wide`.
template <typename T>
struct GivenPoints {
  const Real<T>* locations;  // [B, Q, M, K, 2]
  const void* weights;       // [B, Q, M, K]
  bool wide;

  __device__ Sample<Real<T>> at(int64_t point) const {
    const auto location = load<2>(locations + 2 * point);
    return {location.at[0], location.at[1],
            wide ? static_cast<const Real<T>*>(weights)[point]
                 : static_cast<Real<T>>(static_cast<const T*>(weights)[point])};
  }
};

// Where the gradients of given points go.
template <typename T>
struct GivenPointGradients {
  Real<T>* locations;
  void* weights;
  bool wide;

  __device__ void set(int64_t point, Real<T> x, Real<T> y, Real<T> weight) const {
    *reinterpret_cast<Pack<Real<T>, 2>*>(locations + 2 * point) = {x, y};
    if (wide) {
      static_cast<Real<T>*>(weights)[point] = weight;
    } else {
      static_cast<T*>(weights)[point] = static_cast<T>(weight);
    }
  }
};

// A warp works on 32 >> lane_bits queries of one head at a time, with 1 << lane_bits lanes each.
struct Teams {
  int lane_bits;
  int lane;  // of the warp

  __device__ int lanes() const { return 1 << lane_bits; }
  __device__ int count() const { return kWarp >> lane_bits; }
  __device__ int team() const { return lane >> lane_bits; }
  __device__ int channel_lane() const { return lane & (lanes() - 1); }
};

// The block's part of the work: `count` queries of one image and head, from `first` on in the order
// of visits, and the channels from `channel` on.
struct Part {
  int64_t batch;
  int64_t first;
  int head;
  int channel;
  int count;
};

// Blocks are numbered with the channels and then the head fastest, so that blocks which run
// together read the same stretch of `value`, locations and weights.
__device__ inline Part part_of(int64_t block, const Problem& problem, int positions, int channels) {
  const int64_t parts = (problem.queries + positions - 1) / positions;
  const int pieces = (problem.head_dim + channels - 1) / channels;
  const int channel = static_cast<int>(block % pieces) * channels;
  block /= pieces;
  const int head = static_cast<int>(block % problem.heads);
  block /= problem.heads;
  const int64_t first = block % parts * positions;
  const int64_t left = problem.queries - first;
  return {block / parts, first, head, channel, static_cast<int>(min(left, int64_t{positions}))};
}

// Points that a warp shares at a time.
template <typename Sum>
constexpr int kStaged = sizeof(Sum) == 8 ? 32 : 64;

// Offset: int where every offset into `value` fits, int64_t elsewhere.
template <typename Sum, typename Offset>
struct alignas(16) Corner {
  Offset at[4];   // of the pixel's first channel; -1: not on the map
  Sum weight[4];  // bilinear weight times attention weight
};

// The level of point k of a query, given the level of an earlier point.
__device__ inline int level_of(int k, int level, const BlockLevels& levels) {
  while (k >= levels.first_point[level + 1]) ++level;
  return level;
}

template <typename Sum, typename Offset>
__device__ Corner<Sum, Offset> corner_of(const Footprint<Sum>& foot, const Level& level, Sum weight,
                                         int64_t row_stride) {
  Corner<Sum, Offset> corner;
  const Offset left = static_cast<Offset>(level.start) +
                      static_cast<Offset>(foot.y) * level.width + foot.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Offset row = left + (i & 1) + (i & 2 ? level.width : 0);
    corner.at[i] = foot.on[i] ? row * static_cast<Offset>(row_stride) : Offset{-1};
    corner.weight[i] = foot.weight(i) * weight;
  }
  return corner;
}

}  // namespace deform_attn
