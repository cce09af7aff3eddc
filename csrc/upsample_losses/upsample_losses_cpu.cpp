// Losses of bilinearly upsampled logits without the upsampled logits; docs/kernels/upsample_losses.md has the schedule.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/instruction_sets.h"
#include "upsample_losses/problem.h"

namespace {

using namespace cc4s::upsample_losses;
using torch::stable::Tensor;

#define CC4S_VECTOR_CODE "upsample_losses/strip.inl"
#include "common/foreach_instruction_set.h"

template <typename T>
constexpr ScalarType scalar_type() {
  return std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
}

template <typename T>
std::vector<Partial<T>> all_strips(const Problem<T>& problem) {
  const int64_t tasks = problem.batch * static_cast<int64_t>(problem.rows.strips.size());
  std::vector<Partial<T>> partials(static_cast<size_t>(tasks));
  const cc4s::InstructionSet set = cc4s::instruction_set();
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    switch (set) {
#if CC4S_X86
      case cc4s::InstructionSet::kAvx512:
        return avx512::run_strips(problem, begin, end, partials);
      case cc4s::InstructionSet::kAvx2:
        return avx2::run_strips(problem, begin, end, partials);
#endif
      default:
        return portable::run_strips(problem, begin, end, partials);
    }
  });
  return partials;
}

PixelMap map_of(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return {};
  return {tensor->const_data_ptr(), tensor->scalar_type(), tensor->stride(0), tensor->stride(1), tensor->stride(2)};
}

bool is_integer(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Byte || type == ScalarType::Short || type == ScalarType::Int || type == ScalarType::Long;
}

struct Arguments {
  const Tensor &logits, &labels;
  const std::optional<Tensor>&weight, &superpixels, &class_weight;
  int64_t num_superpixels, ignore_index;
  bool align_corners;

  void check() const {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1;
    const ScalarType dtype = logits.scalar_type();
    STD_TORCH_CHECK(logits.dim() == 4 && (dtype == ScalarType::Float || dtype == ScalarType::Double),
                    "logits: expected float32 or float64 (B, C, h, w)");
    for (int i = 1; i < 4; ++i) {
      STD_TORCH_CHECK(logits.size(i) > 0 && logits.size(i) <= kMost,
                      "logits: expected at least one class and one pixel");
    }
    STD_TORCH_CHECK(labels.dim() == 3 && labels.size(0) == logits.size(0) && is_integer(labels),
                    "labels: expected integers (B, H, W)");
    for (int i = 1; i < 3; ++i) {
      STD_TORCH_CHECK(labels.size(i) > 0 && labels.size(i) <= kMost, "labels: expected at least one pixel");
    }
    const auto same_size = [&](const Tensor& t) {
      return t.dim() == 3 && t.size(0) == labels.size(0) && t.size(1) == labels.size(1) && t.size(2) == labels.size(2);
    };
    if (weight.has_value()) {
      const ScalarType type = weight->scalar_type();
      STD_TORCH_CHECK(same_size(*weight) &&
                          (type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Bool),
                      "weight: expected float32, float64 or bool of the size of labels");
    }
    STD_TORCH_CHECK(num_superpixels >= 0 && num_superpixels <= kMost, "num_superpixels: expected 0 to 2^31 - 2");
    if (superpixels.has_value()) {
      STD_TORCH_CHECK(same_size(*superpixels) && is_integer(*superpixels),
                      "superpixels: expected integers of the size of labels");
    }
    if (class_weight.has_value()) {
      STD_TORCH_CHECK(class_weight->dim() == 1 && class_weight->size(0) == logits.size(1) &&
                          class_weight->scalar_type() == dtype,
                      "class_weight: expected (C,) of the dtype of logits");
    }
  }
};

template <typename T>
std::vector<T> copy_of(const Tensor& line) {
  std::vector<T> copy(static_cast<size_t>(line.size(0)));
  for (int64_t i = 0; i < line.size(0); ++i) copy[i] = line.const_data_ptr<T>()[i * line.stride(0)];
  return copy;
}

// A problem and what it points to.
template <typename T>
struct Setup {
  Axis columns, lines;
  Rows rows;
  std::vector<T> class_weight;
  Problem<T> problem;

