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

// The first point of vector `index` of a query's points: the last vector begins earlier where it would
// exceed the points.
template <int kLanes>
DEFORM_ATTN_INLINE int first_of_vector(int index, int count) {
  const int first = index * kLanes;
  return count >= kLanes && count - first < kLanes ? count - kLanes : first;
}

// The level of each point of a query; the same for all queries.
template <typename Acc>
struct PointLevels {
  static constexpr int kLanes = kNativeLanes<Acc>;
  using Int = typename VectorNumbers<Acc, kLanes>::IntLane;

  // Of a vector of points. Points of an empty level have a NaN as their location.
  struct Lanes {
    Acc width[kLanes], height[kLanes];  // NaN: the level is empty
    Int last_column[kLanes], last_row[kLanes];
    int32_t pitch[kLanes];  // elements from one row of pixels to the next
    int32_t start[kLanes];  // elements from pixel 0 of the image to the level's
  };
  Lanes* lanes;
  int32_t stride;                   // elements from one pixel to the next
  int32_t *height, *width, *start;  // [heads * points]; of value, `start` in rows
  // Of a call with a mask, for the current image: its rows of the mask, and the size of the rectangle at
  // the top left of each level that holds no masked pixel. Padding is usually to the right and below.
  const uint8_t* mask = nullptr;
  int32_t *clear_height, *clear_width;

  PointLevels(Arena& arena, const Inputs& in, int heads)
      : stride(
            static_cast<int32_t>(in.copy ? heads * in.problem.head_dim : in.problem.row_stride())),
        in_(in),
        heads_(heads) {
    const int points = heads * in.problem.points;
    const int64_t count = padded<float>(points);
    const int vectors = (points + kLanes - 1) / kLanes;
    lanes = arena.take<Lanes>(vectors);
    height = arena.take<int32_t>(count);
    width = arena.take<int32_t>(count);
    start = arena.take<int32_t>(count);
    clear_height = arena.take<int32_t>(in.mask ? count : 0);
    clear_width = arena.take<int32_t>(in.mask ? count : 0);
    if (height == nullptr) return;
    for (int64_t i = 0; i < count && in.mask; ++i) clear_height[i] = clear_width[i] = 0;
    for (int64_t i = 0; i < count; ++i) height[i] = width[i] = start[i] = 0;
    for (int head = 0, i = 0; head < heads; ++head) {
      for (int l = 0; l < in.problem.levels; ++l) {
        for (int k = in.first_point[l]; k < in.first_point[l + 1]; ++k, ++i) {
          height[i] = in.levels[l].height;
          width[i] = in.levels[l].width;
          start[i] = static_cast<int32_t>(in.levels[l].start);
        }
      }
    }
    for (int vector = 0; vector < vectors; ++vector) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int i = first_of_vector<kLanes>(vector, points) + lane;
        const bool empty = height[i] == 0 || width[i] == 0;
        Lanes& to = lanes[vector];
        to.width[lane] = empty ? static_cast<Acc>(NAN) : static_cast<Acc>(width[i]);
        to.height[lane] = empty ? static_cast<Acc>(NAN) : static_cast<Acc>(height[i]);
        to.last_column[lane] = empty ? 0 : width[i] - 1;
        to.last_row[lane] = empty ? 0 : height[i] - 1;
        to.pitch[lane] = width[i] * stride;
        to.start[lane] = start[i] * stride;
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
    if (offset == nullptr) return;
    // pull_back computes with the lanes behind the points too: slowly where they hold subnormal numbers
    for (int64_t i = points; i < count; ++i) {
      right[i] = down[i] = weight[i] = 0;
      for (auto& pixel : on) pixel[i] = 0;
    }
  }

