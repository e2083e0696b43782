// Bilinear sampling of one point: its four pixels, their weights, and the gradients. Shared by CPU
// and CUDA.
//
//   Numbers     operations on scalars; a vector type supplies the same interface (cpu/simd.h)
//   pixel_of    the pixel before a location along one axis, and the fraction towards the next one
//   Footprint   the four pixels of a point: which are on the map, their weights, the gradients
//
// A location is a fraction of the map: pixel coordinate x = location * size - 1/2, and pixels
// outside the map are zero (grid_sample with align_corners=False and zero padding).
#pragma once

#include <cmath>

#include "host_device.h"

namespace deform_attn {

template <typename Acc_>
struct Numbers {
  using Acc = Acc_;
  using Int = int;  // a pixel's index
  using Mask = bool;

  // a * b + c with one rounding.
  static HOST_DEVICE Acc multiply_add(Acc a, Acc b, Acc c) {
#if !defined(__CUDACC__) && !defined(FP_FAST_FMAF)
    // Without an FMA instruction, fma is a slow library call. The product of two floats is exact in
    // double.
    if constexpr (sizeof(Acc) == sizeof(float)) {
      return static_cast<Acc>(static_cast<double>(a) * static_cast<double>(b) +
                              static_cast<double>(c));
    }
#endif
    using std::fma;
    return fma(a, b, c);
  }
  static HOST_DEVICE Acc round_down(Acc x) {
    using std::floor;
    return floor(x);
  }
  static HOST_DEVICE Int to_int(Acc x) { return static_cast<Int>(x); }
  static HOST_DEVICE Acc to_acc(Int x) { return static_cast<Acc>(x); }
  // The result of a comparison as a Mask; masks are combined with &.
  static HOST_DEVICE Mask mask(bool compared) { return compared; }
  static HOST_DEVICE Acc where(Mask mask, Acc x) { return mask ? x : Acc(0); }
  // x - y where the comparison holds, else x.
  static HOST_DEVICE Acc minus_where(bool compared, Acc x, Acc y) { return compared ? x - y : x; }
};

// The pixel at or before a location, and the fraction in [0, 1] towards the next pixel. False where
// neither pixel is on the map; this includes NaN and infinity.
//
// Knots (locations at pixel centres): location * size - 1/2 can round up to a pixel that the point
// lies before, and the gradient would be that of the wrong side. `past` is rounded once, so that its
// sign is exact, and corrects the pixel.
template <typename N>
HOST_DEVICE typename N::Mask pixel_of(typename N::Acc location, typename N::Int size,
                                      typename N::Int& pixel, typename N::Acc& fraction) {
  using Acc = typename N::Acc;
  const Acc zero{}, one = zero + 1, half = one / 2, extent = N::to_acc(size);
  Acc left = N::round_down(N::multiply_add(location, extent, -half));
  Acc past = N::multiply_add(location, extent, -(left + half));
  const auto before = past < zero;
  left = N::minus_where(before, left, one);
  past = N::minus_where(before, past, -one);
  const typename N::Mask hit = N::mask(left >= -one) & N::mask(left < extent);
  pixel = N::to_int(N::where(hit, left));
  fraction = N::where(hit, past);
  return hit;
}

// The four pixels in the order (y, x), (y, x+1), (y+1, x), (y+1, x+1).
template <typename Acc, typename N = Numbers<Acc>>
struct Footprint {
  using Int = typename N::Int;
  using Mask = typename N::Mask;

  Int x, y;         // -1 <= x < width, -1 <= y < height
  Acc right, down;  // fractions towards x + 1 and y + 1
  Mask on[4];       // which of the four pixels are on the map

  // False: none of the four pixels is on the map; the sample and its gradients are zero.
  HOST_DEVICE Mask place(Acc location_x, Acc location_y, Int height, Int width) {
    const Mask hit_x = pixel_of<N>(location_x, width, x, right);
    const Mask hit_y = pixel_of<N>(location_y, height, y, down);
    const Mask hit = hit_x & hit_y;
    const Mask left_on = N::mask(x >= Int{}), right_on = N::mask(x + 1 < width);
    const Mask up_on = N::mask(y >= Int{}), down_on = N::mask(y + 1 < height);
    on[0] = hit & up_on & left_on;
    on[1] = hit & up_on & right_on;
    on[2] = hit & down_on & left_on;
    on[3] = hit & down_on & right_on;
    return hit;
  }

  // The bilinear weight of pixel i, zero off the map: sample = sum of weight(i) * pixel(i).
  HOST_DEVICE Acc weight(int i) const { return N::where(on[i], weight_on_map(i)); }

  // The same without the test whether the pixel is on the map.
  HOST_DEVICE Acc weight_on_map(int i) const {
    const Acc one = Acc{} + 1;
    const Acc across = (i & 1) ? right : one - right;
    const Acc along = (i & 2) ? down : one - down;
    return across * along;
  }

  // product[i]: dot product of the output's gradient with pixel i (ignored where the pixel is off
  // the map). Results: the dot product with the sample, and its derivatives with respect to x and y
  // in pixels.
  HOST_DEVICE void pull_back(const Acc (&product)[4], Acc& sample, Acc& grad_x, Acc& grad_y) const {
    const Acc one = Acc{} + 1, left = one - right, up = one - down;
    const Acc p0 = N::where(on[0], product[0]), p1 = N::where(on[1], product[1]);
    const Acc p2 = N::where(on[2], product[2]), p3 = N::where(on[3], product[3]);
    sample = up * (left * p0 + right * p1) + down * (left * p2 + right * p3);
    grad_x = up * (p1 - p0) + down * (p3 - p2);
    grad_y = left * (p2 - p0) + right * (p3 - p1);
  }
};

}  // namespace deform_attn
