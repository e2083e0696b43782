// The forward pass: sums in registers, pixels prefetched ahead.
#pragma once

#include "layer.h"
#include "visits.h"

namespace deform_attn::cpu {
namespace {  // compiled once for each instruction set, so never shared between them

constexpr int kCacheLine = 64;  // bytes

// The points of a head, and those of the head that is next: their pixels are fetched ahead.
template <typename Real>
struct Run {
  const int32_t* row[4];
  const Real* share[4];
  const int32_t* next_row[4];
  int64_t to_next;  // elements from this head's channels to the next one's
  int64_t stride;   // elements from row to row
  int count;

  Run(const Points<Real>& now, int head, const Points<Real>& then, int next_head,
      const Problem& problem) {
    const int first = head * problem.points, next = next_head * problem.points;
    for (int i = 0; i < 4; ++i) {
      row[i] = now.row[i] + first;
      share[i] = now.share[i] + first;
      next_row[i] = then.row[i] + next;
    }
    to_next = int64_t{next_head - head} * problem.head_dim;
    stride = problem.row_stride();
    count = problem.points;
  }

  // Fetch kBytes of each pixel of the next head's k-th point; row -1 may be asked for, and is not
  // an error in a prefetch.
  template <int kBytes, bool kToWrite, typename T>
  DEFORM_ATTN_INLINE void fetch_next(const T* channels, int k) const {
    const uintptr_t base = reinterpret_cast<uintptr_t>(channels);
    for (int i = 0; i < 4; ++i) {
      const uintptr_t pixel =
          base + static_cast<uintptr_t>(to_next + next_row[i][k] * stride) * sizeof(T);
      for (int at = 0; at < kBytes; at += kCacheLine) {
        __builtin_prefetch(reinterpret_cast<const void*>(pixel + at), kToWrite);
      }
    }
  }
};

// Channels 0 .. kVecs * kLanes - 1 of the sum over the points of a head. `some` > 0: only so many
// channels of the single vector exist.
template <int kLanes, int kVecs, typename T, typename Real>
DEFORM_ATTN_INLINE void sum_points(const T* __restrict value, const Run<Real>& run,
                                   T* __restrict output, int some) {
  using V = Vec<Real, kLanes>;
  V upper[kVecs] = {}, lower[kVecs] = {};  // two chains of additions, to keep both units busy
  for (int k = 0; k < run.count; ++k) {
    run.template fetch_next<kVecs * kLanes* int{sizeof(T)}, false>(value, k);
    if (run.row[0][k] < 0) continue;
    const T* pixel[4];
    V share[4];
    for (int i = 0; i < 4; ++i) {
      pixel[i] = value + run.row[i][k] * run.stride;
      share[i] = splat<V>(run.share[i][k]);
    }
    for (int v = 0; v < kVecs; ++v) {
      const auto channels = [&](int i) {
        return some > 0 ? load_some<kLanes>(pixel[i], some) : load<kLanes>(pixel[i] + v * kLanes);
      };
      upper[v] += share[0] * channels(0);
      lower[v] += share[2] * channels(2);
      upper[v] += share[1] * channels(1);
      lower[v] += share[3] * channels(3);
    }
  }
  for (int v = 0; v < kVecs; ++v) {
    if (some > 0) {
      store_some<kLanes>(output, upper[v] + lower[v], some);
    } else {
      store<kLanes>(output + v * kLanes, upper[v] + lower[v]);
    }
  }
}

// Calls `sum(first_channel, lanes, vecs, some)` with compile-time lanes and vecs until all channels
// are done: widest vectors first.
template <typename Real, typename Sum>
DEFORM_ATTN_INLINE void for_channels(int head_dim, const Sum& sum) {
  constexpr int kLanes = kNativeLanes<Real>;
  constexpr int kHalf = kLanes > 2 ? kLanes / 2 : kLanes;
  using std::integral_constant;
  int c = 0;
  for (; head_dim - c >= 4 * kLanes; c += 4 * kLanes) {
    sum(c, integral_constant<int, kLanes>(), integral_constant<int, 4>(), 0);
  }
  if (head_dim - c >= 2 * kLanes) {
    sum(c, integral_constant<int, kLanes>(), integral_constant<int, 2>(), 0);
    c += 2 * kLanes;
  }
  if (head_dim - c >= kLanes) {
    sum(c, integral_constant<int, kLanes>(), integral_constant<int, 1>(), 0);
    c += kLanes;
  }
  if (kHalf < kLanes && head_dim - c >= kHalf) {
    sum(c, integral_constant<int, kHalf>(), integral_constant<int, 1>(), 0);
    c += kHalf;
  }
  if (c < head_dim) {
    sum(c, integral_constant<int, kHalf>(), integral_constant<int, 1>(), head_dim - c);
  }
}

template <typename T, typename Weight>
void forward_blocks(const Inputs& in, void* output, int64_t first, int64_t last, void* scratch) {
  using Real = typename RealOf<T>::type;
  const Problem& p = in.problem;
  const int count = p.heads * p.points;
  Arena arena(scratch);
  const PointLevels levels(arena, in, p.heads);
  PointSource<Real> source(arena, in, p.heads);
  Points<Real> placed[2] = {Points<Real>(arena, count, false), Points<Real>(arena, count, false)};

  const int64_t per_image = blocks_of(in);
  for (int64_t block = first; block < last; ++block) {
    const int64_t b = block / per_image;
    const T* value = static_cast<const T*>(in.value) + p.value_at(b, 0, 0);
    int64_t queries[kBlock] = {};
    const int visits = queries_of(in, block % per_image, queries);
    const auto place = [&](int visit) {
      source.template points<Weight>(
          in, b, queries[visit], 0, p.heads, [&](const Real* locations, const auto* weights) {
            placed[visit & 1].template place<false>(levels, locations, weights, count);
          });
    };
    place(0);
    for (int visit = 0; visit < visits; ++visit) {
      if (visit + 1 < visits) place(visit + 1);
      const Points<Real>& now = placed[visit & 1];
      T* to = static_cast<T*>(output) + p.output_at(b, queries[visit], 0);
      for (int head = 0; head < p.heads; ++head) {
        // the next head of this query, or the first one of the next query
        const bool turns = head + 1 == p.heads;
        const Run<Real> run(now, head, placed[(visit + turns) & 1], turns ? 0 : head + 1, p);
        const T* from = value + int64_t{head} * p.head_dim;
        T* sums = to + int64_t{head} * p.head_dim;
        for_channels<Real>(p.head_dim, [&](int c, auto lanes, auto vecs, int some) {
          sum_points<lanes.value, vecs.value, T, Real>(from + c, run, sums + c, some);
        });
      }
    }
  }
}

}  // namespace
}  // namespace deform_attn::cpu
