// Smallest and largest value of a tensor, for the checks of arguments: one thread, one pass, nothing allocated.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>

#include "common/target_clones.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
struct Range {
  T low = std::numeric_limits<T>::max(), high = std::numeric_limits<T>::lowest();
};

// Values equal to `skip` are left out.
template <typename T>
__attribute__((always_inline)) inline Range<T> range_of(const T* values, int64_t count, bool skips, T skip) {
  Range<T> range;
  if (skips) {
    for (int64_t i = 0; i < count; ++i) {
      range.low = std::min(range.low, values[i] == skip ? std::numeric_limits<T>::max() : values[i]);
      range.high = std::max(range.high, values[i] == skip ? std::numeric_limits<T>::lowest() : values[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      range.low = std::min(range.low, values[i]);
      range.high = std::max(range.high, values[i]);
    }
  }
  return range;
}

// Bits of a float as integers in the order of the numbers; a NaN is beyond the infinity of its sign.
template <typename Bits>
__attribute__((always_inline)) inline Bits ordered(Bits bits) {
  return bits ^ ((bits >> (8 * sizeof(Bits) - 1)) & std::numeric_limits<Bits>::max());
}

template <typename Bits>
__attribute__((always_inline)) inline Range<Bits> ordered_range(const Bits* values, int64_t count) {
  Range<Bits> range;
  for (int64_t i = 0; i < count; ++i) {
    range.low = std::min(range.low, ordered(values[i]));
    range.high = std::max(range.high, ordered(values[i]));
  }
  return range;
}

CC4S_TARGET_CLONES Range<uint8_t> range_u8(const uint8_t* v, int64_t n, bool skips, uint8_t skip) {
  return range_of(v, n, skips, skip);
}
CC4S_TARGET_CLONES Range<int16_t> range_i16(const int16_t* v, int64_t n, bool skips, int16_t skip) {
  return range_of(v, n, skips, skip);
}
CC4S_TARGET_CLONES Range<int32_t> range_i32(const int32_t* v, int64_t n, bool skips, int32_t skip) {
  return range_of(v, n, skips, skip);
}
CC4S_TARGET_CLONES Range<int64_t> range_i64(const int64_t* v, int64_t n, bool skips, int64_t skip) {
  return range_of(v, n, skips, skip);
}
CC4S_TARGET_CLONES Range<int32_t> range_f32(const int32_t* v, int64_t n) { return ordered_range(v, n); }
CC4S_TARGET_CLONES Range<int64_t> range_f64(const int64_t* v, int64_t n) { return ordered_range(v, n); }

template <typename T>
void write_integers(Range<T> range, Tensor& out) {
  int64_t* to = out.mutable_data_ptr<int64_t>();
  // Nothing found: an empty range.
  const bool none = range.low > range.high;
  to[0] = none ? 0 : static_cast<int64_t>(range.low);
  to[1] = none ? -1 : static_cast<int64_t>(range.high);
}

template <typename T, typename Bits>
void write_floats(Range<Bits> range, Tensor& out) {
  double* to = out.mutable_data_ptr<double>();
  const Bits bits[2] = {ordered(range.low), ordered(range.high)};
  for (int i = 0; i < 2; ++i) {
    T value;
    std::memcpy(&value, &bits[i], sizeof(T));
    to[i] = static_cast<double>(value);
  }
  // A NaN anywhere makes both NaN.
  if (to[0] != to[0]) to[1] = to[0];
  if (to[1] != to[1]) to[0] = to[1];
}

template <typename T>
bool holds(const std::optional<int64_t>& value) {
  return value.has_value() && *value >= std::numeric_limits<T>::min() && *value <= std::numeric_limits<T>::max();
}

template <typename T, typename F>
void integers(const Tensor& values, const std::optional<int64_t>& skip, F range, Tensor& out) {
  const bool skips = holds<T>(skip);
  write_integers(range(static_cast<const T*>(values.const_data_ptr()), values.numel(), skips,
                       static_cast<T>(skips ? *skip : 0)),
                 out);
}

// A contiguous tensor -> [smallest, largest] in int64 or float64. Without a value (all skipped): [0, -1].
Tensor value_range(const Tensor& values, std::optional<int64_t> skip) {
  STD_TORCH_CHECK(values.is_contiguous() && values.numel() > 0, "values: expected a contiguous tensor that is not empty");
  const ScalarType type = values.scalar_type();
  const bool floating = type == ScalarType::Float || type == ScalarType::Double;
  Tensor out = torch::stable::empty({2}, floating ? ScalarType::Double : ScalarType::Long);
  switch (type) {
    case ScalarType::Byte:
      integers<uint8_t>(values, skip, range_u8, out);
      break;
    case ScalarType::Short:
      integers<int16_t>(values, skip, range_i16, out);
      break;
    case ScalarType::Int:
      integers<int32_t>(values, skip, range_i32, out);
      break;
    case ScalarType::Long:
      integers<int64_t>(values, skip, range_i64, out);
      break;
    case ScalarType::Float:
      write_floats<float>(range_f32(static_cast<const int32_t*>(values.const_data_ptr()), values.numel()), out);
      break;
    case ScalarType::Double:
      write_floats<double>(range_f64(static_cast<const int64_t*>(values.const_data_ptr()), values.numel()), out);
      break;
    default:
      STD_TORCH_CHECK(false, "values: expected uint8, int16, int32, int64, float32 or float64");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cc4s_kernels, CPU, m) { m.impl("value_range", TORCH_BOX(&value_range)); }
