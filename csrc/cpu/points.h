// The sampling points of a query: where their pixels lie in value, and with what share.
//
// All points of a query's heads are placed at once, in one loop that the compiler vectorises.
#pragma once

#include "../bilinear.h"
#include "kernels.h"
#include "simd.h"

namespace deform_attn::cpu {
namespace {  // compiled once for each instruction set, so never shared between them

constexpr size_t kAlignment = 64;

// Hands out aligned arrays from a block of bytes; with null it only counts them.
class Arena {
 public:
  explicit Arena(void* bytes) : bytes_(static_cast<char*>(bytes)) {}
  template <typename T>
  T* take(int64_t count) {
    char* at = bytes_ ? bytes_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  char* bytes_;
  size_t used_ = 0;
};

// Arrays are filled a vector at a time: room for whole vectors.
template <typename Real>
int64_t padded(int64_t count) {
  constexpr int64_t kLanes = kNativeLanes<Real>;
  return (count + kLanes - 1) / kLanes * kLanes;
}

// 32-bit integers to and from the integers that go with a vector of reals.
template <typename I, int kLanes>
DEFORM_ATTN_INLINE I load_lanes(const int32_t* from) {
  Vec<int32_t, kLanes> lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return __builtin_convertvector(lanes, I);
}
template <int kLanes, typename I>
DEFORM_ATTN_INLINE void store_lanes(int32_t* to, I from) {
  const auto lanes = __builtin_convertvector(from, Vec<int32_t, kLanes>);
  std::memcpy(to, &lanes, sizeof(lanes));
}

// Of every point of a query: its level. The same for all queries.
struct PointLevels {
  int32_t *height, *width, *start;  // [heads * points]

  PointLevels(Arena& arena, const Inputs& in, int heads) {
    const int64_t count = padded<float>(int64_t{heads} * in.problem.points);
    height = arena.take<int32_t>(count);
    width = arena.take<int32_t>(count);
    start = arena.take<int32_t>(count);
    if (height == nullptr) return;
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
  }
};

// What a share of the backward pass does with a point.
enum Reach : int32_t {
  kOwned = 1,  // writes its gradients of location and weight
  kUpper = 2,  // adds to the gradients of its upper pixels
  kLower = 4,  // adds to the gradients of its lower pixels
};

// The placed points of a query, an array a quantity.
template <typename Real>
struct Points {
  int32_t* row[4];  // of value, for each pixel; row[0] < 0: the point has no pixel
  Real* share[4];   // attention weight * bilinear weight; 0 for pixels off the map

  // for the backward pass alone
  Real* right;  // fractions towards the next pixel
  Real* down;
  Real* weight;    // attention weight
  int32_t* on;     // bit i: pixel i is on the map
  int32_t* top;    // row of the upper pixels, -1 .. height - 1
  int32_t* reach;  // where a share has a band of the rows: flags of Reach

  Points(Arena& arena, int64_t points, bool backward) {
    const int64_t count = padded<Real>(points);
    for (auto& array : row) array = arena.take<int32_t>(count);
    for (auto& array : share) array = arena.take<Real>(count);
    if (!backward) return;
    right = arena.take<Real>(count);
    down = arena.take<Real>(count);
    weight = arena.take<Real>(count);
    on = arena.take<int32_t>(count);
    top = arena.take<int32_t>(count);
    reach = arena.take<int32_t>(count);
  }

  // The point's place on its map, as far as Footprint::pull_back needs it.
  DEFORM_ATTN_INLINE Footprint<Real> footprint(int i) const {
    Footprint<Real> at;
    at.right = right[i];
    at.down = down[i];
    for (int pixel = 0; pixel < 4; ++pixel) at.on[pixel] = (on[i] >> pixel) & 1;
    return at;
  }

  // Which points a band of the rows has to do with. Points without a pixel belong to band 0.
  DEFORM_ATTN_INLINE void reach_of(const PointLevels& levels, int band, int bands, int count) {
    for (int i = 0; i < count; ++i) {
      const int32_t height = levels.height[i];
      const int64_t first = int64_t{height} * band / bands;
      const int64_t last = int64_t{height} * (band + 1) / bands;
      const int32_t upper = top[i] < 0 ? 0 : top[i];
      const int32_t lower = top[i] + 1 < height ? top[i] + 1 : height - 1;
      const bool has_upper = upper >= first && upper < last;
      const bool has_lower = lower >= first && lower < last;
      const bool owned = row[0][i] < 0 ? band == 0 : has_upper;
      reach[i] = (owned ? kOwned : 0) | (has_upper ? kUpper : 0) | (has_lower ? kLower : 0);
    }
  }

  // Place `count` points. An off-map pixel's row is that of a neighbour of the same point that is on
  // the map: it can be read, and a share of 0 leaves it out.
  template <bool kBackward, typename Weight>
  DEFORM_ATTN_INLINE void place(const PointLevels& levels, const Real* locations,
                                const Weight* weights, int count) {
    constexpr int kLanes = kNativeLanes<Real>;
    constexpr auto kIndices = std::make_integer_sequence<int, kLanes>();
    using Lanes = VectorNumbers<Real, kLanes>;
    using V = typename Lanes::Real;
    using I = typename Lanes::Int;
    for (int i = 0; i < count; i += kLanes) {
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
      Footprint<V, Lanes> at;
      const I hit = at.place(every_second<0, Real, kLanes>(first, second, kIndices),
                             every_second<1, Real, kLanes>(first, second, kIndices), height, width);
      for (int pixel = 0; pixel < 4; ++pixel) {
        store<kLanes>(share[pixel] + i, at.weight(pixel) * attention);
      }
      const I zero{};
      const I before = at.x < zero ? zero : at.x;
      const I beside = at.x + 1 < width ? at.x + 1 : width - 1;
      const I above = (at.y < zero ? zero : at.y) * width + start;
      const I below = (at.y + 1 < height ? at.y + 1 : height - 1) * width + start;
      store_lanes<kLanes>(row[0] + i, (above + before) | ~hit);  // -1 where there is no pixel
      store_lanes<kLanes>(row[1] + i, above + beside);
      store_lanes<kLanes>(row[2] + i, below + before);
      store_lanes<kLanes>(row[3] + i, below + beside);
      if constexpr (kBackward) {
        store<kLanes>(right + i, at.right);
        store<kLanes>(down + i, at.down);
        store<kLanes>(weight + i, attention);
        store_lanes<kLanes>(on + i,
                            (at.on[0] & 1) | (at.on[1] & 2) | (at.on[2] & 4) | (at.on[3] & 8));
        store_lanes<kLanes>(top + i, at.y);
      }
    }
  }
};

}  // namespace
}  // namespace deform_attn::cpu
