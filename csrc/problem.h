// The sizes of a call and the place of each element. Shared by CPU and CUDA, free of torch.
//
//   Level      where one feature map lies in the rows of `value`
//   LevelTable the levels of a call as a kernel's parameter: host numbers, device tensors, or both
//   Problem    the sizes, and every offset
//   Type       dtypes of value
//   Fused      where points come from instead of locations and weights
#pragma once

#include <cstdint>

#include "host_device.h"

namespace deform_attn {

constexpr int kMaxLevels = 64;  // levels that a LevelTable holds

struct Level {
  int64_t start;  // row of pixel (0, 0)
  int height;     // 0: the level is empty, every sample of it is zero
  int width;
};

// The level, or an empty one where the numbers do not fit into `rows`. Kernels read level sizes
// that may lie on the device, where nobody checked them: a lie then gives zeros, never a stray read.
HOST_DEVICE Level fitted(int64_t start, int64_t height, int64_t width, int64_t rows) {
  const int64_t limit = int64_t{1} << 31;
  const bool fits = height > 0 && width > 0 && height < limit && width < limit && start >= 0 &&
                    start <= rows && height <= (rows - start) / width;
  return fits ? Level{start, static_cast<int>(height), static_cast<int>(width)} : Level{0, 0, 0};
}

struct LevelTable {
  int count;                   // number of levels
  const int64_t* shapes;       // [L, 2] (height, width) on the device; null: see `height`, `width`
  const int64_t* starts;       // [L] on the device; null: see `start`
  int64_t height[kMaxLevels];  // where shapes is null
  int64_t width[kMaxLevels];
  int64_t start[kMaxLevels];        // where starts is null; -1: directly behind the level before
  int first_point[kMaxLevels + 1];  // level l has points first_point[l] .. first_point[l + 1] - 1
};

struct Problem {
  int64_t batch;
  int64_t rows;     // of value: S
  int64_t queries;  // Q
  int heads;        // M
  int head_dim;     // D
  int levels;       // L
  int points;       // of a query and head, over all levels: K

  // value [batch, rows, heads, head_dim]
  HOST_DEVICE int64_t row_stride() const { return int64_t{heads} * head_dim; }
  HOST_DEVICE int64_t value_at(int64_t b, int64_t row, int head) const {
    return (b * rows + row) * row_stride() + int64_t{head} * head_dim;
  }
  // output [batch, queries, heads, head_dim]
  HOST_DEVICE int64_t output_at(int64_t b, int64_t query, int head) const {
    return (b * queries + query) * row_stride() + int64_t{head} * head_dim;
  }
  // attention_weights [batch, queries, heads, points]; sampling_locations has two numbers (x, y) a point
  HOST_DEVICE int64_t point_at(int64_t b, int64_t query, int head) const {
    return ((b * queries + query) * heads + head) * points;
  }
};

// Dtypes of value.
enum class Type { kDouble, kFloat, kHalf, kBFloat16 };

// Locations and weights may come from a layer's projections: locations are then offsets from a
// query's reference points, weights the logits of a softmax over its points.
struct Fused {
  const void* reference;  // [B, Q, levels, size] in the type of sums; null: no layer
  int levels;             // 1: the same for all
  int size;               // 2: (x, y); 4: (cx, cy, w, h)
  double offset_scale;    // of a box: its side * offset_scale / points of the level is one offset
};

}  // namespace deform_attn
