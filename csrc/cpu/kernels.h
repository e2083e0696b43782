// What the CPU kernels do, free of torch and of any instruction set.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace deform_attn::cpu {

struct Inputs {
  Problem problem;
  const Level* levels;     // [L], each within value
  const int* first_point;  // [L + 1]: points first_point[l] .. first_point[l + 1] - 1 are level l's
  bool queries_are_pixels;  // query i is the i-th pixel of the levels in turn, as in an encoder
  Type value_type;
  bool weights_are_acc;  // weights have the type of sums, else that of value; a layer's offsets too
  const void* value;
  const void* locations;  // in the type of sums: double for double, else float
  const void* weights;
  Fused fused;
};

struct Gradients {
  const void* output;  // in: value's type
  void* value;         // out, added to: in the type of sums, zero at first; null: not requested
  void* locations;     // out: in the locations' type
  void* weights;       // out: in the weights' type; in the type of sums for a layer
  bool past_caches;    // locations and weights are best written to memory, past the caches
};

// What `finish` makes of a layer's gradients of locations and weights.
struct FusedGradients {
  const void* locations;  // in: [B, Q, M, K, 2] in the type of sums
  const void* weights;    // in: [B, Q, M, K] in the type of sums
  void* reference;        // out, as Fused::reference; null: not requested
  void* offsets;          // out, in the offsets' type; may be `locations`
  void* logits;           // out, in the logits' type; may be `weights`
};

// Blocks of queries, counted over all images: threads take some of them at a time until none is left.
struct Blocks {
  std::atomic<int64_t> next;
  int64_t last, at_once;

  // Sets `first`, and returns the block behind the last one; `first` where none is left.
  int64_t take(int64_t& first) {
    first = next.fetch_add(at_once, std::memory_order_relaxed);
    if (first > last) first = last;
    return first + at_once < last ? first + at_once : last;
  }
};

// A share of the backward pass: some heads of an image, and of each level some of its rows. Every
// number that the pass writes belongs to one share, so shares run side by side, and each adds in
// the order of the visits, so that any number of threads gives the same bits.
struct Share {
  int64_t batch;
  int first_head, last_head;
  int band, bands;  // rows height * band / bands .. height * (band + 1) / bands - 1 of each level
};

struct Kernels {
  const char* name;
  // Bytes that a thread needs while it works.
  size_t (*scratch_bytes)(const Inputs&);
  // Blocks of queries of an image: visits go block by block.
  int64_t (*blocks)(const Inputs&);
  // All blocks that this thread gets.
  void (*forward)(const Inputs&, void* output, Blocks&, void* scratch);
  void (*backward)(const Inputs&, const Gradients&, const Share&, void* scratch);
  // Queries first .. last - 1, counted over all images.
  void (*finish)(const Inputs&, const FusedGradients&, int64_t first, int64_t last, void* scratch);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace deform_attn::cpu
