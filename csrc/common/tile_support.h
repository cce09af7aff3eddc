// What the tile code of every instruction set shares: buffers, dtypes, views of rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace cc4s {

// bfloat16 in memory.
struct Half {
  uint16_t bits;
};

// The dtype of scores and sums for tensors of E.
template <class E>
using ScalarFor = std::conditional_t<std::is_same_v<E, double>, double, float>;

inline float widen(Half h) {
  const uint32_t wide = uint32_t{h.bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// To the nearest, ties to even; NaN stays NaN.
inline Half to_half(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  if ((wide & 0x7fffffffu) > 0x7f800000u) return Half{static_cast<uint16_t>(wide >> 16 | 0x40)};
  return Half{static_cast<uint16_t>((wide + 0x7fffu + (wide >> 16 & 1)) >> 16)};
}

template <class To, class From>
inline To narrow_to(From x) {
  if constexpr (std::is_same_v<To, Half>) {
    return to_half(static_cast<float>(x));
  } else {
    return static_cast<To>(x);
  }
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Uninitialised memory aligned to cache lines.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(
            std::aligned_alloc(64, static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)) + 1, 64))))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  void reset(int64_t count) {
    Buffer other(count);
    std::swap(data_, other.data_);
  }
  T* get() const { return data_; }
  operator T*() const { return data_; }

 private:
  T* data_;
};

// The positions that are states of the walk: all, or the `count` ones in `index`.
struct Positions {
  int64_t count;
  const int32_t* index;  // [count] or null
  int64_t operator[](int64_t i) const { return index == nullptr ? i : index[i]; }
};

// The valid rows of a contiguous [N, width] matrix.
template <class T>
struct Rows {
  T* data;
  int64_t width;
  Positions at;
  T* operator[](int64_t i) const { return data + at[i] * width; }
};

}  // namespace cc4s
