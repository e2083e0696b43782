// The interface of the CPU kernels, independent of torch and of the instruction set.
//
//   Inputs, Gradients, FusedGradients   the arrays of a call
//   Blocks                              the queries of a forward pass, divided among threads
//   Share                               a thread's part of a backward pass
//   Kernels                             the functions that one instruction set provides
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace deform_attn::cpu {

struct Inputs {
  Problem problem;
  const Level* levels;      // [L], each within value
  const int* first_point;   // [L + 1]: level l has points first_point[l] .. first_point[l + 1] - 1
  bool queries_are_pixels;  // query i is pixel i of the concatenated levels, as in an encoder
  Type value_type;
  bool weights_are_acc;  // weights have the accumulation type, not that of value
  const void* value;
  const void* locations;  // in the accumulation type; a fused call: offsets in the weights' type
  const void* weights;    // a fused call: logits
  Fused fused;
  const int32_t* order;  // [batch, queries]: each image's queries in the order of visits; or null
  // A copy of the pixels of heads first_head .. first_head + heads - 1 of an image, [rows, heads, head_dim], for
  // a pass over these heads; or null, for one over all heads. A backward pass over more heads visits `heads`
  // of them at a time: first_head is that of its share, and the copies of its parts follow each other.
  const void* copy;
  int first_head, heads;
  // Whether the processor fetches the other one of a pair of cache lines by itself.
  bool fetches_pairs;
  const uint8_t* mask;  // [batch, rows]: 1 for a row of value that reads as zero; null: no such row
};

struct Gradients {
  const void* output;  // in, of value's type
  // Of value's type; null: not requested. Added to with Sums::kNone, otherwise out. Zeros before the passes of
  // Sums::kNarrow.
  void* value;
  void* sums;        // see Sums; in the accumulation type, zeros before a share's pass and after it
  void* locations;   // out, in the accumulation type
  void* weights;     // out, of the weights' type; in the accumulation type in a fused call
  bool past_caches;  // write locations and weights with streaming stores
};

// From the gradients of locations and weights to those of a fused call's operands.
struct FusedGradients {
  const void* locations;  // in: [B, Q, M, K, 2] in the accumulation type
  const void* weights;    // in: [B, Q, M, K] in the accumulation type
  void* reference;        // out, as Fused::reference; null: not requested
  void* offsets;          // out, of the offsets' type; may be `locations`
  void* logits;           // out, of the logits' type; may be `weights`
};

// Blocks of queries, numbered over all images. Each thread takes some at a time until none is left.
struct Blocks {
  std::atomic<int64_t> next;
  int64_t last, at_once;

  // Takes blocks first .. returned number - 1; none where both are equal.
  int64_t take(int64_t& first) {
    first = next.fetch_add(at_once, std::memory_order_relaxed);
    if (first > last) first = last;
    return first + at_once < last ? first + at_once : last;
  }
};

// Where a share of the backward pass adds up its gradient of value, which it writes at the end.
enum class Sums {
  kNone,   // in the gradient itself, which has the accumulation type
  kWhole,  // shared by all shares, in the shape of value; 16 bits
  kNarrow,  // its own, [rows, row_stride / kNarrow]; 16 bits, one band, 1 / kNarrow of the heads or fewer
  kCopied,  // its own, in the shape of Inputs::copy; any type, one band
};
constexpr int kNarrow = 4;  // divides the number of heads

// A share of the backward pass: some heads of an image, and a band of the rows of each level. Every
// number that the pass writes belongs to exactly one share, so shares run in parallel. Each adds in
// the order of the visits, so results do not depend on the number of threads.
struct Share {
  int64_t batch;
  int first_head, last_head;
  int band, bands;  // rows height * band / bands .. height * (band + 1) / bands - 1 of each level
  Sums sums;
};

// How passes with Inputs::copy divide the heads.
struct Division {
  int at_once;  // Inputs::heads, a divisor of all heads; 0: one pass over all without a copy is faster
  int of_share;  // of the backward pass: a multiple of at_once, a divisor of all heads
};

struct Kernels {
  const char* name;
  // Bytes of working memory of a thread. `copied`: the most heads of a share with Inputs::copy, or 0.
  size_t (*scratch_bytes)(const Inputs&, int copied);
  // The number of blocks of queries in an image.
  int64_t (*blocks)(const Inputs&);
  // order[0 .. queries - 1] = the queries of an image, neighbours close to each other.
  void (*sort)(const Inputs&, int64_t batch, int32_t* order);
  Division (*division)(const Inputs&, bool backward);
  // Copies rows first .. last - 1 of what Inputs::copy describes to the same rows of `to`.
  void (*copy)(const Inputs&, int64_t batch, int64_t first, int64_t last, void* to);
  // Takes blocks and computes their outputs until none is left.
  void (*forward)(const Inputs&, void* output, Blocks&, void* scratch);
  // Whether shares of a part of the heads with Sums::kNarrow are faster.
  bool (*narrow)(const Inputs&);
  void (*backward)(const Inputs&, const Gradients&, const Share&, void* scratch);
  // For queries first .. last - 1, numbered over all images.
  void (*finish)(const Inputs&, const FusedGradients&, int64_t first, int64_t last, void* scratch);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace deform_attn::cpu
