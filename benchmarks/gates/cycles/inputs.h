// The calls that are modelled, their inputs, and what they must compute.
//
//   Work       the sizes of a call
//   Inputs     its tensors
//   Gradients, reference_output, reference_gradients   what it must compute, in float64
//
// Inputs are drawn with a fixed seed: the figures of docs/design-gpu.md depend on them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cycles {

struct Work {
  std::vector<std::pair<int, int>> levels;  // (height, width)
  int queries;
  int heads, head_dim;
  int points;  // of a level
  bool queries_are_pixels;

  int num_levels() const { return static_cast<int>(levels.size()); }
  int num_points() const { return points * num_levels(); }
  int rows() const;
  int64_t items() const { return int64_t{queries} * heads; }
};

// "encoder": the pixels of four levels of an image of 800 x 1333; "encoder_small": of 16 x 24;
// "queries": 300 queries on three levels of an image of 640 x 640.
Work work_of(const std::string& name);

struct Inputs {
  Work work;
  std::vector<float> value;               // [S, M, D]
  std::vector<float> grad_output;         // [Q, M, D]
  std::vector<float> sampling_locations;  // [Q, M, K, 2]
  std::vector<float> attention_weights;   // [Q, M, K]
  // Of the same points in a fused call.
  std::vector<float> reference_points;  // [Q, 2]
  std::vector<float> sampling_offsets;  // [Q, M, K, 2]
  std::vector<float> attention_logits;  // [Q, M, K]
  int reference_size = 2;
  float offset_scale = 0.5f;
};

Inputs draw(const Work& work);

// Boxes [Q, 4] around the reference points, and the offsets from them to the same points.
void use_boxes(Inputs& inputs);

struct Gradients {
  std::vector<double> value, locations, weights;   // of all inputs of a call
  std::vector<double> offsets, logits, reference;  // of a fused one
};

std::vector<double> reference_output(const Inputs& inputs);
Gradients reference_gradients(const Inputs& inputs);

}  // namespace cycles
