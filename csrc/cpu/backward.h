// The backward pass: all three gradients in one visit of each point, without atomics.
#pragma once

#include "forward.h"

namespace deform_attn::cpu {
namespace {  // compiled once for each instruction set, so never shared between them

// Products of the output's gradient with the four pixels of each point of a head; adds its share of
// that gradient to the pixels' own. Channels as in sum_points.
template <int kLanes, int kVecs, typename T, typename Real>
DEFORM_ATTN_INLINE void visit_points(const T* __restrict value, const T* __restrict grad_output,
                                     const Run<Real>& run, const int32_t* __restrict reach,
                                     Real* grad_value, Real* const (&product)[4], int some) {
  using V = Vec<Real, kLanes>;
  V gradient[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    gradient[v] =
        some > 0 ? load_some<kLanes>(grad_output, some) : load<kLanes>(grad_output + v * kLanes);
  }
  for (int k = 0; k < run.count; ++k) {
    run.template fetch_next<kVecs * kLanes* int{sizeof(T)}, false>(value, k);
    run.template fetch_next<kVecs * kLanes* int{sizeof(Real)}, true>(grad_value, k);
    if (run.row[0][k] < 0) continue;
    const int32_t here = reach ? reach[k] : kOwned | kUpper | kLower;
    if (here == 0) continue;
    if (here & kOwned) {
      V products[4] = {};
      for (int i = 0; i < 4; ++i) {
        const T* pixel = value + run.row[i][k] * run.stride;
        for (int v = 0; v < kVecs; ++v) {
          const V channels =
              some > 0 ? load_some<kLanes>(pixel, some) : load<kLanes>(pixel + v * kLanes);
          products[i] += gradient[v] * channels;
        }
      }
      Real sums[4];
      four_sums<Real, kLanes>(products, sums);
      for (int i = 0; i < 4; ++i) product[i][k] += sums[i];
    }
    for (int i = 0; i < 4; ++i) {
      if (!(here & (i < 2 ? kUpper : kLower))) continue;
      Real* pixel = grad_value + run.row[i][k] * run.stride;
      const V share = splat<V>(run.share[i][k]);
      for (int v = 0; v < kVecs; ++v) {
        if (some > 0) {
          store_some<kLanes>(pixel, load_some<kLanes>(pixel, some) + share * gradient[v], some);
        } else {
          store<kLanes>(pixel + v * kLanes, load<kLanes>(pixel + v * kLanes) + share * gradient[v]);
        }
      }
    }
  }
}

template <typename T, typename Weight>
void backward_share(const Inputs& in, const Gradients& grads, const Share& own, void* scratch) {
  using Real = typename RealOf<T>::type;
  const Problem& p = in.problem;
  const int heads = own.last_head - own.first_head;
  const int count = heads * p.points;
  Arena arena(scratch);
  const PointLevels levels(arena, in, heads);
  PointSource<Real> source(arena, in, heads);
  Points<Real> placed[2] = {Points<Real>(arena, count, true), Points<Real>(arena, count, true)};
  Real* product[4];
  for (auto& array : product) array = arena.take<Real>(p.points);

  const T* value = static_cast<const T*>(in.value) + p.value_at(own.batch, 0, own.first_head);
  Real* grad_value = static_cast<Real*>(grads.value) + p.value_at(own.batch, 0, own.first_head);
  const int64_t blocks = blocks_of(in);
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t queries[kBlock] = {};
    const int visits = queries_of(in, block, queries);
    const auto place = [&](int visit) {
      Points<Real>& points = placed[visit & 1];
      source.template points<Weight>(in, own.batch, queries[visit], own.first_head, heads,
                                     [&](const Real* locations, const auto* weights) {
                                       points.template place<true>(levels, locations, weights,
                                                                   count);
                                     });
      if (own.bands > 1) points.reach_of(levels, own.band, own.bands, count);
    };
    place(0);
    for (int visit = 0; visit < visits; ++visit) {
      if (visit + 1 < visits) place(visit + 1);
      const Points<Real>& now = placed[visit & 1];
      for (int head = 0; head < heads; ++head) {
        const int first = head * p.points;
        const int64_t at = p.point_at(own.batch, queries[visit], own.first_head + head);
        const T* grad_output = static_cast<const T*>(grads.output) +
                               p.output_at(own.batch, queries[visit], own.first_head + head);
        const bool turns = head + 1 == heads;
        const Run<Real> run(now, head, placed[(visit + turns) & 1], turns ? 0 : head + 1, p);
        for (auto& array : product) std::memset(array, 0, sizeof(Real) * p.points);
        const int32_t* reach = own.bands > 1 ? now.reach + first : nullptr;
        const int64_t channel = int64_t{head} * p.head_dim;
        for_channels<Real>(p.head_dim, [&](int c, auto lanes, auto vecs, int some) {
          visit_points<lanes.value, vecs.value, T, Real>(value + channel + c, grad_output + c, run,
                                                         reach, grad_value + channel + c, product,
                                                         some);
        });

        Real* to_locations = static_cast<Real*>(grads.locations) + 2 * at;
        // a layer's are taken further by finish_queries, which rounds them
        const bool rounds = in.layer.reference == nullptr;
        for (int k = 0; k < p.points; ++k) {
          const int i = first + k;
          if (reach && !(reach[k] & kOwned)) continue;
          Real sample, by_x, by_y;
          const Footprint<Real> footprint = now.footprint(i);
          footprint.pull_back({product[0][k], product[1][k], product[2][k], product[3][k]}, sample,
                              by_x, by_y);
          if (rounds) {
            from_real(sample, static_cast<Weight*>(grads.weights)[at + k]);
          } else {
            static_cast<Real*>(grads.weights)[at + k] = sample;
          }
          to_locations[2 * k] = now.weight[i] * static_cast<Real>(levels.width[i]) * by_x;
          to_locations[2 * k + 1] = now.weight[i] * static_cast<Real>(levels.height[i]) * by_y;
        }
      }
    }
  }
}

}  // namespace
}  // namespace deform_attn::cpu
