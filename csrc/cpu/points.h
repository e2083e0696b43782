// The sampling points of a query: the offsets of their pixels in value, and the weights.
//
//   Arena         arrays in a thread's working memory
//   PointLevels   for each point of a query, the size and place of its level
//   Points        the placed points: offsets and shares; `place` before, `pull_back` after a pass
//
// The points of all heads of a query are placed in one loop, a vector of points at a time.
#pragma once

#include "../bilinear.h"
#include "kernels.h"
#include "simd.h"

namespace deform_attn::cpu {
namespace {  // compiled once for each instruction set, so never shared between them

// Takes arrays, aligned to cache lines, from a block of memory. With null it only counts bytes.
class Arena {
 public:
  explicit Arena(void* bytes) : bytes_(static_cast<char*>(bytes)) {}
  template <typename T>
  T* take(int64_t count) {
    char* at = bytes_ ? bytes_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  char* bytes_;
  size_t used_ = 0;
};

// Arrays are filled by whole vectors: `count` rounded up to them.
template <typename Acc>
int64_t padded(int64_t count) {
  constexpr int64_t kLanes = kNativeLanes<Acc>;
  return (count + kLanes - 1) / kLanes * kLanes;
}

// Integers in memory to and from a vector of integers of another width.
template <typename I, int kLanes, typename Integer>
DEFORM_ATTN_INLINE I load_lanes(const Integer* from) {
  Vec<Integer, kLanes> lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return __builtin_convertvector(lanes, I);
}
template <int kLanes, typename I>
DEFORM_ATTN_INLINE void store_lanes(int32_t* to, I from) {
  const auto lanes = __builtin_convertvector(from, Vec<int32_t, kLanes>);
  std::memcpy(to, &lanes, sizeof(lanes));
}

// The level of each point of a query; the same for all queries.
struct PointLevels {
  int32_t *height, *width, *start;  // [heads * points]
  int32_t* pitch;                   // elements from one row of pixels to the next
  int32_t stride;                   // elements from one pixel to the next
  // Of a call with a mask, for the current image: its rows of the mask, and the size of the rectangle at
  // the top left of each level that holds no masked pixel. Padding is usually to the right and below.
  const uint8_t* mask = nullptr;
  int32_t *clear_height, *clear_width;

  PointLevels(Arena& arena, const Inputs& in, int heads)
      : stride(static_cast<int32_t>(in.problem.row_stride())), in_(in), heads_(heads) {
    const int64_t count = padded<float>(int64_t{heads} * in.problem.points);
    height = arena.take<int32_t>(count);
    width = arena.take<int32_t>(count);
    start = arena.take<int32_t>(count);
    pitch = arena.take<int32_t>(count);
    clear_height = arena.take<int32_t>(in.mask ? count : 0);
    clear_width = arena.take<int32_t>(in.mask ? count : 0);
    if (height == nullptr) return;
    for (int64_t i = 0; i < count && in.mask; ++i) clear_height[i] = clear_width[i] = 0;
    for (int64_t i = 0; i < count; ++i) height[i] = width[i] = start[i] = pitch[i] = 0;
    for (int head = 0, i = 0; head < heads; ++head) {
      for (int l = 0; l < in.problem.levels; ++l) {
        for (int k = in.first_point[l]; k < in.first_point[l + 1]; ++k, ++i) {
          height[i] = in.levels[l].height;
          width[i] = in.levels[l].width;
          start[i] = static_cast<int32_t>(in.levels[l].start);
          pitch[i] = width[i] * stride;
        }
      }
    }
  }

  // Prepares for the points of an image.
  void enter(int64_t batch) {
    if (in_.mask == nullptr) return;
    const uint8_t* of_image = in_.mask + batch * in_.problem.rows;
    if (of_image == mask) return;
    mask = of_image;
    for (int l = 0; l < in_.problem.levels; ++l) {
      const Level& level = in_.levels[l];
      const uint8_t* from = mask + level.start;
      const auto clear = [](const uint8_t* at, int count) {
        int i = 0;
        while (i < count && !at[i]) ++i;
        return i;
      };
      const int across = clear(from, level.width);
      int down = 0;
      while (down < level.height && clear(from + int64_t{down} * level.width, across) == across) {
        ++down;
      }
      for (int head = 0; head < heads_; ++head) {
        for (int k = in_.first_point[l]; k < in_.first_point[l + 1]; ++k) {
          clear_height[head * in_.problem.points + k] = down;
          clear_width[head * in_.problem.points + k] = across;
        }
      }
    }
  }

 private:
  const Inputs& in_;
  int heads_;
};

// What a share of the backward pass computes of a point.
enum Reach : int32_t {
  kOwned = 1,  // the gradients of its location and weight
  kUpper = 2,  // what it adds to the gradients of its upper two pixels
  kLower = 4,  // what it adds to the gradients of its lower two pixels
};

// A number for each of a point's four pixels.
template <typename Number>
using Quad = Number[4];

// The placed points of a query.
template <typename Acc>
struct Points {
  // Elements from pixel 0 of the image to each pixel. [0] < 0: no pixel of the point is on the map. A
  // pixel off the map has the offset of another pixel of the point, which can be read, and a share of 0.
  Quad<int32_t>* offset;
  Quad<Acc>* share;  // attention weight * bilinear weight

