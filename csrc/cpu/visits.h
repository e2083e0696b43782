// The order in which queries are visited.
//
//   blocks_of      the number of blocks of queries in an image
//   sort_queries   sorts the queries of an image by where they sample
//   Visit          a query, and the part of the heads for which it is visited
//   Visits         iterates over the queries of the blocks that a thread takes
//   Upcoming       the same, some queries ahead
//
// Neighbouring queries share pixels, which should still be in the cache. In an encoder every pixel is
// a query that samples around itself: queries are visited in tiles of pixels. Elsewhere a block is a
// run of queries, sorted by place where `value` is larger than a cache.
#pragma once

#include "kernels.h"

namespace deform_attn::cpu {
namespace {  // compiled once for each instruction set, so never shared between them

constexpr int kTile = 8;    // pixels
constexpr int kBlock = 16;  // queries of a block, where they are not pixels

inline int64_t tiles(int extent) { return (extent + kTile - 1) / kTile; }

inline int64_t blocks_of(const Inputs& in) {
  if (!in.queries_are_pixels) return (in.problem.queries + kBlock - 1) / kBlock;
  int64_t count = 0;
  for (int l = 0; l < in.problem.levels; ++l) {
    count += tiles(in.levels[l].height) * tiles(in.levels[l].width);
  }
  return count;
}

// The cell of a place in a grid of kSide x kSide cells. Cells are numbered in Morton order: neighbours
// have close numbers. Places off the map belong to the nearest cell, NaN to the first.
constexpr int kSideBits = 5;
constexpr int kSide = 1 << kSideBits;
constexpr int kCells = kSide * kSide;
template <typename Acc>
inline int cell_of(Acc x, Acc y) {
  const auto along = [](Acc place) {
    return place > 0 ? place < 1 ? static_cast<int>(place * kSide) : kSide - 1 : 0;
  };
  const int column = along(x), row = along(y);
  const auto spread = [](int bits) {  // bit i to bit 2 * i
    bits = (bits | bits << 4) & 0x10f;
    bits = (bits | bits << 2) & 0x133;
    return (bits | bits << 1) & 0x155;
  };
  return spread(column) | spread(row) << 1;
}

// order[0 .. queries - 1] = the queries of an image, sorted by the cell of their reference point or,
// where locations are given, of their first point. Queries of a cell keep their order.
template <typename Acc>
void sort_queries(const Inputs& in, int64_t batch, int32_t* order) {
  const Problem& p = in.problem;
  const Acc* points = static_cast<const Acc*>(in.locations) + 2 * p.point_at(batch, 0, 0);
  int64_t apart = 2 * p.point_at(0, 1, 0);  // numbers from one query to the next
  if (in.fused.reference) {
    apart = in.fused.levels * int64_t{in.fused.size};
    points = static_cast<const Acc*>(in.fused.reference) + batch * p.queries * apart;
  }
  constexpr int64_t kAhead = 16;  // queries, each in another cache line
  int32_t next[kCells + 1] = {};  // where the next query of a cell goes
  const auto cell = [&](int64_t query) {
    return cell_of(points[query * apart], points[query * apart + 1]);
  };
  for (int64_t query = 0; query < p.queries; ++query) {
    __builtin_prefetch(points + (query + kAhead) * apart);  // may lie behind them
    ++next[cell(query) + 1];
  }
  for (int i = 0; i < kCells; ++i) next[i + 1] += next[i];
  for (int64_t query = 0; query < p.queries; ++query) {
    order[next[cell(query)]++] = static_cast<int32_t>(query);
  }
}

struct Visit {
  int64_t batch, query;
  int part;   // of the heads
  int index;  // of the query in its block
};

// The queries of some blocks, one after another; blocks are numbered over all images. With several parts of
// the heads a block is visited once for each part, so that its operands are still in a cache.
class Visits {
 public:
  Visits(const Inputs& in, int parts)
      : in_(in), per_image_(blocks_of(in)), parts_(parts), part_(parts - 1) {}

  // Advances to the next query; false where none is left. `take()` returns the next block, or a
  // negative number.
  template <typename Take>
  bool next(const Take& take, Visit& to) {
    while (at_ == count_) {
      if (part_ + 1 < parts_) {
        ++part_;
        at_ = 0;
        continue;
      }
      const int64_t block = take();
      if (block < 0) return false;
      batch_ = block / per_image_;
      part_ = 0;
      enter(block % per_image_);
    }
    int64_t query = first_ + int64_t{at_ / width_} * pitch_ + at_ % width_;
    if (in_.order) query = in_.order[batch_ * in_.problem.queries + query];
    to = {batch_, query, part_, at_};
    ++at_;
    return true;
  }

 private:
  const Inputs& in_;
  int64_t per_image_, batch_ = 0;
  int parts_, part_;
  // The current block: rows of `width_` queries; the rows are `pitch_` queries apart.
  int64_t first_ = 0, pitch_ = 0;
  int width_ = 1, count_ = 0, at_ = 0;

  void enter(int64_t block) {
    at_ = 0;
    if (!in_.queries_are_pixels) {
      first_ = block * kBlock;
      const int64_t left = in_.problem.queries - first_;
      width_ = count_ = static_cast<int>(left < kBlock ? left : kBlock);
      return;
    }
    first_ = 0;
    for (int l = 0; l < in_.problem.levels; ++l) {
      const int height = in_.levels[l].height, width = in_.levels[l].width;
      const int64_t across = tiles(width), in_level = tiles(height) * across;
      if (block < in_level) {
        const int top = static_cast<int>(block / across) * kTile;
        const int left = static_cast<int>(block % across) * kTile;
        first_ += int64_t{top} * width + left;
        pitch_ = width;
        width_ = width - left < kTile ? width - left : kTile;
        count_ = width_ * (height - top < kTile ? height - top : kTile);
        return;
      }
      block -= in_level;
      first_ += int64_t{height} * width;
    }
  }
};

// The queries of Visits, found kAhead queries early, so that what belongs to them can be prefetched.
template <typename Take, typename Fetch>
class Upcoming {
 public:
  // `parts`, `take`: as in Visits. `fetch(visit)` is called for each query when it is found.
  Upcoming(const Inputs& in, int parts, const Take& take, const Fetch& fetch)
      : visits_(in, parts), take_(take), fetch_(fetch) {
    while (count_ < kAhead && find()) ++count_;
  }

  // Advances to the next query; false where none is left.
  bool next(Visit& to) {
    if (count_ == 0) return false;
    to = ring_[at_];
    if (!find()) --count_;
    at_ = (at_ + 1) % kAhead;
    return true;
  }

 private:
  static constexpr int kAhead = 8;

  Visits visits_;
  const Take& take_;
  const Fetch& fetch_;
  // The next query is at at_, the one that is found next belongs behind the last of count_.
  Visit ring_[kAhead];
  int at_ = 0, count_ = 0;

  bool find() {
    Visit& to = ring_[(at_ + count_) % kAhead];
    if (!visits_.next(take_, to)) return false;
    fetch_(to);
    return true;
  }
};

}  // namespace
}  // namespace deform_attn::cpu
