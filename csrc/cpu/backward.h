// The backward pass: all gradients in one visit of each point, without atomics.
//
//   visit_points     the innermost loop: products with pixels, and what is added to their gradients
//   PointGradients   the gradients of a query's locations and weights, before they are written
//   sums_at          the sums of a pixel's gradient
//   Reached          which pixels have been added to
//   each_range       the rows of value that belong to a share
//   round_sums       from the sums of a share to its gradient of value
//   backward_share   the pass over one Share
#pragma once

#include "clear.h"
#include "forward.h"

namespace deform_attn::cpu {
namespace {  // compiled once for each instruction set, so never shared between them

// The sums of the pixel that is `offset` elements of value from pixel 0. A row of sums is 1 / kParts as
// long as one of value. For all of kParts that is an address mode of the processor.
template <int kParts, typename Acc>
DEFORM_ATTN_INLINE Acc* sums_at(Acc* sums, int32_t offset) {
  static_assert(sizeof(Acc) % kParts == 0);
  constexpr auto kBytes = static_cast<int64_t>(sizeof(Acc) / kParts);
  return reinterpret_cast<Acc*>(reinterpret_cast<char*>(sums) + offset * kBytes);
}

// The members of each set of numbers 0 .. 7, in order. Bit i of a set: i is a member.
struct Members {
  uint8_t of[256][8] = {};
  constexpr Members() {
    for (int set = 0; set < 256; ++set) {
      for (int i = 0, found = 0; i < 8; ++i) {
        if ((set >> i) & 1) of[set][found++] = static_cast<uint8_t>(i);
      }
    }
  }
};
alignas(kCacheLine) constexpr Members kMembers;

// The pixels and heads whose sums have been added to. A flag stands for a pixel and the one on its right, so
// that a point sets two of them: some pixels count as reached and are not.
struct Reached {
  uint8_t* flags = nullptr;  // [rows, heads]; null: all count as reached
  int heads = 0;             // of a row of sums
  int shift = 0;             // an offset in value >> shift: the flag of head 0

  // `parts`: rows of value are as many times as long as rows of sums.
  Reached(Arena& arena, const Inputs& in, bool used, int parts) {
    const int head_dim = in.problem.head_dim;
    // in an encoder nearly all are reached
    if (!used || in.queries_are_pixels || in.copy) return;
    if ((head_dim & (head_dim - 1)) != 0) return;
    while ((parts * head_dim) >> (shift + 1)) ++shift;
    heads = in.problem.heads / parts;
    // one more pixel, left of the first, and eight flags, since `eight` reads as many
    const int64_t count = in.problem.rows * heads + heads + 8;
    flags = arena.take<uint8_t>(count);
    if (flags == nullptr) return;
    std::memset(flags, 0, static_cast<size_t>(count));
    flags += heads;
  }

  // Of a head, with the offset of the left pixel.
  DEFORM_ATTN_INLINE void add(int head, int32_t offset) const {
    flags[head + (static_cast<uint32_t>(offset) >> shift)] = 1;
  }

