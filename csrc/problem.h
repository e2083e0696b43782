// The sizes of a call and the offset of each element. Shared by CPU and CUDA, free of torch.
//
//   Level, fitted   one feature map: its size and its first row in `value`
//   LevelTable      all levels as a kernel parameter: numbers from the host, device tensors, or both;
//                   and which of their pixels are masked
//   Problem         the sizes of a call; offsets into its tensors
//   Type            dtypes of value
//   Fused           parameters of a call from reference points, offsets and logits
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

// The level, or an empty one where the numbers do not fit into `rows`. Level sizes on the device
// are not checked before a launch: an invalid level is treated as empty, and nothing is read out of
// bounds.
HOST_DEVICE Level fitted(int64_t start, int64_t height, int64_t width, int64_t rows) {
  const int64_t limit = int64_t{1} << 31;
  const bool fits = height > 0 && width > 0 && height < limit && width < limit && start >= 0 &&
                    start <= rows && height * width <= rows - start;
  return fits ? Level{start, static_cast<int>(height), static_cast<int>(width)} : Level{0, 0, 0};
}

struct LevelTable {
  int count;                   // number of levels
  const int64_t* shapes;       // [L, 2] (height, width) on the device; null: see `height`, `width`
  const int64_t* starts;       // [L] on the device; null: see `start`
  int64_t height[kMaxLevels];  // where shapes is null
  int64_t width[kMaxLevels];
  int64_t start[kMaxLevels];  // where starts is null; -1: the row after the previous level
  const uint8_t* mask;        // [batch, rows] on the device, 1: the row reads as zero; or null
  int first_point[kMaxLevels + 1];  // level l has points first_point[l] .. first_point[l + 1] - 1
  bool is_fitted;           // nothing is on the device, each level is `fitted`, and this is set:
  bool queries_are_pixels;  // query q is row q of value, as in an encoder
};

struct Problem {
  int64_t batch;
  int64_t rows;     // of value: S
  int64_t queries;  // Q
  int heads;        // M
  int head_dim;     // D
  int levels;       // L
  int points;       // of a query and head, all levels together: K

  // value [batch, rows, heads, head_dim]
  HOST_DEVICE int64_t row_stride() const { return int64_t{heads} * head_dim; }
  HOST_DEVICE int64_t value_at(int64_t b, int64_t row, int head) const {
    return (b * rows + row) * row_stride() + int64_t{head} * head_dim;
  }
  // output [batch, queries, heads, head_dim]
  HOST_DEVICE int64_t output_at(int64_t b, int64_t query, int head) const {
    return (b * queries + query) * row_stride() + int64_t{head} * head_dim;
  }
  // attention_weights [batch, queries, heads, points]; sampling_locations has (x, y) for each point
  HOST_DEVICE int64_t point_at(int64_t b, int64_t query, int head) const {
    return ((b * queries + query) * heads + head) * points;
  }
};

// Dtypes of value.
enum class Type { kDouble, kFloat, kHalf, kBFloat16 };

// A fused call: the kernel computes locations from reference points and offsets, and weights as the
// softmax of logits over the points of a query and head. The offsets take the place of the locations,
// the logits that of the weights.
struct Fused {
  const void* reference;  // [B, Q, levels, size] in the accumulation type; null: not a fused call
  int levels;             // L, or 1: one reference point for all levels
  int size;               // 2: (x, y); 4: (cx, cy, w, h); 5: (cx, cy, w, h, angle in radians)
  double offset_scale;    // boxes: an offset of 1 moves a point by
                          // side * offset_scale / number of points of the level
};

}  // namespace deform_attn
