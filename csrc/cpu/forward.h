// The forward pass.
//
//   Run                              the placed points of a head, and those that are prefetched
//   fetch_pixels                     prefetches the pixels of a point
//   heads_ahead, run_of              which points are prefetched while a head is visited
//   load_channels, store_channels    the channels of a pixel as vectors
//   sum_points                       the innermost loop: weighted sum of pixels, in registers
//   for_channels                     divides the channels of a head into vectors
//   Pair                             iterates over queries, with the next one placed ahead
//   fetch_all                        prefetches an array
//   copy_rows                        the pixels of some heads without those of others
//   forward_blocks                   the pass
#pragma once

#include <algorithm>

#include "fused.h"
#include "visits.h"

namespace deform_attn::cpu {
namespace {  // compiled once for each instruction set, so never shared between them

// The points of a head, and those of a head that is visited soon, whose pixels are prefetched.
template <typename Acc>
struct Run {
  const Quad<int32_t>* offset;
  const Quad<Acc>* share;
  int count;
  const Quad<int32_t>* next;  // null: nothing is prefetched
  int next_head;
  bool next_query;  // the head of the next query, not of this one
};

// Prefetches kBytes of each of a point's pixels, one cache line every kStep bytes, into the second-level
// cache: AMD's processors wait for fewer lines of the first-level cache at a time. The offset of a point
// without a pixel is invalid, which a prefetch ignores.
template <int kBytes, int kStep, typename T>
DEFORM_ATTN_INLINE void fetch_pixels(const T* channels, const Quad<int32_t>& offset) {
  const uintptr_t base = reinterpret_cast<uintptr_t>(channels);
  each<4>([&](auto i) DEFORM_ATTN_INLINED {
    const uintptr_t pixel = base + static_cast<uintptr_t>(int64_t{offset[i]}) * sizeof(T);
    for (int at = 0; at < kBytes; at += kStep) {
      __builtin_prefetch(reinterpret_cast<const void*>(pixel + at), 0, 2);
    }
  });
}

// How many heads ahead pixels are prefetched: those of about kAhead points. 0: none are. In a tile of
// pixels (visits.h) the following ones are in the second-level cache already.
inline int heads_ahead(const Inputs& in, int heads) {
  constexpr int kAhead = 64;
  const int points = in.problem.points;
  if (in.queries_are_pixels || points == 0) return 0;
  return std::min(heads, (kAhead + points - 1) / points);
}

// The points of a head; after the last head follows the first one of the next query.
template <typename Acc>
DEFORM_ATTN_INLINE Run<Acc> run_of(const Inputs& in, const Points<Acc>& now,
                                   const Points<Acc>& next, int head, int heads, int ahead) {
  const int points = in.problem.points, first = head * points;
  const bool next_query = head + ahead >= heads;
  const int next_head = next_query ? head + ahead - heads : head + ahead;
  const Quad<int32_t>* following = (next_query ? next : now).offset + next_head * points;
  return {now.offset + first, now.share + first, points, ahead > 0 ? following : nullptr,
          next_head,          next_query};
}

// kVecs vectors of channels. `some` > 0: kVecs is 1, and the vector has only `some` channels.
template <int kLanes, int kVecs, typename T, typename V>
DEFORM_ATTN_INLINE void load_channels(const T* from, int some, V (&to)[kVecs]) {
  if constexpr (kVecs == 1) {
    to[0] = some > 0 ? load_some<kLanes>(from, some) : load<kLanes>(from);
  } else {
    each<kVecs / 2>([&](auto v) DEFORM_ATTN_INLINED {
      load_pair<kLanes>(from + 2 * v * kLanes, to[2 * v], to[2 * v + 1]);
    });
  }
}
template <int kLanes, int kVecs, typename T, typename V>
DEFORM_ATTN_INLINE void store_channels(T* to, int some, const V (&from)[kVecs]) {
  if constexpr (kVecs > 1) {
    each<kVecs / 2>([&](auto v) DEFORM_ATTN_INLINED {
      store_pair<kLanes>(to + 2 * v * kLanes, from[2 * v], from[2 * v + 1]);
    });
  } else if (some > 0) {
    store_some<kLanes>(to, from[0], some);
  } else {
    store<kLanes>(to, from[0]);
  }
}

// Channels 0 .. kVecs * kLanes - 1 of the sum over the points of a head. `value` points at their
// first pixel in this image, `next` at those that are prefetched. `some`: as in load_channels.
template <int kLanes, int kVecs, typename T, typename Acc>
DEFORM_ATTN_INLINE void sum_points(const T* __restrict value, const T* next, const Run<Acc> run,
                                   T* __restrict output, int some) {
  using V = Vec<Acc, kLanes>;
  // Additions to a sum depend on each other: with few sums, each is split into two.
  constexpr int kChains = kVecs < 8 ? 2 : 1;
  V sums[kChains][kVecs] = {};
  for (int k = 0; k < run.count; ++k) {
    if (run.next) fetch_pixels<kVecs * kLanes* int{sizeof(T)}, int{kCacheLine}>(next, run.next[k]);
    const Quad<int32_t>& offset = run.offset[k];
    if (offset[0] < 0) continue;
    each<4>([&](auto i) DEFORM_ATTN_INLINED {
      const T* pixel = value + offset[i];
      const V share = splat<V>(run.share[k][i]);
      V channels[kVecs];
      load_channels<kLanes, kVecs>(pixel, some, channels);
      each<kVecs>([&](auto v)
                      DEFORM_ATTN_INLINED { sums[i * kChains / 4][v] += share * channels[v]; });
    });
  }
  if constexpr (kChains == 2) {
    each<kVecs>([&](auto v) DEFORM_ATTN_INLINED { sums[0][v] += sums[1][v]; });
  }
  store_channels<kLanes, kVecs>(output, some, sums[0]);
}

// Calls `body(first_channel, lanes, vecs, some)` with compile-time lanes and vecs until all channels
// are covered, the widest vectors first.
template <typename Acc, typename Body>
DEFORM_ATTN_INLINE void for_channels(int head_dim, const Body& body) {
  constexpr int kLanes = kNativeLanes<Acc>;
  constexpr int kHalf = kLanes > 2 ? kLanes / 2 : kLanes;
  using std::integral_constant;
  int c = 0;
  for (; head_dim - c >= kMostVecs * kLanes; c += kMostVecs * kLanes) {
    body(c, integral_constant<int, kLanes>(), integral_constant<int, kMostVecs>(), 0);
  }
  if (kMostVecs > 4 && head_dim - c >= 4 * kLanes) {
    body(c, integral_constant<int, kLanes>(), integral_constant<int, 4>(), 0);
    c += 4 * kLanes;
  }
  if (head_dim - c >= 2 * kLanes) {
    body(c, integral_constant<int, kLanes>(), integral_constant<int, 2>(), 0);
    c += 2 * kLanes;
  }
  if (head_dim - c >= kLanes) {
    body(c, integral_constant<int, kLanes>(), integral_constant<int, 1>(), 0);
    c += kLanes;
  }
  if (kHalf < kLanes && head_dim - c >= kHalf) {
    body(c, integral_constant<int, kHalf>(), integral_constant<int, 1>(), 0);
    c += kHalf;
  }
  if (c < head_dim) {
    body(c, integral_constant<int, kHalf>(), integral_constant<int, 1>(), head_dim - c);
  }
}

// Two placed queries: the current one, and the next one.
template <typename Acc>
struct Pair {
  struct Placed {
    Visit visit;
    Points<Acc> points;
  };
  Placed placed[2];
  int turn = 0;