  // Writes the numbers of those of flags first .. first + 7 that are reached and before `end`, and returns
  // how many they are. Writes eight numbers if there is one.
  DEFORM_ATTN_INLINE int eight(int64_t first, int64_t end, int32_t* numbers) const {
    constexpr int kLanes = kVectorBytes < 32 ? 4 : 8;
    uint64_t here, left;
    std::memcpy(&here, flags + first, 8);
    std::memcpy(&left, flags + first - heads, 8);
    here |= left;
    if (!kLittleEndian) here = __builtin_bswap64(here);  // byte i is flag first + i
    if (end - first < 8) here &= (uint64_t{1} << (8 * (end - first))) - 1;
    if (here == 0) return 0;
    // the first product moves byte i to bit 56 + i, the second adds the bytes
    const uint64_t set = (here * 0x0102040810204080u) >> 56;
    for (int i = 0; i < 8; i += kLanes) {
      const auto members = load_lanes<Vec<int32_t, kLanes>, kLanes>(kMembers.of[set] + i);
      store_lanes<kLanes>(numbers + i, members + static_cast<int32_t>(first));
    }
    return static_cast<int>((here * 0x0101010101010101u) >> 56);
  }
};

// products[k][i] = dot product of the output's gradient with pixel i of point k of head `head` of a share.
// Adds the point's share of the output's gradient to the sums of its pixels' gradients, unless `sums` is
// null, in the order of load_channels. Channels as in sum_points; `first`: they are the first channels of
// the head. `next`: elements from these channels to those that are prefetched; `fetches_pairs`: as in
// Inputs. kParts: as in sums_at.
template <int kLanes, int kVecs, int kParts, typename T, typename Acc>
DEFORM_ATTN_INLINE void visit_points(const T* __restrict value, const T* __restrict grad_output,
                                     const Run<Acc> run, const int32_t* __restrict reach, Acc* sums,
                                     const Reached reached, Quad<Acc>* products, bool first,
                                     int some, int head, int64_t next, bool fetches_pairs) {
  using V = Vec<Acc, kLanes>;
  V gradient[kVecs];
  load_channels<kLanes, kVecs>(grad_output, some, gradient);
  for (int k = 0; k < run.count; ++k) {
    if (run.next) {
      const auto fetch = [&](auto step) DEFORM_ATTN_INLINED {
        constexpr int kStep = step.value;
        fetch_pixels<kVecs * kLanes* int{sizeof(T)}, kStep>(value + next, run.next[k]);
        if (sums) {
          // sums_at with an invalid offset
          using Unit = std::conditional_t<kParts == 1, const Acc, const char>;
          static_assert(sizeof(Acc) == kParts * sizeof(Unit));
          fetch_pixels<kVecs * kLanes* int{sizeof(Acc)}, kStep>(
              reinterpret_cast<Unit*>(sums + next), run.next[k]);
        }
      };
      constexpr int kLine = kCacheLine;
      fetches_pairs ? fetch(std::integral_constant<int, 2 * kLine>())
                    : fetch(std::integral_constant<int, kLine>());
    }
    const Quad<int32_t>& offset = run.offset[k];
    if (offset[0] < 0) continue;
    const int32_t here = reach ? reach[k] : kOwned | kUpper | kLower;
    if (here == 0) continue;
    if (here & kOwned) {
      V totals[4] = {};
      each<4>([&](auto i) DEFORM_ATTN_INLINED {
        V channels[kVecs];
        load_channels<kLanes, kVecs>(value + offset[i], some, channels);
        each<kVecs>([&](auto v) DEFORM_ATTN_INLINED { totals[i] += gradient[v] * channels[v]; });
      });
      Vec<Acc, 4> product, before;
      four_sums<Acc, kLanes>(totals, product);
      if (!first) {
        std::memcpy(&before, products[k], sizeof(before));
        product += before;
      }
      std::memcpy(products[k], &product, sizeof(product));
    }
    each<4>([&](auto i) DEFORM_ATTN_INLINED {
      if (!(here & (i < 2 ? kUpper : kLower))) return;
      if constexpr (!std::is_same_v<T, Acc> && i % 2 == 0) {
        if (reached.flags) {
          reached.add(head, offset[i]);
        }
      }
      Acc* pixel = sums_at<kParts>(sums, offset[i]);
      const V share = splat<V>(run.share[k][i]);
      each<kVecs>([&](auto v) DEFORM_ATTN_INLINED {
        if (some > 0) {
          store_some<kLanes>(pixel, load_some<kLanes>(pixel, some) + share * gradient[v], some);
        } else {
          store<kLanes>(pixel + v * kLanes, load<kLanes>(pixel + v * kLanes) + share * gradient[v]);
        }
      });
    });
  }
}

// The gradients of a query's points, in working memory.
template <typename Acc>
struct PointGradients {
  Quad<Acc>* products;
  Acc* locations;
  Acc* weights;

  // `points`: that are visited together; `of_parts`: of all parts, where there are several.
  PointGradients(Arena& arena, int64_t points, int64_t of_parts)
      : products(arena.take<Quad<Acc>>(padded<Acc>(points))),
        locations(arena.take<Acc>(2 * padded<Acc>(points))),
        weights(arena.take<Acc>(padded<Acc>(points))),
        rounded_(arena.take<Acc>(std::max(padded<Acc>(points), kTile * kTile * of_parts))) {}

  // Writes those of all points, or of the owned ones where `reach` is given.
  template <typename Weight>
  DEFORM_ATTN_INLINE void write(Acc* to_locations, Weight* to_weights, const int32_t* reach,
                                int count) const {
    if (count == 0) return;
    if (!reach) {
      const auto numbers = static_cast<size_t>(count);
      std::memcpy(to_locations, locations, 2 * numbers * sizeof(Acc));
      auto* from = static_cast<Weight*>(rounded_);
      round(from, count);
      std::memcpy(to_weights, from, numbers * sizeof(Weight));
      return;
    }
    for (int k = 0; k < count; ++k) {
      if (!(reach[k] & kOwned)) continue;
      to_locations[2 * k] = locations[2 * k];
      to_locations[2 * k + 1] = locations[2 * k + 1];
      from_acc(weights[k], to_weights[k]);
    }
  }