  // Sets `reach` for a band of rows. A point is owned by the band of its upper pixels; without a
  // pixel on the map, by band 0. `adds`: whether the gradient of value is requested.
  DEFORM_ATTN_INLINE void reach_of(const PointLevels<Acc>& levels, int band, int bands, bool adds,
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
  DEFORM_ATTN_INLINE void place(const PointLevels<Acc>& levels, const Acc* locations,
                                const Weight* weights, int count) {
    constexpr int kLanes = kNativeLanes<Acc>;
    using N = VectorNumbers<Acc, kLanes>;
    using V = typename N::Acc;
    using I = typename N::Int;
    using Rows = Vec<int32_t, kLanes>;
    const auto rows_of = [](I lanes)
                             DEFORM_ATTN_INLINED { return __builtin_convertvector(lanes, Rows); };
    const auto* level = levels.lanes;
    // copies, which the compiler need not load again after each store
    const uint8_t* const mask = levels.mask;
    const int32_t stride = levels.stride;
    Quad<Acc>* const to_share = share;
    Quad<int32_t>* const to_offset = offset;
    for (int vector = 0; vector * kLanes < count; ++vector, ++level) {
      const int i = first_of_vector<kLanes>(vector, count);
      V x_location, y_location, attention;
      if (count >= kLanes) {
        load_xy<kLanes>(locations + 2 * i, x_location, y_location);
        attention = load<kLanes>(weights + i);
      } else {
        Acc xy[2 * kLanes] = {};
        std::memcpy(xy, locations, 2 * sizeof(Acc) * static_cast<size_t>(count));
        load_xy<kLanes>(xy, x_location, y_location);
        attention = load_some<kLanes>(weights, count);
      }
      const auto x = N::axis(x_location, load<kLanes>(level->width),
                             load_lanes<I, kLanes>(level->last_column));
      const auto y =
          N::axis(y_location, load<kLanes>(level->height), load_lanes<I, kLanes>(level->last_row));
      const V before = N::where(x.on, 1 - x.fraction), after = N::where(x.next_on, x.fraction);
      const V above = N::where(y.on, (1 - y.fraction) * attention);
      const V below = N::where(y.next_on, y.fraction * attention);
      const V shares[4] = {before * above, after * above, before * below, after * below};
      store_quads<kLanes, Acc>(to_share[i], shares);

      const I hit_x = x.on | x.next_on, hit = hit_x & (y.on | y.next_on);
      const Rows column = rows_of(x.pixel & x.on), row = rows_of(y.pixel & y.on);
      // to the neighbours, where both pixels along the axis are on the map
      const Rows both_across = rows_of(x.on & x.next_on), both_along = rows_of(y.on & y.next_on);
      const Rows pitch = load_lanes<Rows, kLanes>(level->pitch);
      const Rows to_right = both_across & stride, to_lower = both_along & pitch;
      const Rows corner = (column * stride + load_lanes<Rows, kLanes>(level->start) + row * pitch) |
                          rows_of(~hit);  // -1: none
      const Rows lower = corner + to_lower;
      const Rows offsets[4] = {corner, corner + to_right, lower, lower + to_right};
      store_quads<kLanes, int32_t>(to_offset[i], offsets);
      if constexpr (kBackward) {
        store<kLanes>(right + i, N::where(hit_x, x.fraction));
        store<kLanes>(down + i, N::where(hit, y.fraction));
        store<kLanes>(weight + i, attention);
        store_lanes<kLanes>(on[0] + i, y.on & x.on);
        store_lanes<kLanes>(on[1] + i, y.on & x.next_on);
        store_lanes<kLanes>(on[2] + i, y.next_on & x.on);
        store_lanes<kLanes>(on[3] + i, y.next_on & x.next_on);
        store_lanes<kLanes>(top + i, hit & y.pixel);
      }
      if (mask) {
        // copies, so that without a mask the vectors need not be in memory
        const Rows across = both_across, along = both_along, rows = row, columns = column;
        int32_t suspect[kLanes];
        store_lanes<kLanes>(
            suspect,
            hit & (N::mask(x.pixel >= load_lanes<I, kLanes>(levels.clear_width + i) - 1) |
                   N::mask(y.pixel >= load_lanes<I, kLanes>(levels.clear_height + i) - 1)));
        for (int lane = 0; lane < kLanes && lane < count; ++lane) {
          if (!suspect[lane]) continue;
          const int k = i + lane;
          const int32_t pixel = levels.start[k] + rows[lane] * levels.width[k] + columns[lane];
          drop_masked<kBackward>(mask + pixel, k, across[lane] & 1, along[lane] & levels.width[k]);
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
  DEFORM_ATTN_INLINE void pull_back(const PointLevels<Acc>& levels, const Quad<Acc>* products,
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
