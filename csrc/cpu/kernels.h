// What the CPU kernels do, free of torch and of any instruction set.
#pragma once

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
  bool
      weights_are_real;  // weights have the type of sums, else that of value; a layer's offsets too
  const void* value;
  const void* locations;  // in the type of sums: double for double, else float
  const void* weights;
  Layer layer;
};

struct Gradients {
  const void* output;  // in: value's type
  void* value;         // out, added to: in the type of sums, zero at first
  void* locations;     // out: in the locations' type
  void* weights;       // out: in the weights' type; in the type of sums for a layer
};

// What `finish` makes of a layer's gradients of locations and weights.
struct LayerGradients {
  const void* locations;  // in: [B, Q, M, K, 2] in the type of sums
  const void* weights;    // in: [B, Q, M, K] in the type of sums
  void* reference;        // out, as Layer::reference
  void* offsets;          // out, in the offsets' type; may be `locations`
  void* logits;           // out, in the logits' type; may be `weights`
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
  // Blocks first .. last - 1, counted over all images.
  void (*forward)(const Inputs&, void* output, int64_t first, int64_t last, void* scratch);
  void (*backward)(const Inputs&, const Gradients&, const Share&, void* scratch);
  // Queries first .. last - 1, counted over all images.
  void (*finish)(const Inputs&, const LayerGradients&, int64_t first, int64_t last, void* scratch);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace deform_attn::cpu
