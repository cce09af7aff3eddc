// Tiles of scores and their products; included by the tile code of each op, once for each instruction set.
//
// An engine computes C (+)= A B on tiles that fit the caches. B is packed into panels of kPanel columns
// ([k][kPanel] each); A is read in place. Element is the dtype of tensors, Operand that of products, Scalar that of
// sums. `Plain` computes in float or double; of bfloat16 tensors it widens the rows of a tile. `Bf16` multiplies bfloat16
// and accumulates in float.

using std::int64_t;

template <class S>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(CC4S_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(CC4S_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(CC4S_VECTOR_BYTES)));
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(CC4S_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(CC4S_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(CC4S_VECTOR_BYTES)));
};

#define CC4S_INLINE __attribute__((always_inline)) inline

template <class S>
constexpr int kLanes = CC4S_VECTOR_BYTES / sizeof(S);
// Rows of C in registers, two vectors each: 28 of 32 registers, or 12 (8) of 16.
constexpr int kRowsInRegisters = CC4S_VECTOR_BYTES == 64 ? 14 : CC4S_VECTOR_BYTES == 32 ? 6 : 4;

template <class S>
CC4S_INLINE typename Simd<S>::Vec load(const S* p) {
  return *reinterpret_cast<const typename Simd<S>::Unaligned*>(p);
}
template <class S>
CC4S_INLINE void store(S* p, typename Simd<S>::Vec x) {
  *reinterpret_cast<typename Simd<S>::Unaligned*>(p) = x;
}
template <class S>
CC4S_INLINE typename Simd<S>::Vec splat(S x) {
  return x - typename Simd<S>::Vec{};
}