  // Writes those of all points with streaming stores. Those of weights: of all `parts` after the last part.
  template <typename Weight>
  DEFORM_ATTN_INLINE void stream_out(Acc* to_locations, Weight* to_weights, const Visit& visit,
                                     int parts, int count) const {
    stream(to_locations, locations, 2 * static_cast<size_t>(count) * sizeof(Acc));
    const int of_query = parts * count, before = visit.part * count;
    auto* line = static_cast<Weight*>(rounded_) + (parts > 1 ? visit.index : 0) * of_query;
    round(line + before, count);
    if (visit.part + 1 < parts) return;
    stream(to_weights - before, line, static_cast<size_t>(of_query) * sizeof(Weight));
  }

 private:
  void* rounded_;  // gradients of weights as Weight; with several parts, of the queries of a block

  // Rounds whole vectors, up to some numbers too many.
  template <typename Weight>
  DEFORM_ATTN_INLINE void round(Weight* to, int count) const {
    constexpr int kLanes = kNativeLanes<Acc>;
    for (int k = 0; k < count; k += kLanes) store<kLanes>(to + k, load<kLanes>(weights + k));
  }
};

// Whether the gradients that a share writes for each query are whole cache lines.
inline bool fills_lines(const Problem& p, const Gradients& grads, const Share& own,
                        size_t weight_bytes) {
  const auto starts_one = [](const void* at) {
    return reinterpret_cast<uintptr_t>(at) % kCacheLine == 0;
  };
  const auto ends_one = [&](int heads) {  // then locations, which have at least as many bytes, do
    return static_cast<size_t>(heads * p.points) * weight_bytes % kCacheLine == 0;
  };
  return starts_one(grads.locations) && starts_one(grads.weights) && ends_one(p.heads) &&
         ends_one(own.first_head) && ends_one(own.last_head);
}

// Calls `use(first, last)` with ranges of the rows of value that together belong to a share: its band of
// each level and, for band 0, the rows that belong to no level.
template <typename Use>
void each_range(const Inputs& in, const Share& own, const Use& use) {
  const int64_t rows = in.problem.rows;
  if (own.bands == 1) return use(int64_t{0}, rows);
  for (int l = 0; l < in.problem.levels; ++l) {
    const Level& level = in.levels[l];
    const auto row = [&](int band) {
      return level.start + int64_t{level.height} * band / own.bands * level.width;
    };
    use(row(own.band), row(own.band + 1));
  }
  for (int64_t row = 0; own.band == 0 && row < rows;) {
    const Level* next = nullptr;  // the first level from `row` on
    for (int l = 0; l < in.problem.levels; ++l) {
      const Level& level = in.levels[l];
      if (level.start >= row && (!next || level.start < next->start)) next = &level;
    }
    use(row, next ? next->start : rows);
    row = next ? next->start + int64_t{next->height} * next->width : rows;
  }
}

// Rounds sums that are in the order of load_channels, and clears them.
template <int kLanes, int kVecs, typename T>
DEFORM_ATTN_INLINE void round_and_clear(AccOf<T>* sums, T* to, int some) {
  Vec<AccOf<T>, kLanes> from[kVecs];
  load_channels<kLanes, kVecs>(sums, some, from);
  store_channels<kLanes, kVecs>(to, some, from);
  const Vec<AccOf<T>, kLanes> zeros[kVecs] = {};
  store_channels<kLanes, kVecs>(sums, some, zeros);
}

// Writes the sums of heads first_head .. last_head - 1 of a share to its gradient of value, rounded to 16 bits
// where it has them, and clears the sums. Both begin at first_head.
template <int kParts, typename T>
void round_sums(const Inputs& in, const Share& own, const Reached& reached, AccOf<T>* sums, T* to) {
  using Acc = AccOf<T>;
  const int head_dim = in.problem.head_dim;
  const int64_t stride = in.problem.row_stride();
  const int64_t channels = (own.last_head - own.first_head) * head_dim;
  const int64_t pitch = own.sums == Sums::kCopied ? channels : stride / kParts;  // of the sums
  if (!reached.flags) {
    constexpr int64_t kAhead = 32;  // rows
    return each_range(in, own, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const int64_t ahead = row + kAhead < last ? row + kAhead : row;
        fetch_all<true>(sums, sizeof(Acc), ahead * pitch, static_cast<int>(channels));
        fetch_all<true>(to, sizeof(T), ahead * stride, static_cast<int>(channels));
        for (int64_t head = 0; head < channels; head += head_dim) {
          for_channels<Acc>(head_dim, [&](int c, auto lanes, auto vecs, int some) {
            round_and_clear<lanes.value, vecs.value>(sums + row * pitch + head + c,
                                                     to + row * stride + head + c, some);
          });
        }
      }
    });
  }
  // Rows that have to be cleared are taken some at a time, so that they are still in a cache afterwards.
  // Places that were reached are collected first, so that their memory can be prefetched: from the
  // third-level cache, where a thread waits for many lines at a time.
  constexpr int64_t kAtOnce = int64_t{1} << 16, kMost = 4096, kAhead = 96;  // kAtOnce: elements
  const int64_t rows = kParts > 1 ? in.problem.rows : std::max<int64_t>(kAtOnce / stride, 1);
  int32_t of_sums[kMost], of_value[kParts > 1 ? kMost : 1];  // places, in elements
  each_range(in, own, [&](int64_t first, int64_t end) {
    for (int64_t last; first < end; first = last) {
      last = first + rows < end ? first + rows : end;
      if constexpr (kParts == 1) {  // otherwise they are zeros
        const auto bytes = [&](int64_t elements) {
          return sizeof(T) * static_cast<size_t>(elements);
        };
        if (channels == stride) {
          clear_bytes(to + first * stride, bytes((last - first) * stride));
        } else {
          for (int64_t row = first; row < last; ++row) {
            std::memset(to + row * stride, 0, bytes(channels));
          }
        }
      }
      const int64_t last_flag = last * reached.heads;
      for (int64_t flag = first * reached.heads; flag < last_flag;) {
        int64_t found = 0;
        for (; flag < last_flag && found + 8 <= kMost; flag += 8) {
          found += reached.eight(flag, last_flag, of_sums + found);
        }
        if constexpr (kParts > 1) {
          const double rows_per_flag = 1.0 / reached.heads;
          for (int64_t i = 0; i < found; ++i) {
            // a division of integers takes longer; 0.5: the product is never just below an integer
            const auto row = static_cast<int32_t>((of_sums[i] + 0.5) * rows_per_flag);
            of_sums[i] *= head_dim;
            of_value[i] = of_sums[i] + row * static_cast<int32_t>(stride - pitch);
          }
        } else {
          for (int64_t i = 0; i < found; ++i) of_sums[i] *= head_dim;
        }
        const int32_t* places = kParts > 1 ? of_value : of_sums;
        for_channels<Acc>(head_dim, [&](int c, auto lanes, auto vecs, int some) {
          for (int64_t i = -kAhead; i < found; ++i) {
            if (const int64_t next = i + kAhead; next < found) {
              for (int at = 0; at < vecs.value * lanes.value; at += int{kCacheLine / sizeof(Acc)}) {
                __builtin_prefetch(sums + of_sums[next] + c + at, 1, 2);
              }
              if constexpr (kParts > 1) __builtin_prefetch(to + places[next] + c, 1, 2);
            }
            if (i < 0) continue;
            round_and_clear<lanes.value, vecs.value>(sums + of_sums[i] + c, to + places[i] + c,
                                                     some);
          }
        });
      }
    }
  });
}