  explicit Setup(const Arguments& a)
      : columns(a.logits.size(3), a.labels.size(2), a.align_corners),
        lines(a.logits.size(2), a.labels.size(1), a.align_corners),
        rows(lines),
        class_weight(a.class_weight.has_value() ? copy_of<T>(*a.class_weight) : std::vector<T>{}),
        problem{a.logits.size(0),
                a.logits.size(1),
                a.logits.size(2),
                a.logits.size(3),
                a.labels.size(1),
                a.labels.size(2),
                a.superpixels.has_value() ? a.num_superpixels : 0,
                a.ignore_index,
                a.logits.const_data_ptr<T>(),
                {a.logits.stride(0), a.logits.stride(1), a.logits.stride(2), a.logits.stride(3)},
                map_of(a.labels),
                map_of(a.weight),
                map_of(a.superpixels),
                class_weight,
                columns,
                lines,
                rows} {}
  Setup(const Setup&) = delete;
};

using Sums = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Sums forward(const Arguments& arguments) {
  const Setup<T> setup(arguments);
  const Problem<T>& problem = setup.problem;
  const int64_t batch = problem.batch, classes = problem.classes, ids = problem.num_ids;
  const auto per_image = [&] { return torch::stable::empty({batch}, scalar_type<T>()); };
  Tensor cross_entropy = per_image(), labelled = per_image(), entropy = per_image(), weight = per_image();
  Tensor pooled = torch::stable::empty({batch, ids, classes}, scalar_type<T>());
  Tensor counts = torch::stable::empty({batch, ids}, scalar_type<T>());
  Sums sums{cross_entropy, labelled, entropy, weight, pooled, counts};
  if (batch == 0) return sums;

  const std::vector<Partial<T>> partials = all_strips(problem);
  const int64_t strips = static_cast<int64_t>(problem.rows.strips.size());
  T* to_pooled = pooled.mutable_data_ptr<T>();
  T* to_counts = counts.mutable_data_ptr<T>();
  std::vector<double> pooled_sum(static_cast<size_t>(ids * classes));
  std::vector<int64_t> count(static_cast<size_t>(ids));
  for (int64_t b = 0; b < batch; ++b) {
    double total[4] = {};
    std::fill(pooled_sum.begin(), pooled_sum.end(), 0.0);
    std::fill(count.begin(), count.end(), 0);
    // In the order of the strips, whichever thread computed them.
    for (int64_t s = 0; s < strips; ++s) {
      const Partial<T>& part = partials[b * strips + s];
      total[0] += part.cross_entropy;
      total[1] += part.labelled;
      total[2] += part.entropy;
      total[3] += part.weight;
      for (size_t i = 0; i < part.ids.size(); ++i) {
        count[part.ids[i]] += part.counts[i];
        double* to = pooled_sum.data() + part.ids[i] * classes;
        const T* from = part.pooled.data() + i * classes;
        for (int64_t c = 0; c < classes; ++c) to[c] += static_cast<double>(from[c]);
      }
    }
    cross_entropy.mutable_data_ptr<T>()[b] = static_cast<T>(total[0]);
    labelled.mutable_data_ptr<T>()[b] = static_cast<T>(total[1]);
    entropy.mutable_data_ptr<T>()[b] = static_cast<T>(total[2]);
    weight.mutable_data_ptr<T>()[b] = static_cast<T>(total[3]);
    for (int64_t i = 0; i < ids * classes; ++i) to_pooled[b * ids * classes + i] = static_cast<T>(pooled_sum[i]);
    for (int64_t i = 0; i < ids; ++i) to_counts[b * ids + i] = static_cast<T>(count[i]);
  }
  return sums;
}

