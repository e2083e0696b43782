// Fused calls: from reference points, offsets and logits to locations and weights, and the gradients.
//
//   exponential, softmax   over the logits of a query and head
//   Steps                  from offsets to locations
//   PointSource            the locations and weights of a query: given, or computed
//   finish_queries         gradients of reference points, offsets and logits from those of locations
//                          and weights
//
// Locations and weights are computed query by query in working memory.
#pragma once

#include "points.h"

namespace deform_attn::cpu {
namespace {  // compiled once for each instruction set, so never shared between them

// e^x for x <= 0: 2^whole * e^rest, |rest| <= ln(2) / 2, e^rest by its Taylor series.
template <int kLanes>
DEFORM_ATTN_INLINE Vec<float, kLanes> exponential(Vec<float, kLanes> x) {
  using V = Vec<float, kLanes>;
  using N = VectorNumbers<float, kLanes>;
  x = x < -87.0f ? V{} - 87.0f : x;
  const V whole = N::round_down(x * 1.44269504f + 0.5f);
  const V rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln(2) in two parts
  V sum = V{} + 1.0f / 5040;
  for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = sum * rest + coefficient;
  }
  const auto exponent = (N::to_int(whole) + 127) << 23;
  return sum * bits_as<V>(exponent);
}
template <int kLanes>
DEFORM_ATTN_INLINE Vec<double, kLanes> exponential(Vec<double, kLanes> x) {
  for (int i = 0; i < kLanes; ++i) x[i] = std::exp(x[i]);
  return x;
}

// The same, of a NaN a NaN.
template <typename Acc, int kLanes>
DEFORM_ATTN_INLINE Vec<Acc, kLanes> power_of(Vec<Acc, kLanes> x) {
  return x == x ? exponential<kLanes>(x) : x;
}

// weights[0 .. count - 1] = softmax of logits. A NaN among the logits makes all weights NaN.
template <typename Acc, typename T>
DEFORM_ATTN_INLINE void softmax(const T* logits, Acc* weights, int count) {
  constexpr int kLanes = kNativeLanes<Acc>;
  using V = Vec<Acc, kLanes>;
  if (count == 0) return;
  const int whole = count / kLanes * kLanes;
  Acc largest = to_acc(logits[0]);
  if (whole > 0) {
    V most = load<kLanes>(logits);
    for (int i = 0; i < whole; i += kLanes) {
      const V x = load<kLanes>(logits + i);
      store<kLanes>(weights + i, x);
      most = x > most ? x : most;  // a NaN appears in the powers
    }
    for (int lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  }
  for (int i = whole; i < count; ++i) {
    weights[i] = to_acc(logits[i]);
    largest = weights[i] > largest ? weights[i] : largest;
  }
  Acc sum = 0;
  if (whole > 0) {
    V sums = {};
    for (int i = 0; i < whole; i += kLanes) {
      const V power = power_of<Acc, kLanes>(load<kLanes>(weights + i) - largest);
      store<kLanes>(weights + i, power);
      sums += power;
    }
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  }
  if (whole < count) {
    const V power =
        power_of<Acc, kLanes>(load_some<kLanes>(weights + whole, count - whole) - largest);
    store_some<kLanes>(weights + whole, power, count - whole);
    for (int lane = 0; lane < count - whole; ++lane) sum += power[lane];
  }
  for (int i = 0; i < count; ++i) weights[i] /= sum;
}

// From offsets to locations, for the points of a head; the same for all heads of a query. Arrays
// hold x and y alternately.
//
// Reference points: origin + offset / extent. A division, not a product with the inverse: encoders
// start with whole offsets from pixel centres, and the locations must stay exactly on the knots.
// Reference boxes: origin + offset * extent.
// Rotated boxes: origin + offset * extent + (offset of the other axis) * across.
template <typename Acc>
struct Steps {
  Acc *origin, *extent;  // [2 * points]
  Acc* across;           // [2 * points] of rotated boxes
  bool from_box, rotated;

  Steps(Arena& arena, const Inputs& in) {
    const int64_t count = 2 * int64_t{in.problem.points};
    from_box = in.fused.size >= 4;
    rotated = in.fused.size == 5;
    origin = arena.take<Acc>(count);
    extent = arena.take<Acc>(count);
    across = arena.take<Acc>(rotated ? count : 0);
    if (extent == nullptr || in.fused.reference == nullptr || from_box) return;
    for (int l = 0; l < in.problem.levels; ++l) {  // of points, the same for all queries
      for (int k = in.first_point[l]; k < in.first_point[l + 1]; ++k) {
        extent[2 * k] = static_cast<Acc>(in.levels[l].width);
        extent[2 * k + 1] = static_cast<Acc>(in.levels[l].height);
      }
    }
  }

  // The query's reference point or box of a level.
  static const Acc* reference(const Inputs& in, int64_t batch, int64_t query, int level) {
    const Fused& fused = in.fused;
    const int64_t at =
        (batch * in.problem.queries + query) * fused.levels + (fused.levels > 1 ? level : 0);
    return static_cast<const Acc*>(fused.reference) + at * fused.size;
  }
  // Boxes: the part of a side by which an offset of 1 moves a point.
  static Acc portion(const Inputs& in, int level) {
    const int points = in.first_point[level + 1] - in.first_point[level];
    return static_cast<Acc>(in.fused.offset_scale / (points > 0 ? points : 1));
  }

  void of_query(const Inputs& in, int64_t batch, int64_t query) {
    for (int l = 0; l < in.problem.levels; ++l) {
      const Acc* from = reference(in, batch, query, l);
      if (!from_box) {
        for (int k = in.first_point[l]; k < in.first_point[l + 1]; ++k) {
          std::memcpy(origin + 2 * k, from, 2 * sizeof(Acc));
        }
        continue;
      }
      const Acc x_step = from[2] * portion(in, l), y_step = from[3] * portion(in, l);
      Acc cos = 1, sin = 0;
      if (rotated) {
        cos = std::cos(from[4]);
        sin = std::sin(from[4]);
      }
      for (int k = in.first_point[l]; k < in.first_point[l + 1]; ++k) {
        origin[2 * k] = from[0];
        origin[2 * k + 1] = from[1];
        extent[2 * k] = x_step * cos;
        extent[2 * k + 1] = y_step * cos;
        if (!rotated) continue;
        across[2 * k] = -y_step * sin;
        across[2 * k + 1] = x_step * sin;
      }
    }
  }

  template <typename T>
  DEFORM_ATTN_INLINE void locate(const T* offsets, Acc* locations, int count) const {
    if (rotated) {
      for (int i = 0; i < count; ++i) {
        locations[i] =
            origin[i] + to_acc(offsets[i]) * extent[i] + to_acc(offsets[i ^ 1]) * across[i];
      }
    } else if (from_box) {
      for (int i = 0; i < count; ++i) locations[i] = origin[i] + to_acc(offsets[i]) * extent[i];
    } else {
      for (int i = 0; i < count; ++i) locations[i] = origin[i] + to_acc(offsets[i]) / extent[i];
    }
  }
};

// Locations and weights of some heads of a query: given, or computed in a fused call.
template <typename Acc>
class PointSource {
 public:
  PointSource(Arena& arena, const Inputs& in, int heads)
      : steps_(arena, in),
        locations_(arena.take<Acc>(2 * int64_t{heads} * in.problem.points)),
        weights_(arena.take<Acc>(int64_t{heads} * in.problem.points)) {}

  // Calls `use(locations, weights)`. Weight: the type of weights, and of a fused call's offsets.
  template <typename Weight, typename Use>
  DEFORM_ATTN_INLINE void points(const Inputs& in, int64_t batch, int64_t query, int first_head,
                                 int heads, const Use& use) {
    const int64_t at = in.problem.point_at(batch, query, first_head);
    const Weight* weights = static_cast<const Weight*>(in.weights) + at;
    if (in.fused.reference == nullptr) {
      return use(static_cast<const Acc*>(in.locations) + 2 * at, weights);
    }
    const Weight* offsets = static_cast<const Weight*>(in.locations) + 2 * at;
    const int count = in.problem.points;
    steps_.of_query(in, batch, query);
    for (int head = 0; head < heads; ++head) {
      const Weight* from = offsets + int64_t{2} * head * count;
      Acc* to = locations_ + int64_t{2} * head * count;
      steps_.locate(from, to, 2 * count);
      softmax(weights + int64_t{head} * count, weights_ + int64_t{head} * count, count);
    }
    use(static_cast<const Acc*>(locations_), static_cast<const Acc*>(weights_));
  }

 private:
  Steps<Acc> steps_;
  Acc *locations_, *weights_;
};

// From the gradients of locations and weights to those of reference points, offsets and logits.
template <typename Acc, typename Weight>
void finish_queries(const Inputs& in, const FusedGradients& grads, int64_t first, int64_t last,
                    void* scratch) {
  const Problem& p = in.problem;
  Arena arena(scratch);
  Steps<Acc> steps(arena, in);
  Acc* weights = arena.take<Acc>(p.points);
  const Fused& fused = in.fused;
  for (int64_t item = first; item < last; ++item) {
    const int64_t b = item / p.queries, query = item % p.queries;
    steps.of_query(in, b, query);
    Acc* to_reference = nullptr;
    if (grads.reference) {
      to_reference = static_cast<Acc*>(grads.reference) + item * fused.levels * int64_t{fused.size};
      std::memset(to_reference, 0, sizeof(Acc) * static_cast<size_t>(fused.levels * fused.size));
    }
    for (int head = 0; head < p.heads; ++head) {
      const int64_t at = p.point_at(b, query, head);
      const Weight* offsets = static_cast<const Weight*>(in.locations) + 2 * at;
      const Acc* grad_locations = static_cast<const Acc*>(grads.locations) + 2 * at;
      const Acc* grad_weights = static_cast<const Acc*>(grads.weights) + at;
      for (int l = 0; l < p.levels && to_reference; ++l) {
        // of the location; times the offset along the same axis, and along the other one
        Acc sums[2] = {}, same[2] = {}, other[2] = {};
        for (int k = in.first_point[l]; k < in.first_point[l + 1]; ++k) {
          for (int i = 0; i < 2; ++i) {
            sums[i] += grad_locations[2 * k + i];
            same[i] += grad_locations[2 * k + i] * to_acc(offsets[2 * k + i]);
            other[i] += grad_locations[2 * k + i] * to_acc(offsets[2 * k + 1 - i]);
          }
        }
        Acc* to = to_reference + (fused.levels > 1 ? l * fused.size : 0);
        const Acc portion = Steps<Acc>::portion(in, l);
        for (int i = 0; i < 2; ++i) to[i] += sums[i];
        if (steps.rotated) {
          const Acc* from = Steps<Acc>::reference(in, b, query, l);
          const Acc cos = std::cos(from[4]), sin = std::sin(from[4]);
          to[2] += (cos * same[0] + sin * other[1]) * portion;
          to[3] += (cos * same[1] - sin * other[0]) * portion;
          // d(location)/d(angle) = R'(angle) (offset * sides * portion)
          to[4] += (from[2] * (cos * other[1] - sin * same[0]) -
                    from[3] * (cos * other[0] + sin * same[1])) *
                   portion;
        } else if (steps.from_box) {
          for (int i = 0; i < 2; ++i) to[2 + i] += same[i] * portion;
        }
      }
      softmax(static_cast<const Weight*>(in.weights) + at, weights, p.points);
      Acc mean = 0;
      for (int k = 0; k < p.points; ++k) mean += weights[k] * grad_weights[k];
      Weight* to_offsets = static_cast<Weight*>(grads.offsets) + 2 * at;
      Weight* to_logits = static_cast<Weight*>(grads.logits) + at;
      if (steps.rotated) {
        for (int i = 0; i < 2 * p.points; i += 2) {  // both are read before either is overwritten
          const Acc grad_x = grad_locations[i], grad_y = grad_locations[i + 1];
          from_acc(grad_x * steps.extent[i] + grad_y * steps.across[i + 1], to_offsets[i]);
          from_acc(grad_y * steps.extent[i + 1] + grad_x * steps.across[i], to_offsets[i + 1]);
        }
      } else {
        for (int i = 0; i < 2 * p.points; ++i) {
          from_acc(steps.from_box ? grad_locations[i] * steps.extent[i]
                                  : grad_locations[i] / steps.extent[i],
                   to_offsets[i]);
        }
      }
      for (int k = 0; k < p.points; ++k) {
        from_acc(weights[k] * (grad_weights[k] - mean), to_logits[k]);
      }
    }
  }
}

}  // namespace
}  // namespace deform_attn::cpu