template <int kParts, typename T, typename Weight>
void backward_share(const Inputs& in, const Gradients& grads, const Share& own, void* scratch) {
  using Acc = AccOf<T>;
  const Problem& p = in.problem;
  const int of_share = own.last_head - own.first_head;
  const int heads = in.copy ? in.heads : of_share;  // of a visit
  const int parts = of_share / heads;
  const int count = heads * p.points;
  const bool is_fused = in.fused.reference != nullptr;
  Arena arena(scratch);
  PointLevels<Acc> levels(arena, in, heads);
  levels.enter(own.batch);
  PointSource<Acc> source(arena, in, heads);
  Pair<Acc> pair(arena, count, true);
  const PointGradients<Acc> point_grads(arena, count, parts > 1 ? of_share * p.points : 0);

  const T* value = static_cast<const T*>(in.copy);
  if (!value) value = static_cast<const T*>(in.value) + p.value_at(own.batch, 0, own.first_head);
  const int64_t of_part = p.rows * heads * p.head_dim;  // of a copy, and of its sums
  const bool adds = grads.value != nullptr, partial = own.bands > 1 || !adds;
  constexpr bool kRounds = !std::is_same_v<T, Acc>;
  Acc* sums = nullptr;
  if (adds) {
    sums = static_cast<Acc*>(own.sums == Sums::kNone ? grads.value : grads.sums);
    if (own.sums == Sums::kNone || own.sums == Sums::kWhole) {
      sums += p.value_at(own.batch, 0, own.first_head);
    }
  }
  const Reached reached(arena, in, kRounds && adds, kParts);
  const size_t weight_bytes = is_fused ? sizeof(Acc) : sizeof(Weight);  // of their gradients
  const bool streams = grads.past_caches && !partial && fills_lines(p, grads, own, weight_bytes) &&
                       (parts == 1 || count % kNativeLanes<Acc> == 0);
  int64_t block = own.batch * blocks_of(in);
  const int64_t last = block + blocks_of(in);
  const auto take = [&] { return block < last ? block++ : -1; };
  const auto first_head_of = [&](const Visit& visit) {
    return own.first_head + visit.part * heads;
  };
  // Hardware prefetchers follow neither the operands of a share of the heads, which are pieces of rows, nor
  // those of sorted queries. Inlined: GCC drops calls of a function that only prefetches.
  const auto fetch = [&](const Visit& visit) DEFORM_ATTN_INLINED {
    if (heads == p.heads && !in.order) return;
    const int first_head = first_head_of(visit);
    const int64_t at = p.point_at(visit.batch, visit.query, first_head);
    fetch_all<false>(in.locations, is_fused ? sizeof(Weight) : sizeof(Acc), 2 * at, 2 * count);
    fetch_all<false>(in.weights, sizeof(Weight), at, count);
    fetch_all<false>(grads.output, sizeof(T), p.output_at(visit.batch, visit.query, first_head),
                     heads * p.head_dim);
    if (streams) return;
    fetch_all<true>(grads.locations, sizeof(Acc), 2 * at, 2 * count);
    fetch_all<true>(grads.weights, weight_bytes, at, count);
  };
  Upcoming upcoming(in, parts, take, fetch);
  const int ahead = heads_ahead(in, heads);
  const auto place = [&](auto& placed) {
    if (!upcoming.next(placed.visit)) return false;
    source.template points<Weight>(in, own.batch, placed.visit.query, first_head_of(placed.visit),
                                   heads, [&](const Acc* locations, const auto* weights) {
                                     placed.points.template place<true>(levels, locations, weights,
                                                                        count);
                                   });
    if (partial) placed.points.reach_of(levels, own.band, own.bands, adds, count);
    return true;
  };
  pair.run(place, [&](const auto& now, const auto& next) {
    const Visit& visit = now.visit;
    const int first_head = first_head_of(visit);
    const T* pixels = value + visit.part * of_part;
    Acc* to_sums = adds ? sums + visit.part * of_part : nullptr;
    const T* grad_output =
        static_cast<const T*>(grads.output) + p.output_at(own.batch, visit.query, first_head);
    const int32_t* reach = partial ? now.points.reach : nullptr;
    for (int head = 0; head < heads; ++head) {
      const int first = head * p.points, channel = head * p.head_dim;
      const Run<Acc> run = run_of(in, now.points, next.points, head, heads, ahead);
      const int to_next = run.next_head * p.head_dim - channel;
      for_channels<Acc>(p.head_dim, [&](int c, auto lanes, auto vecs, int some) {
        visit_points<lanes.value, vecs.value, kParts, T, Acc>(
            pixels + channel + c, grad_output + channel + c, run, reach ? reach + first : nullptr,
            adds ? to_sums + channel + c : nullptr, reached, point_grads.products + first, c == 0,
            some, head, to_next, in.fetches_pairs);
      });
    }
    now.points.pull_back(levels, point_grads.products, point_grads.locations, point_grads.weights,
                         count);
    const int64_t at = p.point_at(own.batch, visit.query, first_head);
    const auto write = [&](auto* weights) DEFORM_ATTN_INLINED {
      Acc* locations = static_cast<Acc*>(grads.locations) + 2 * at;
      streams ? point_grads.stream_out(locations, weights + at, visit, parts, count)
              : point_grads.write(locations, weights + at, reach, count);
    };
    // in a fused call finish_queries reads them
    is_fused ? write(static_cast<Acc*>(grads.weights)) : write(static_cast<Weight*>(grads.weights));
  });
  if (adds && own.sums != Sums::kNone) {
    Share part = own;
    for (part.first_head = own.first_head; part.first_head < own.last_head;
         part.first_head = part.last_head, sums += of_part) {
      part.last_head = part.first_head + heads;
      T* grad_value = static_cast<T*>(grads.value) + p.value_at(own.batch, 0, part.first_head);
      round_sums<kParts>(in, part, reached, sums, grad_value);
    }
  }
  if (streams) finish_streams();
}

}  // namespace
}  // namespace deform_attn::cpu