// The gradients of all strips to `to` [B, C, h, w].
template <typename T>
void gather_gradient(const Problem<T>& problem, const std::vector<Partial<T>>& partials, T* to) {
  const int64_t classes = problem.classes, height = problem.low_height, width = problem.low_width;
  const int64_t strips = static_cast<int64_t>(problem.rows.strips.size());
  torch::stable::parallel_for(0, problem.batch * height, 8, [&](int64_t begin, int64_t end) {
    std::vector<T> row;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / height, y = i % height;
      row.assign(static_cast<size_t>(classes * width), T{0});
      for (int64_t s = 0; s < strips; ++s) {
        const Strip& strip = problem.rows.strips[s];
        if (y < strip.row_begin || y >= strip.row_end) continue;
        const std::vector<T>& gradient = partials[b * strips + s].gradient;
        const int64_t padded = static_cast<int64_t>(gradient.size()) / ((strip.row_end - strip.row_begin) * width);
        const T* from = gradient.data() + (y - strip.row_begin) * width * padded;
        for (int64_t x = 0; x < width; ++x) {
          for (int64_t c = 0; c < classes; ++c) row[c * width + x] += from[x * padded + c];
        }
      }
      for (int64_t c = 0; c < classes; ++c) {
        std::copy_n(row.data() + c * width, width, to + ((b * classes + c) * height + y) * width);
      }
    }
  });
}

template <typename T>
Tensor backward(const Tensor& cross_entropy_gradient, const Tensor& entropy_gradient,
                const std::optional<Tensor>& pooled_gradient, const Arguments& arguments) {
  Setup<T> setup(arguments);
  Problem<T>& problem = setup.problem;
  const int64_t batch = problem.batch;
  for (const Tensor* gradient : {&cross_entropy_gradient, &entropy_gradient}) {
    STD_TORCH_CHECK(gradient->dim() == 1 && gradient->size(0) == batch && gradient->scalar_type() == scalar_type<T>(),
                    "gradients: expected (B,) of the dtype of logits");
  }
  Tensor out = torch::stable::empty({batch, problem.classes, problem.low_height, problem.low_width}, scalar_type<T>());
  if (batch == 0) return out;
  problem.backward = true;
  problem.cross_entropy_gradient = copy_of<T>(cross_entropy_gradient);
  problem.entropy_gradient = copy_of<T>(entropy_gradient);
  if (pooled_gradient.has_value() && problem.num_ids > 0) {
    STD_TORCH_CHECK(pooled_gradient->dim() == 3 && pooled_gradient->size(0) == batch &&
                        pooled_gradient->size(1) == problem.num_ids && pooled_gradient->size(2) == problem.classes &&
                        pooled_gradient->scalar_type() == scalar_type<T>(),
                    "pooled_gradient: expected (B, K, C) of the dtype of logits");
    for (int i = 0; i < 3; ++i) problem.pooled_strides[i] = pooled_gradient->stride(i);
    problem.pooled_gradient = pooled_gradient->const_data_ptr<T>();
  } else {
    problem.ids = {};
  }
  gather_gradient(problem, all_strips(problem), out.mutable_data_ptr<T>());
  return out;
}

// logits [B, C, h, w] float32 or float64; maps [B, H, W]; class_weight [C] ->
// cross_entropy, labelled, entropy, weight [B], pooled [B, K, C], counts [B, K].
Sums upsample_losses(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& superpixels, const std::optional<Tensor>& class_weight,
                     int64_t num_superpixels, int64_t ignore_index, bool align_corners) {
  const Arguments arguments{logits,          labels,       weight,       superpixels, class_weight,
                            num_superpixels, ignore_index, align_corners};
  arguments.check();
  return logits.scalar_type() == ScalarType::Double ? forward<double>(arguments) : forward<float>(arguments);
}

// Gradients of cross_entropy and entropy [B] and of pooled [B, K, C] -> gradient of logits [B, C, h, w].
Tensor upsample_losses_backward(const Tensor& cross_entropy_gradient, const Tensor& entropy_gradient,
                                const std::optional<Tensor>& pooled_gradient, const Tensor& logits,
                                const Tensor& labels, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& superpixels, const std::optional<Tensor>& class_weight,
                                int64_t num_superpixels, int64_t ignore_index, bool align_corners) {
  const Arguments arguments{logits,          labels,       weight,       superpixels, class_weight,
                            num_superpixels, ignore_index, align_corners};
  arguments.check();
  return logits.scalar_type() == ScalarType::Double
             ? backward<double>(cross_entropy_gradient, entropy_gradient, pooled_gradient, arguments)
             : backward<float>(cross_entropy_gradient, entropy_gradient, pooled_gradient, arguments);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) {
  m.impl("upsample_losses", TORCH_BOX(&upsample_losses));
  m.impl("upsample_losses_backward", TORCH_BOX(&upsample_losses_backward));
}