  Pair(Arena& arena, int64_t points, bool backward)
      : placed{{{}, Points<Acc>(arena, points, backward)},
               {{}, Points<Acc>(arena, points, backward)}} {}

  // Calls `visit(now, next)` for each query. `place(placed)` places one query, or returns false
  // after the last, which is passed as its own next one.
  template <typename Place, typename Visit>
  DEFORM_ATTN_INLINE void run(const Place& place, const Visit& visit) {
    bool more = place(placed[0]);
    while (more) {
      const Placed& now = placed[turn];
      turn ^= 1;
      more = place(placed[turn]);
      visit(now, more ? placed[turn] : now);
    }
  }
};

// Prefetches numbers first .. first + count - 1 of `size` bytes each, for reading or for writing, into the
// second-level cache, as in fetch_pixels.
template <bool kWrite>
DEFORM_ATTN_INLINE void fetch_all(const void* numbers, size_t size, int64_t first, int64_t count) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(numbers) + static_cast<size_t>(first) * size;
  const uintptr_t end = from + static_cast<size_t>(count) * size;
  for (uintptr_t line = from / kCacheLine * kCacheLine; line < end; line += kCacheLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(line), kWrite, 2);
  }
}

// Copies rows first .. last - 1 of the pixels of some heads to the same rows of `to`, [rows, heads, head_dim].
template <typename T>
void copy_rows(const Inputs& in, int64_t batch, int64_t first, int64_t last, T* to) {
  constexpr int64_t kAhead = 32;  // rows
  const Problem& p = in.problem;
  const int count = in.heads * p.head_dim;
  const T* from = static_cast<const T*>(in.value) + p.value_at(batch, 0, in.first_head);
  for (int64_t row = first; row < last; ++row) {
    const int64_t ahead = row + kAhead < last ? row + kAhead : row;
    fetch_all<false>(from, sizeof(T), ahead * p.row_stride(), count);
    const T* pixel = from + row * p.row_stride();
    T* copy = to + row * count;
    constexpr int kPart = kVectorBytes / static_cast<int>(sizeof(T));
    int c = 0;
    for (; c + kPart <= count; c += kPart) {
      Vec<char, kVectorBytes> part;
      std::memcpy(&part, pixel + c, sizeof(part));
      std::memcpy(copy + c, &part, sizeof(part));
    }
    for (; c < count; ++c) copy[c] = pixel[c];
  }
}