  // only in the backward pass
  Acc* right;  // fractions towards the next pixel
  Acc* down;
  Acc* weight;     // attention weight
  int32_t* on[4];  // all bits set: the pixel is on the map
  int32_t* top;    // row of the upper pixels, -1 .. height - 1
  int32_t* reach;  // flags of Reach; set by reach_of

  Points(Arena& arena, int64_t points, bool backward) {
    const int64_t count = padded<Acc>(points);
    offset = arena.take<Quad<int32_t>>(count);
    share = arena.take<Quad<Acc>>(count);
    if (!backward) return;
    right = arena.take<Acc>(count);
    down = arena.take<Acc>(count);
    weight = arena.take<Acc>(count);
    for (auto& pixel : on) pixel = arena.take<int32_t>(count);
    top = arena.take<int32_t>(count);
    reach = arena.take<int32_t>(count);
  }

  // Sets `reach` for a band of rows. A point is owned by the band of its upper pixels; without a
  // pixel on the map, by band 0. `adds`: whether the gradient of value is requested.
  DEFORM_ATTN_INLINE void reach_of(const PointLevels& levels, int band, int bands, bool adds,
                                   int count) {
    for (int i = 0; i < count; ++i) {
      const int32_t height = levels.height[i];
      const int64_t first = int64_t{height} * band / bands;
      const int64_t last = int64_t{height} * (band + 1) / bands;
      const int32_t upper = top[i] < 0 ? 0 : top[i];
      const int32_t lower = top[i] + 1 < height ? top[i] + 1 : height - 1;
      const bool has_upper = upper >= first && upper < last;
      const bool has_lower = lower >= first && lower < last;
      const bool owned = offset[i][0] < 0 ? band == 0 : has_upper;
      reach[i] = (owned ? kOwned : 0) | (adds && has_upper ? kUpper : 0) |
                 (adds && has_lower ? kLower : 0);
      // The pixels of an image row that are both masked have the offsets of the other row, which may lie
      // in this band.
      if (levels.mask) {
        if (!(on[0][i] | on[1][i])) reach[i] &= ~kUpper;
        if (!(on[2][i] | on[3][i])) reach[i] &= ~kLower;
      }
    }
  }

  // Computes the arrays above from `count` locations (x, y) and weights.
  template <bool kBackward, typename Weight>
  DEFORM_ATTN_INLINE void place(const PointLevels& levels, const Acc* locations,
                                const Weight* weights, int count) {
    constexpr int kLanes = kNativeLanes<Acc>;
    constexpr auto kIndices = std::make_integer_sequence<int, kLanes>();
    using Lanes = VectorNumbers<Acc, kLanes>;
    using V = typename Lanes::Acc;
    using I = typename Lanes::Int;
    for (int done = 0; done < count; done += kLanes) {
      // the last vector begins earlier where it would exceed the points
      const int i = count >= kLanes && count - done < kLanes ? count - kLanes : done;
      const int left = count - i;
      V first, second, attention;  // x0 y0 x1 y1 ...
      if (left >= kLanes) {
        first = load<kLanes>(locations + 2 * i);
        second = load<kLanes>(locations + 2 * i + kLanes);
        attention = load<kLanes>(weights + i);
      } else {
        first = load_some<kLanes>(locations + 2 * i, 2 * left < kLanes ? 2 * left : kLanes);
        second = load_some<kLanes>(locations + 2 * i + kLanes,
                                   2 * left < kLanes ? 0 : 2 * left - kLanes);
        attention = load_some<kLanes>(weights + i, left);
      }
      const I height = load_lanes<I, kLanes>(levels.height + i);
      const I width = load_lanes<I, kLanes>(levels.width + i);
      const I start = load_lanes<I, kLanes>(levels.start + i);
      I x, y;
      V across, along;
      const V places[2] = {every_second<0, Acc, kLanes>(first, second, kIndices),
                           every_second<1, Acc, kLanes>(first, second, kIndices)};
      const I hit = pixel_of<Lanes>(places[0], width, x, across) &
                    pixel_of<Lanes>(places[1], height, y, along);
      const I zero{};
      const I left_on = Lanes::mask(x >= zero), right_on = Lanes::mask(x + 1 < width);
      const I upper_on = Lanes::mask(y >= zero), lower_on = Lanes::mask(y + 1 < height);
      const V before = Lanes::where(left_on, 1 - across), after = Lanes::where(right_on, across);
      const V above = Lanes::where(upper_on, (1 - along) * attention);
      const V below = Lanes::where(lower_on, along * attention);
      const V shares[4] = {before * above, after * above, before * below, after * below};
      store_quads<kLanes, Acc>(share[i], shares);

      using Rows = Vec<int32_t, kLanes>;
      const auto rows_of = [](I lanes)
                               DEFORM_ATTN_INLINED { return __builtin_convertvector(lanes, Rows); };
      const Rows row =
          rows_of(((y & upper_on) * width + start + (x & left_on)) | ~hit);  // -1: none
      // to the neighbours, where both pixels along the axis are on the map
      const Rows both_across = rows_of(left_on & right_on),
                 both_along = rows_of(upper_on & lower_on);
      const Rows to_right = both_across & levels.stride;
      const Rows to_lower = both_along & load_lanes<Rows, kLanes>(levels.pitch + i);
      const Rows corner = row * levels.stride, lower = corner + to_lower;
      const Rows offsets[4] = {corner, corner + to_right, lower, lower + to_right};
      store_quads<kLanes, int32_t>(offset[i], offsets);
      if constexpr (kBackward) {
        store<kLanes>(right + i, across);
        store<kLanes>(down + i, along);
        store<kLanes>(weight + i, attention);
        store_lanes<kLanes>(on[0] + i, hit & upper_on & left_on);
        store_lanes<kLanes>(on[1] + i, hit & upper_on & right_on);
        store_lanes<kLanes>(on[2] + i, hit & lower_on & left_on);
        store_lanes<kLanes>(on[3] + i, hit & lower_on & right_on);
        store_lanes<kLanes>(top + i, y);
      }
      if (levels.mask) {
        int32_t suspect[kLanes];
        store_lanes<kLanes>(
            suspect, hit & (Lanes::mask(x + 1 >= load_lanes<I, kLanes>(levels.clear_width + i)) |
                            Lanes::mask(y + 1 >= load_lanes<I, kLanes>(levels.clear_height + i))));
        for (int lane = 0; lane < kLanes && lane < left; ++lane) {
          if (!suspect[lane]) continue;
          drop_masked<kBackward>(levels.mask + row[lane], i + lane, both_across[lane] & 1,
                                 both_along[lane] & levels.width[i + lane]);
        }
      }
    }
  }

