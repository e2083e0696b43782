// Checks of a call's tensors, and the Problem made from them. Shared by the CPU and CUDA libraries.
//
//   DEFORM_ATTN_REQUIRE   throws an error that starts with the name of the argument
//   Call                  the checked tensors and sizes of a call
//   levels_on_host        the levels of a call, checked against the rows of value
//
// Everything that the kernels rely on is checked here. deform_attn/checks.py runs after a failed
// call and explains the error in more detail.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "problem.h"

namespace deform_attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Arguments of the schema that may be None.
using MaybeTensor = std::optional<Tensor>;
using MaybeSizes = std::optional<std::vector<int64_t>>;
using Flags = std::vector<bool>;

// An error that starts with the name of the argument.
#define DEFORM_ATTN_REQUIRE(condition, ...)                       \
  if (!(condition)) {                                             \
    throw std::runtime_error(::deform_attn::joined(__VA_ARGS__)); \
  }

template <typename... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

// The tensor, or an undefined tensor (None in Python) where it is not requested.
inline Tensor if_requested(bool requested, const Tensor& tensor) {
  return requested ? tensor : Tensor();
}

// Null where the tensor is undefined.
inline void* data_of(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

inline Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      return Type::kFloat;
  }
}

// Of one number of a dtype of value.
inline size_t bytes_of(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// The arguments of a call as in the operator's schema, checked.
struct Call {
  Tensor value, locations, weights;  // contiguous; in a fused call: offsets and logits
  MaybeTensor reference;             // a fused call's, contiguous
  MaybeTensor shapes, starts;
  MaybeTensor mask;              // value_mask, contiguous
  std::vector<int64_t> sizes;    // [h0, w0, h1, w1, ...] where shapes is not given
  std::vector<int> first_point;  // [L + 1]
  Problem problem;
  ScalarType type;       // of value
  bool weights_are_acc;  // weights have the accumulation dtype, not that of value

  Call(const Tensor& value_, const MaybeTensor& spatial_shapes,
       const MaybeTensor& level_start_index, const Tensor& sampling_locations,
       const Tensor& attention_weights, const MaybeSizes& level_sizes, const MaybeSizes& num_points,
       const MaybeTensor& value_mask)
      : Call(value_, spatial_shapes, level_start_index, std::nullopt, sampling_locations,
             attention_weights, level_sizes, num_points, value_mask) {}

  // A fused call: offsets from reference points and logits instead of locations and weights.
  Call(const Tensor& value_, const MaybeTensor& spatial_shapes,
       const MaybeTensor& level_start_index, const MaybeTensor& reference_points,
       const Tensor& sampling_offsets, const Tensor& attention_logits,
       const MaybeSizes& level_sizes, const MaybeSizes& num_points, const MaybeTensor& value_mask)
      : value(value_),
        locations(sampling_offsets),
        weights(attention_logits),
        reference(reference_points),
        shapes(spatial_shapes),
        starts(level_start_index),
        mask(value_mask),
        locations_name_(reference ? "sampling_offsets" : "sampling_locations"),
        weights_name_(reference ? "attention_logits" : "attention_weights") {
    check_types();
    check_levels(level_sizes);
    check_points(num_points);
    if (reference) {
      check_reference();
      reference = contiguous_of(*reference);
    }
    if (mask) {
      check_mask();
      mask = contiguous_of(*mask);
    }
    value = contiguous_of(value);
    locations = contiguous_of(locations);
    weights = contiguous_of(weights);
  }

  std::vector<int64_t> output_shape() const {
    return {problem.batch, problem.queries, problem.row_stride()};
  }

  // The output's gradient, contiguous. `output_mask`: which gradients are requested.
  Tensor checked_gradient(const Tensor& grad_output, const Flags& output_mask) const {
    const size_t gradients = reference ? 4 : 3;
    DEFORM_ATTN_REQUIRE(output_mask.size() == gradients, "output_mask: expected ", gradients,
                        " flags, got ", output_mask.size());
    const std::vector<int64_t> expected = output_shape();
    DEFORM_ATTN_REQUIRE(grad_output.dim() == 3 && grad_output.size(0) == expected[0] &&
                            grad_output.size(1) == expected[1] &&
                            grad_output.size(2) == expected[2],
                        "grad_output: expected the output's shape [", expected[0], ", ",
                        expected[1], ", ", expected[2], "], got ", shape_of(grad_output));
    DEFORM_ATTN_REQUIRE(grad_output.scalar_type() == value.scalar_type(),
                        "grad_output: expected value's dtype");
    DEFORM_ATTN_REQUIRE(grad_output.device() == value.device(),
                        "grad_output: expected on value's device");
    return contiguous_of(grad_output);
  }

  // The dtype of accumulation, of locations and of reference points.
  ScalarType acc_dtype() const {
    return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  static Tensor contiguous_of(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  }

 private:
  const char *locations_name_, *weights_name_;

  // Each property of a tensor is a call into libtorch, so none is read twice.
  void check_types() {
    type = value.scalar_type();
    DEFORM_ATTN_REQUIRE(type == ScalarType::Double || type == ScalarType::Float ||
                            type == ScalarType::Half || type == ScalarType::BFloat16,
                        "value: expected float64, float32, float16 or bfloat16");
    const ScalarType acc = acc_dtype();
    const ScalarType locations_type = locations.scalar_type(), weights_type = weights.scalar_type();
    weights_are_acc = weights_type == acc;
    DEFORM_ATTN_REQUIRE(weights_are_acc || weights_type == type, weights_name_,
                        ": expected value's dtype, or float32 with a 16-bit value");
    const auto device = value.device();
    if (reference) {
      DEFORM_ATTN_REQUIRE(locations_type == weights_type, locations_name_,
                          ": expected the dtype of attention_logits");
      DEFORM_ATTN_REQUIRE(reference->scalar_type() == acc,
                          "reference_points: expected float32, or float64 with a float64 value");
      DEFORM_ATTN_REQUIRE(reference->device() == device,
                          "reference_points: expected on value's device");
    } else {
      DEFORM_ATTN_REQUIRE(locations_type == acc, locations_name_,
                          ": expected float32, or float64 with a float64 value");
    }
    DEFORM_ATTN_REQUIRE(locations.device() == device, locations_name_,
                        ": expected on value's device");
    DEFORM_ATTN_REQUIRE(weights.device() == device, weights_name_, ": expected on value's device");
  }

  void check_levels(const MaybeSizes& level_sizes) {
    DEFORM_ATTN_REQUIRE(shapes.has_value() != level_sizes.has_value(),
                        "spatial_shapes: expected either a tensor or level_sizes");
    int64_t levels;
    if (shapes) {
      check_metadata("spatial_shapes", *shapes);
      DEFORM_ATTN_REQUIRE(shapes->dim() == 2 && shapes->size(1) == 2,
                          "spatial_shapes: expected [num_levels, 2], got ", shape_of(*shapes));
      levels = shapes->size(0);
    } else {
      sizes = *level_sizes;
      DEFORM_ATTN_REQUIRE(sizes.size() % 2 == 0,
                          "level_sizes: expected a height and a width for each level, got ",
                          sizes.size(), " numbers");
      levels = static_cast<int64_t>(sizes.size() / 2);
    }
    DEFORM_ATTN_REQUIRE(levels > 0, "spatial_shapes: expected at least one level, got none");
    problem.levels = narrow("spatial_shapes", levels);
    if (starts) {
      check_metadata("level_start_index", *starts);
      DEFORM_ATTN_REQUIRE(starts->dim() == 1 && starts->size(0) == levels,
                          "level_start_index: expected [", levels, "], got ", shape_of(*starts));
    }
  }

  void check_reference() const {
    const Tensor& points = *reference;
    DEFORM_ATTN_REQUIRE(
        points.dim() == 4 && points.size(0) == problem.batch && points.size(1) == problem.queries &&
            (points.size(2) == 1 || points.size(2) == problem.levels) &&
            (points.size(3) == 2 || points.size(3) == 4 || points.size(3) == 5),
        "reference_points: expected [batch, queries, num_levels or 1, 2, 4 or 5], got ",
        shape_of(points));
  }

  void check_mask() const {
    DEFORM_ATTN_REQUIRE(mask->scalar_type() == ScalarType::Bool, "value_mask: expected dtype bool");
    DEFORM_ATTN_REQUIRE(
        mask->dim() == 2 && mask->size(0) == problem.batch && mask->size(1) == problem.rows,
        "value_mask: expected [batch, rows] = [", problem.batch, ", ", problem.rows, "], got ",
        shape_of(*mask));
    DEFORM_ATTN_REQUIRE(mask->device() == value.device(), "value_mask: expected on value's device");
  }

  void check_metadata(const char* name, const Tensor& tensor) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Long:
      case ScalarType::Int:
      case ScalarType::Short:
      case ScalarType::Char:
      case ScalarType::Byte:
        break;
      default:
        DEFORM_ATTN_REQUIRE(false, name, ": expected an integer dtype");
    }
    DEFORM_ATTN_REQUIRE(tensor.is_cpu() || tensor.device() == value.device(), name,
                        ": expected on value's device or the CPU");
  }

  void check_points(const MaybeSizes& num_points) {
    DEFORM_ATTN_REQUIRE(value.dim() == 4,
                        "value: expected [batch, rows, num_heads, head_dim], got ",
                        shape_of(value));
    const int64_t rank = num_points ? 5 : 6;
    DEFORM_ATTN_REQUIRE(locations.dim() == rank && locations.size(rank - 1) == 2, locations_name_,
                        ": expected ",
                        num_points ? "[batch, queries, num_heads, sum of num_points, 2]"
                                   : "[batch, queries, num_heads, num_levels, num_points, 2]",
                        ", got ", shape_of(locations));
    DEFORM_ATTN_REQUIRE(locations.size(0) == value.size(0) && locations.size(2) == value.size(2),
                        locations_name_, ": expected batch ", value.size(0), " and num_heads ",
                        value.size(2), " as in value, got ", shape_of(locations));
    std::vector<int64_t> counts;
    if (num_points) {
      counts = *num_points;
      DEFORM_ATTN_REQUIRE(static_cast<int>(counts.size()) == problem.levels,
                          "num_points: expected ", problem.levels, " counts, got ", counts.size());
    } else {
      DEFORM_ATTN_REQUIRE(locations.size(3) == problem.levels, locations_name_,
                          ": expected num_levels ", problem.levels, " in dimension 3, got ",
                          shape_of(locations));
      counts.assign(static_cast<size_t>(problem.levels), locations.size(4));
    }
    int64_t points = 0;
    first_point.push_back(0);
    for (const int64_t count : counts) {
      DEFORM_ATTN_REQUIRE(count >= 0 && count <= std::numeric_limits<int>::max() - points,
                          "num_points: expected counts from 0 up, fewer than 2**31 in all, got ",
                          count);
      points += count;
      first_point.push_back(static_cast<int>(points));
    }
    DEFORM_ATTN_REQUIRE(!num_points || points == locations.size(3), locations_name_, ": expected ",
                        points, " points (the sum of num_points) in dimension 3, got ",
                        shape_of(locations));
    const auto points_shape = locations.sizes(), weights_shape = weights.sizes();
    bool same = static_cast<int64_t>(weights_shape.size()) == rank - 1;
    for (size_t i = 0; same && i < weights_shape.size(); ++i) {
      same = weights_shape[i] == points_shape[i];
    }
    DEFORM_ATTN_REQUIRE(same, weights_name_, ": expected the shape of ", locations_name_,
                        " without its last dimension, got ", shape_of(weights), " and ",
                        shape_of(locations));

    problem.batch = value.size(0);
    problem.rows = value.size(1);
    problem.queries = locations.size(1);
    problem.heads = narrow("value", value.size(2));
    problem.head_dim = narrow("value", value.size(3));
    DEFORM_ATTN_REQUIRE(problem.heads > 0 && problem.head_dim > 0,
                        "value: expected at least one head and one channel, got ", shape_of(value));
    problem.points = static_cast<int>(points);
    narrow(locations_name_, int64_t{problem.heads} * problem.points);
    narrow("value", problem.row_stride());
  }

  static int narrow(const char* name, int64_t size) {
    DEFORM_ATTN_REQUIRE(size <= std::numeric_limits<int>::max(), name,
                        ": expected sizes under 2**31 for the heads, channels and points of a "
                        "query, got ",
                        size);
    return static_cast<int>(size);
  }
};

