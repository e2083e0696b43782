#include "inputs.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "code.h"

namespace cycles {

int Work::rows() const {
  int rows = 0;
  for (const auto& [height, width] : levels) rows += height * width;
  return rows;
}

Work work_of(const std::string& name) {
  Work work = {{}, 0, 8, 32, 4, true};
  if (name == "encoder") {
    work.levels = {{100, 167}, {50, 84}, {25, 42}, {13, 21}};
  } else if (name == "encoder_small") {
    work.levels = {{16, 24}, {8, 12}, {4, 6}, {2, 3}};
  } else if (name == "queries") {
    work.levels = {{80, 80}, {40, 40}, {20, 20}};
    work.queries = 300;
    work.queries_are_pixels = false;
  } else {
    throw Error("work: expected encoder, encoder_small or queries, got " + name);
  }
  if (work.queries_are_pixels) work.queries = work.rows();
  return work;
}

// Each head has a direction, and point p lies 0.8 (p + 1) pixels away in it, plus noise of 1.5 pixels.
Inputs draw(const Work& work) {
  Inputs inputs;
  inputs.work = work;
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(0, 1);
  std::uniform_real_distribution<float> uniform(0, 1);
  const size_t row = static_cast<size_t>(work.heads * work.head_dim);
  inputs.value.resize(static_cast<size_t>(work.rows()) * row);
  inputs.grad_output.resize(static_cast<size_t>(work.queries) * row);
  for (float& number : inputs.value) number = normal(generator);
  for (float& number : inputs.grad_output) number = normal(generator);

  std::vector<float> step_x, step_y;  // a pixel of each level
  for (const auto& [height, width] : work.levels) {
    step_x.push_back(1.0f / static_cast<float>(width));
    step_y.push_back(1.0f / static_cast<float>(height));
  }
  int level = 0, first = 0;  // of the query, where it is a pixel
  for (int query = 0; query < work.queries; ++query) {
    float x = uniform(generator) * 0.9f + 0.05f;
    float y = uniform(generator) * 0.9f + 0.05f;
    if (work.queries_are_pixels) {
      while (query - first >= work.levels[level].first * work.levels[level].second) {
        first += work.levels[level].first * work.levels[level].second;
        ++level;
      }
      const auto& [height, width] = work.levels[level];
      const int pixel = query - first;
      x = (static_cast<float>(pixel % width) + 0.5f) / static_cast<float>(width);
      y = (static_cast<float>(pixel / width) + 0.5f) / static_cast<float>(height);
    }
    inputs.reference_points.insert(inputs.reference_points.end(), {x, y});
    for (int head = 0; head < work.heads; ++head) {
      const float angle =
          2 * 3.14159265f * static_cast<float>(head) / static_cast<float>(work.heads);
      const size_t first_logit = inputs.attention_logits.size();
      for (int l = 0; l < work.num_levels(); ++l) {
        for (int p = 0; p < work.points; ++p) {
          const float distance = static_cast<float>(p + 1);
          const float dx = std::cos(angle) * distance * 0.8f + normal(generator) * 1.5f;
          const float dy = std::sin(angle) * distance * 0.8f + normal(generator) * 1.5f;
          inputs.sampling_offsets.insert(inputs.sampling_offsets.end(), {dx, dy});
          inputs.sampling_locations.insert(
              inputs.sampling_locations.end(),
              {std::fma(dx, step_x[l], x), std::fma(dy, step_y[l], y)});
          inputs.attention_logits.push_back(normal(generator) * 0.5f);
        }
      }
      const float* const logits = inputs.attention_logits.data() + first_logit;
      const float largest = *std::max_element(logits, logits + work.num_points());
      float sum = 0;
      for (int k = 0; k < work.num_points(); ++k) sum += std::exp(logits[k] - largest);
      for (int k = 0; k < work.num_points(); ++k) {
        inputs.attention_weights.push_back(std::exp(logits[k] - largest) / sum);
      }
    }
  }
  return inputs;
}

void use_boxes(Inputs& inputs) {
  const Work& work = inputs.work;
  constexpr float kWidth = 0.25f, kHeight = 0.5f;
  std::vector<float> boxes;
  for (int query = 0; query < work.queries; ++query) {
    const float* const center = inputs.reference_points.data() + 2 * query;
    boxes.insert(boxes.end(), {center[0], center[1], kWidth, kHeight});
  }
  inputs.reference_points = boxes;
  inputs.reference_size = 4;
  // an offset of 1 moves a point by side * scale / points
  const float portion = inputs.offset_scale / static_cast<float>(work.points);
  for (size_t point = 0; point < inputs.attention_weights.size(); ++point) {
    const size_t k = point % static_cast<size_t>(work.num_points());
    const size_t query = point / static_cast<size_t>(work.num_points() * work.heads);
    const auto& [height, width] = work.levels[k / static_cast<size_t>(work.points)];
    float* const offset = inputs.sampling_offsets.data() + 2 * point;
    offset[0] = offset[0] / static_cast<float>(width) / (kWidth * portion);
    offset[1] = offset[1] / static_cast<float>(height) / (kHeight * portion);
    // where the operator in float32 puts the point
    float* const location = inputs.sampling_locations.data() + 2 * point;
    const float* const box = boxes.data() + 4 * query;
    location[0] = std::fma(offset[0], box[2] * portion, box[0]);
    location[1] = std::fma(offset[1], box[3] * portion, box[1]);
  }
}

namespace {

// Calls body(pixel's first element, its weight, d weight / dx, d weight / dy) for the pixels of a point that
// are on the map; x and y are in pixels.
template <typename Body>
void each_corner(const Inputs& inputs, size_t point, const Body& body) {
  const Work& work = inputs.work;
  const int k = static_cast<int>(point % static_cast<size_t>(work.num_points()));
  const int head = static_cast<int>(point / static_cast<size_t>(work.num_points())) % work.heads;
  const int level = k / work.points;
  int64_t start = 0;
  for (int l = 0; l < level; ++l) start += work.levels[l].first * work.levels[l].second;
  const auto& [height, width] = work.levels[level];
  const double x = double{inputs.sampling_locations[2 * point]} * width - 0.5;
  const double y = double{inputs.sampling_locations[2 * point + 1]} * height - 0.5;
  const double left = std::floor(x), top = std::floor(y);
  for (int corner = 0; corner < 4; ++corner) {
    const bool right = corner & 1, below = corner & 2;
    const double column = left + right, row = top + below;
    if (column < 0 || row < 0 || column >= width || row >= height) continue;
    const double along_x = right ? x - left : 1 - (x - left);
    const double along_y = below ? y - top : 1 - (y - top);
    const int64_t pixel = start + static_cast<int64_t>(row) * width + static_cast<int64_t>(column);
    body(static_cast<size_t>((pixel * work.heads + head) * work.head_dim), along_x * along_y,
         (right ? 1 : -1) * along_y, (below ? 1 : -1) * along_x);
  }
}

}  // namespace

std::vector<double> reference_output(const Inputs& inputs) {
  const Work& work = inputs.work;
  const size_t channels = static_cast<size_t>(work.head_dim);
  std::vector<double> output(inputs.grad_output.size());
  for (size_t point = 0; point < inputs.attention_weights.size(); ++point) {
    const size_t item = point / static_cast<size_t>(work.num_points());
    const double attention = inputs.attention_weights[point];
    each_corner(inputs, point, [&](size_t at, double weight, double, double) {
      for (size_t c = 0; c < channels; ++c) {
        output[item * channels + c] += attention * weight * double{inputs.value[at + c]};
      }
    });
  }
  return output;
}

Gradients reference_gradients(const Inputs& inputs) {
  const Work& work = inputs.work;
  const size_t channels = static_cast<size_t>(work.head_dim);
  const size_t points = static_cast<size_t>(work.num_points());
  Gradients found;
  found.value.resize(inputs.value.size());
  found.weights.resize(inputs.attention_weights.size());
  found.locations.resize(inputs.sampling_locations.size());
  for (size_t point = 0; point < inputs.attention_weights.size(); ++point) {
    const size_t item = point / points;
    const double attention = inputs.attention_weights[point];
    const auto& [height, width] = work.levels[point % points / static_cast<size_t>(work.points)];
    each_corner(inputs, point, [&](size_t at, double weight, double by_x, double by_y) {
      double dot = 0;
      for (size_t c = 0; c < channels; ++c) {
        const double gradient = inputs.grad_output[item * channels + c];
        dot += double{inputs.value[at + c]} * gradient;
        found.value[at + c] += attention * weight * gradient;
      }
      found.weights[point] += weight * dot;
      found.locations[2 * point] += attention * width * by_x * dot;
      found.locations[2 * point + 1] += attention * height * by_y * dot;
    });
  }

  // Of a fused call, by the chain rule.
  found.offsets.resize(found.locations.size());
  found.logits.resize(found.weights.size());
  found.reference.resize(inputs.reference_points.size());
  const size_t size = static_cast<size_t>(inputs.reference_size);
  const double portion = double{inputs.offset_scale} / work.points;
  for (size_t point = 0; point < found.weights.size(); ++point) {
    const size_t first = point / points * points;
    double mean = 0;
    for (size_t k = first; k < first + points; ++k) {
      mean += double{inputs.attention_weights[k]} * found.weights[k];
    }
    found.logits[point] = inputs.attention_weights[point] * (found.weights[point] - mean);
    const size_t query = point / (points * static_cast<size_t>(work.heads));
    const auto& [height, width] = work.levels[point % points / static_cast<size_t>(work.points)];
    for (size_t axis = 0; axis < 2; ++axis) {
      const double gradient = found.locations[2 * point + axis];
      double* const reference = found.reference.data() + size * query;
      reference[axis] += gradient;
      if (size == 2) {
        found.offsets[2 * point + axis] = gradient / (axis == 0 ? width : height);
      } else {
        const double side = inputs.reference_points[size * query + 2 + axis];
        found.offsets[2 * point + axis] = gradient * side * portion;
        reference[2 + axis] += gradient * inputs.sampling_offsets[2 * point + axis] * portion;
      }
    }
  }
  return found;
}

}  // namespace cycles