  // Drops the masked pixels of point k as if they were off the map. `mask` begins at the first pixel;
  // `right` and `under`: from it to its neighbours on the map, or 0.
  template <bool kBackward>
  void drop_masked(const uint8_t* mask, int k, int32_t right, int32_t under) {
    const bool masked[4] = {mask[0] != 0, mask[right] != 0, mask[under] != 0,
                            mask[right + under] != 0};
    if (!(masked[0] | masked[1] | masked[2] | masked[3])) return;
    int32_t at[4];
    for (int i = 0; i < 4; ++i) {
      at[i] = -1;
      for (const int other : {i, i ^ 1, i ^ 2, i ^ 3}) {
        if (masked[other]) continue;
        at[i] = offset[k][other];
        break;
      }
      if (!masked[i]) continue;
      share[k][i] = 0;
      if (kBackward) on[i][k] = 0;
    }
    for (int i = 0; i < 4; ++i) offset[k][i] = at[i];
  }

  // products[k][i]: dot product of the output's gradient with pixel i of point k. Computes the
  // gradients of `count` locations (x, y) and weights. All arrays have room for whole vectors.
  DEFORM_ATTN_INLINE void pull_back(const PointLevels& levels, const Quad<Acc>* products,
                                    Acc* grad_locations, Acc* grad_weights, int count) const {
    constexpr int kLanes = kNativeLanes<Acc>;
    constexpr auto kIndices = std::make_integer_sequence<int, kLanes>();
    using Lanes = VectorNumbers<Acc, kLanes>;
    using V = typename Lanes::Acc;
    using I = typename Lanes::Int;
    for (int i = 0; i < count; i += kLanes) {
      Footprint<V, Lanes> at;
      at.right = load<kLanes>(right + i);
      at.down = load<kLanes>(down + i);
      for (int corner = 0; corner < 4; ++corner) {
        at.on[corner] = load_lanes<I, kLanes>(on[corner] + i);
      }
      V product[4], sample, grad_x, grad_y;
      load_quads<kLanes, Acc>(products[i], product);
      at.pull_back(product, sample, grad_x, grad_y);
      const V attention = load<kLanes>(weight + i);
      grad_x *= attention * Lanes::to_acc(load_lanes<I, kLanes>(levels.width + i));
      grad_y *= attention * Lanes::to_acc(load_lanes<I, kLanes>(levels.height + i));
      store<kLanes>(grad_weights + i, sample);
      store<kLanes>(grad_locations + 2 * i, zipped<false>(grad_x, grad_y, kIndices));
      store<kLanes>(grad_locations + 2 * i + kLanes, zipped<true>(grad_x, grad_y, kIndices));
    }
  }
};

}  // namespace
}  // namespace deform_attn::cpu