// The numbers of an integer tensor on the CPU.
inline std::vector<int64_t> numbers_of(const Tensor& metadata) {
  const Tensor tensor = Call::contiguous_of(metadata);
  std::vector<int64_t> numbers(static_cast<size_t>(tensor.numel()));
  const auto read = [&](auto* from) { numbers.assign(from, from + numbers.size()); };
  const void* data = tensor.const_data_ptr();
  switch (tensor.scalar_type()) {
    case ScalarType::Long:
      read(static_cast<const int64_t*>(data));
      break;
    case ScalarType::Int:
      read(static_cast<const int32_t*>(data));
      break;
    case ScalarType::Short:
      read(static_cast<const int16_t*>(data));
      break;
    case ScalarType::Char:
      read(static_cast<const int8_t*>(data));
      break;
    default:
      read(static_cast<const uint8_t*>(data));
  }
  return numbers;
}

// The levels of a call whose sizes the host can read. Throws where one does not fit into value.
inline std::vector<Level> levels_on_host(const Call& call) {
  const std::vector<int64_t> sizes = call.shapes ? numbers_of(*call.shapes) : call.sizes;
  std::vector<int64_t> starts;
  if (call.starts) starts = numbers_of(*call.starts);
  std::vector<Level> levels;
  int64_t next = 0;
  for (size_t l = 0; l < sizes.size() / 2; ++l) {
    const int64_t height = sizes[2 * l], width = sizes[2 * l + 1];
    const int64_t start = call.starts ? starts[l] : next;
    DEFORM_ATTN_REQUIRE(
        fitted(0, height, width, std::numeric_limits<int64_t>::max()).height > 0,
        "spatial_shapes: expected sides from 1 to 2**31 - 1, got (height, width) = (", height, ", ",
        width, ") for level ", l);
    const Level level = fitted(start, height, width, call.problem.rows);
    DEFORM_ATTN_REQUIRE(level.height > 0, call.starts ? "level_start_index" : "spatial_shapes",
                        ": level ", l, " of ", height, " x ", width, " pixels from row ", start,
                        " does not fit into value's ", call.problem.rows, " rows");
    levels.push_back(level);
    next = start + height * width;
  }
  return levels;
}

}  // namespace deform_attn