template <typename T, typename Weight>
void forward_blocks(const Inputs& in, void* output, Blocks& blocks, void* scratch) {
  using Acc = AccOf<T>;
  const Problem& p = in.problem;
  const int first_head = in.first_head, heads = in.heads;
  const int count = heads * p.points;
  Arena arena(scratch);
  PointLevels<Acc> levels(arena, in, heads);
  PointSource<Acc> source(arena, in, heads);
  Pair<Acc> pair(arena, count, false);

  int64_t block = 0, last = 0;
  const auto take = [&] {
    if (block == last) last = blocks.take(block);
    return block < last ? block++ : -1;
  };
  // Hardware prefetchers follow neither the operands of a part of the heads, which are pieces of rows, nor
  // those of sorted queries. Inlined: GCC drops calls of a function that only prefetches.
  const auto fetch = [&](const Visit& visit) DEFORM_ATTN_INLINED {
    if (!in.copy && !in.order) return;
    const int64_t at = p.point_at(visit.batch, visit.query, first_head);
    fetch_all<false>(in.locations, in.fused.reference ? sizeof(Weight) : sizeof(Acc), 2 * at,
                     2 * count);
    fetch_all<false>(in.weights, sizeof(Weight), at, count);
    if (in.copy) {  // all heads: a row is written as a whole, and prefetching it takes longer
      fetch_all<true>(output, sizeof(T), p.output_at(visit.batch, visit.query, first_head),
                      heads * p.head_dim);
    }
  };
  Upcoming upcoming(in, 1, take, fetch);
  const int ahead = heads_ahead(in, heads);
  const auto place = [&](auto& placed) {
    const Visit& visit = placed.visit;
    if (!upcoming.next(placed.visit)) return false;
    levels.enter(visit.batch);
    source.template points<Weight>(in, visit.batch, visit.query, first_head, heads,
                                   [&](const Acc* locations, const auto* weights) {
                                     placed.points.template place<false>(levels, locations, weights,
                                                                         count);
                                   });
    return true;
  };
  const auto pixels_of = [&](int64_t batch) {
    if (in.copy) return static_cast<const T*>(in.copy);
    return static_cast<const T*>(in.value) + p.value_at(batch, 0, 0);
  };
  pair.run(place, [&](const auto& now, const auto& next) {
    const T* value = pixels_of(now.visit.batch);
    const T* next_value = pixels_of(next.visit.batch);
    T* sums = static_cast<T*>(output) + p.output_at(now.visit.batch, now.visit.query, first_head);
    for (int head = 0; head < heads; ++head) {
      const int channel = head * p.head_dim;
      const Run<Acc> run = run_of(in, now.points, next.points, head, heads, ahead);
      const T* following = (run.next_query ? next_value : value) + run.next_head * p.head_dim;
      for_channels<Acc>(p.head_dim, [&](int c, auto lanes, auto vecs, int some) {
        sum_points<lanes.value, vecs.value, T, Acc>(value + channel + c, following + c, run,
                                                    sums + channel + c, some);
      });
    }
  });
}

}  // namespace
}  // namespace deform_attn::cpu
