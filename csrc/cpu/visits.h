// The order in which queries are visited.
//
// In an encoder every pixel is a query that looks round itself. Visited in tiles rather than in
// rows, the pixels that neighbours share are still in cache.
#pragma once

#include "kernels.h"

namespace deform_attn::cpu {
namespace {  // compiled once for each instruction set, so never shared between them

constexpr int kTile = 8;               // pixels
constexpr int kBlock = kTile * kTile;  // queries

inline int64_t tiles(int extent) { return (extent + kTile - 1) / kTile; }

inline int64_t blocks_of(const Inputs& in) {
  if (!in.queries_are_pixels) return (in.problem.queries + kBlock - 1) / kBlock;
  int64_t count = 0;
  for (int l = 0; l < in.problem.levels; ++l) {
    count += tiles(in.levels[l].height) * tiles(in.levels[l].width);
  }
  return count;
}

// The queries of a block in the order of visits; returns how many.
inline int queries_of(const Inputs& in, int64_t block, int64_t (&queries)[kBlock]) {
  int count = 0;
  if (!in.queries_are_pixels) {
    const int64_t first = block * kBlock;
    for (int64_t q = first; q < first + kBlock && q < in.problem.queries; ++q) {
      queries[count++] = q;
    }
    return count;
  }
  int64_t first = 0;
  for (int l = 0; l < in.problem.levels; ++l) {
    const int height = in.levels[l].height, width = in.levels[l].width;
    const int64_t across = tiles(width), in_level = tiles(height) * across;
    if (block < in_level) {
      const int top = static_cast<int>(block / across) * kTile;
      const int left = static_cast<int>(block % across) * kTile;
      for (int y = top; y < top + kTile && y < height; ++y) {
        for (int x = left; x < left + kTile && x < width; ++x) {
          queries[count++] = first + int64_t{y} * width + x;
        }
      }
      return count;
    }
    block -= in_level;
    first += int64_t{height} * width;
  }
  return count;
}

}  // namespace
}  // namespace deform_attn::cpu
