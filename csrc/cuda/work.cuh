// How the work of a call is divided among blocks and lanes.
//
//   Divider      division by a number that the host knows, without a division
//   BlockLayout  the parameter of a kernel that says how its blocks divide the work
//   Part         the queries, head and channels that one block works on
//   Teams        the query that a lane works on, and its channels
//
// After any edit: make kernels traffic
#pragma once

#include "../problem.h"
#include "vec.cuh"

namespace deform_attn {

// Exact for n < 2**31. (Hacker's Delight, 10-9: the multiplier is 2**32 * (2**shift - divisor) / divisor + 1.)
struct Divider {
  unsigned divisor, multiplier, shift;

  HOST_DEVICE unsigned divide(unsigned n) const {
    return (static_cast<unsigned>((uint64_t{n} * multiplier) >> 32) + n) >> shift;
  }
};

inline Divider divider_by(unsigned divisor) {
  unsigned shift = 0;
  while ((uint64_t{1} << shift) < divisor) ++shift;
  const uint64_t rest = (uint64_t{1} << shift) - divisor;
  return {divisor, static_cast<unsigned>((rest << 32) / divisor + 1), shift};
}

// A block works on `positions` queries of one head, a warp on `warp_positions` of them.
struct BlockLayout {
  int positions;
  int warp_positions;  // up to 32
  int lane_bits;       // 1 << lane_bits lanes share the channels of a point
  int split_bits;      // 1 << split_bits groups of these share the points of a query
  // How a block's number becomes its Part, see part_of.
  Divider processors;   // 1: blocks keep their order
  unsigned each, more;  // each multiprocessor has `each` blocks; the first `more` have one more
  Divider pieces;       // of the channels
  // Heads, then tiles of an image and head, of `positions` queries each. Where by_head: tiles, then heads.
  Divider inner, outer;
  bool by_head;
};

// The part of the work that one block does: `count` queries of one image and head, from `first` on in
// the order of query_at, and the channels from `channel` on.
struct Part {
  int64_t first;
  unsigned batch;
  int head;
  int channel;
  int count;

  // (batch, query) of the first query, and its first point.
  __device__ int64_t first_item(const Problem& problem) const {
    return batch * problem.queries + first;
  }
  __device__ int64_t first_point(const Problem& problem) const {
    return (first_item(problem) * problem.heads + head) * problem.points;
  }
  // Its elements of the output, from channel 0 on.
  __device__ int64_t first_output(const Problem& problem) const {
    return (first_item(problem) * problem.heads + head) * problem.head_dim;
  }
};

// The channels change fastest with the block number, then the head: blocks that run at the same time
// read neighbouring parts of value, locations and weights. Few blocks are all resident at once, and the
// hardware deals them out to the multiprocessors in turn: each multiprocessor then gets blocks of one
// head (by_head), whose samples share pixels in its first-level cache.
__device__ inline Part part_of(unsigned block, const Problem& problem, const BlockLayout& blocks,
                               int channels) {
  Part part;
  // Not in a branch, with which fused kernels spill registers.
  const unsigned turn = blocks.processors.divide(block);
  const unsigned processor = block - turn * blocks.processors.divisor;
  const unsigned number = processor * blocks.each + min(processor, blocks.more) + turn;
  const unsigned item = blocks.pieces.divide(number);
  part.channel = static_cast<int>(number - item * blocks.pieces.divisor) * channels;
  const unsigned rest = blocks.inner.divide(item), inner = item - rest * blocks.inner.divisor;
  part.batch = blocks.outer.divide(rest);
  const unsigned outer = rest - part.batch * blocks.outer.divisor;
  part.head = static_cast<int>(blocks.by_head ? outer : inner);
  part.first = int64_t{blocks.by_head ? inner : outer} * blocks.positions;
  part.count = static_cast<int>(min(problem.queries - part.first, int64_t{blocks.positions}));
  return part;
}

// A warp works on 32 >> lane_bits queries of one head at a time, with 1 << lane_bits lanes each.
struct Teams {
  int lane_bits;
  int lane;  // of the warp

  __device__ int lanes() const { return 1 << lane_bits; }
  __device__ int count() const { return kWarp >> lane_bits; }
  __device__ int team() const { return lane >> lane_bits; }
  __device__ int channel_lane() const { return lane & (lanes() - 1); }
  // Entries staged for the teams: entry i belongs to the point round_of(i) of the query query_of(i).
  __device__ int query_of(int entry) const { return entry & (count() - 1); }
  __device__ int round_of(int entry) const { return entry >> (5 - lane_bits); }
};

}  // namespace deform_attn