template <class S>
CC4S_INLINE S horizontal_max(typename Simd<S>::Vec x) {
  S best = x[0];
  for (int i = 1; i < kLanes<S>; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// Pairwise: the order of the sum does not depend on the compiler.
template <class S>
CC4S_INLINE S horizontal_sum(typename Simd<S>::Vec x) {
  S lane[kLanes<S>];
  std::memcpy(lane, &x, sizeof(x));
  for (int half = kLanes<S> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// exp to 2 ulp where the result is normal; smaller ones are 0, NaN stays NaN. Clamped above 88.37.
CC4S_INLINE Simd<float>::Vec vexp(Simd<float>::Vec x) {
  using V = Simd<float>::Vec;
  using I = Simd<float>::Int;
  const V low = splat(-87.33654f), high = splat(88.37626f);
  V y = x < low ? low : x;
  y = y > high ? high : y;
  // n = round(y / ln 2) by the addition of 1.5 * 2^23, then r = y - n ln 2 in two parts, |r| <= 0.35.
  const V shift = splat(12582912.0f);
  const V t = y * 1.44269504f + shift;
  const V n = t - shift;
  const V r = (y - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  // Taylor: the next term is below 2^-27 of the result.
  V p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  const I scaled = reinterpret_cast<I>(p) + ((reinterpret_cast<I>(t) - reinterpret_cast<I>(shift)) << 23);
  return x < low ? V{} : reinterpret_cast<V>(scaled);
}

CC4S_INLINE Simd<double>::Vec vexp(Simd<double>::Vec x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// ---- Products

template <class S>
constexpr int64_t kAhead = 2 * kLanes<S> / 8;

// c[r][0, 2 kLanes) (+)= sum_k a[r * row + k * column] * b[k][0, 2 kLanes) for R rows.
// On the way `ahead` is fetched into the second cache, kAhead elements per k: a share of the next panel, which the
// first block of rows would otherwise wait for.
template <int R, class S>
void multiply_rows(const S* a, int64_t row, int64_t column, const S* b, int64_t k, S* c, int64_t ldc, bool add,
                   const S* ahead) {
  using V = typename Simd<S>::Vec;
  constexpr int W = kLanes<S>;
  // One pointer for three rows: pointers to all 14 do not fit the integer registers.
  constexpr int kBases = (R + 2) / 3;
  V left[R], right[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) left[r] = right[r] = V{};
  const S* base[kBases];
#pragma GCC unroll 8
  for (int g = 0; g < kBases; ++g) base[g] = a + 3 * g * row;
  for (int64_t i = 0; i < k; ++i) {
    const V b0 = load(b), b1 = load(b + W);
    __builtin_prefetch(ahead, 0, 2);
    ahead += kAhead<S>;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V x = splat(base[r / 3][(r % 3) * row]);
      left[r] += x * b0;
      right[r] += x * b1;
    }
#pragma GCC unroll 8
    for (int g = 0; g < kBases; ++g) base[g] += column;
    b += 2 * W;
  }
  // C comes last: sums of sums round less than one long chain.
  if (add) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      left[r] += load(c + r * ldc);
      right[r] += load(c + r * ldc + W);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(c + r * ldc, left[r]);
    store(c + r * ldc + W, right[r]);
  }
}

template <int R, class S>
void multiply_some_rows(int rows, const S* a, int64_t row, int64_t column, const S* b, int64_t k, S* c, int64_t ldc,
                        bool add, const S* ahead) {
  if (rows == R) return multiply_rows<R>(a, row, column, b, k, c, ldc, add, ahead);
  if constexpr (R > 1) multiply_some_rows<R - 1>(rows, a, row, column, b, k, c, ldc, add, ahead);
}

// Blocks of at most kRowsInRegisters rows; the last two share what is left, so that none is thin.
CC4S_INLINE int block_rows(int64_t left) {
  constexpr int R = kRowsInRegisters;
  if (left <= R) return static_cast<int>(left);
  return left < 2 * R ? static_cast<int>((left + 1) / 2) : R;
}

template <class S, class E = S>
struct Plain {
  using Scalar = S;
  using Element = E;
  using Operand = S;
  static constexpr int64_t kPanel = 2 * kLanes<S>;
  static constexpr int64_t kRowTile = 112;
  static constexpr int64_t kKeyTile = 256;
  // Rows of tiles are this much longer than they need to be: an odd number of cache lines, to use all cache sets.
  static constexpr int64_t kSkew = 64 / sizeof(S);
  static constexpr int64_t kRowPad = 1;  // products write rows up to a multiple of this
  // A sum of more products is a sum of sums: one long chain would round more than the products of a BLAS.
  static constexpr int64_t kChain = 128;

  struct Left {
    const S* data;
    int64_t row, column;
  };

  struct Session {};  // what a thread holds while it multiplies

  static int64_t depth(int64_t k) { return k; }
  static int64_t left_rows_size(int64_t count, int64_t width) { return count * width; }
  static int64_t left_tile_size(int64_t, int64_t) { return 0; }
  // Elements of a packed B[k][n].
  static int64_t right_size(int64_t k, int64_t n) { return k * round_up(n, kPanel); }
  static int64_t right_transposed_size(int64_t n, int64_t k) { return k * round_up(n, kPanel); }

  // A = rows [begin, begin + count).
  static Left left_rows(const Rows<const E>& rows, int64_t begin, int64_t count, S* scratch) {
    if constexpr (std::is_same_v<E, S>) {
      if (rows.at.index == nullptr) return {rows[begin], rows.width, 1};
    }
    for (int64_t i = 0; i < count; ++i) {
      const E* in = rows[begin + i];
      for (int64_t j = 0; j < rows.width; ++j) scratch[i * rows.width + j] = widen(in[j]);
    }
    return {scratch, rows.width, 1};
  }

  // A = a tile [m, n], or its transpose [n, m].
  static Left left_tile(const S* tile, int64_t ld, int64_t, int64_t, S*) { return {tile, ld, 1}; }
  static Left left_transposed(const S* tile, int64_t ld, int64_t, int64_t, S*) { return {tile, 1, ld}; }

  // B[k][n] = rows[begin + k][n], k < count, n < width.
  static void pack(const Rows<const E>& rows, int64_t begin, int64_t count, S* out) {
    for (int64_t first = 0; first < rows.width; first += kPanel) {
      const int64_t n = std::min(kPanel, rows.width - first);
      for (int64_t i = 0; i < count; ++i, out += kPanel) {
        const E* in = rows[begin + i] + first;
        if (n == kPanel) {
          for (int64_t j = 0; j < kPanel; ++j) out[j] = widen(in[j]);
        } else {
          for (int64_t j = 0; j < kPanel; ++j) out[j] = j < n ? widen(in[j]) : S{0};
        }
      }
    }
  }

  // B[k][n] = rows[begin + n][k], n < count, k < width.
  static void pack_transposed(const Rows<const E>& rows, int64_t begin, int64_t count, S* out) {
    for (int64_t first = 0; first < count; first += kPanel, out += rows.width * kPanel) {
      for (int64_t j = 0; j < kPanel; ++j) {
        const E* in = first + j < count ? rows[begin + first + j] : nullptr;
        for (int64_t i = 0; i < rows.width; ++i) out[i * kPanel + j] = in != nullptr ? widen(in[i]) : S{0};
      }
    }
  }

  // C[m][n] (+)= A[m][k] B[k][n], B in panels of `stride` elements; writes up to round_up(n, kPanel) columns.
  static void multiply(const Left& a, const S* b, int64_t stride, int64_t m, int64_t n, int64_t k, S* c, int64_t ldc,
                       bool add) {
    for (int64_t first = 0; first < n; first += kPanel, b += stride) {
      const S* ahead = b + stride;
      // Once for k = 0 as well: the sum is 0.
      for (int64_t begin = 0; begin == 0 || begin < k; begin += kChain) {
        const int64_t length = std::min(kChain, k - begin);
        for (int64_t i = 0; i < m;) {
          const int rows = block_rows(m - i);
          multiply_some_rows<kRowsInRegisters>(rows, a.data + i * a.row + begin * a.column, a.row, a.column,
                                               b + begin * kPanel, length, c + i * ldc + first, ldc,
                                               add || begin > 0, ahead);
          i += rows;
          ahead += length * kAhead<S>;
        }
      }
    }
  }
};

#if CC4S_HALF > 0
#include "common/bf16_engine.h"
#endif
