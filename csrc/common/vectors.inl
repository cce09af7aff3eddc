// Vectors of CC4S_VECTOR_BYTES bytes and the few functions the kernels need beyond their operators.
// Included inside a namespace, once for each instruction set: see common/instruction_sets.h.

template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  using Int = int32_t;
  typedef float Vector __attribute__((vector_size(CC4S_VECTOR_BYTES)));
  typedef Int IntVector __attribute__((vector_size(CC4S_VECTOR_BYTES)));
  static constexpr int count = CC4S_VECTOR_BYTES / 4;
};

template <>
struct Lanes<double> {
  using Int = int64_t;
  typedef double Vector __attribute__((vector_size(CC4S_VECTOR_BYTES)));
  typedef Int IntVector __attribute__((vector_size(CC4S_VECTOR_BYTES)));
  static constexpr int count = CC4S_VECTOR_BYTES / 8;
};

using FloatV = Lanes<float>::Vector;
using FloatI = Lanes<float>::IntVector;
using DoubleV = Lanes<double>::Vector;
using DoubleI = Lanes<double>::IntVector;

template <typename V, typename T>
inline V load(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V, typename T>
inline void store(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

// Of numbers; a comparison would need the blend that these instructions save.
inline FloatV larger(FloatV a, FloatV b) {
#if CC4S_VECTOR_BYTES == 64
  return _mm512_max_ps(a, b);
#elif CC4S_VECTOR_BYTES == 32
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline DoubleV larger(DoubleV a, DoubleV b) { return a > b ? a : b; }

inline FloatV root(FloatV v) {
#if CC4S_VECTOR_BYTES == 64
  return _mm512_sqrt_ps(v);
#elif CC4S_VECTOR_BYTES == 32
  return _mm256_sqrt_ps(v);
#else
  for (int i = 0; i < Lanes<float>::count; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}
inline DoubleV root(DoubleV v) {
  for (int i = 0; i < Lanes<double>::count; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// Bit i: lane i is negative.
inline uint32_t negative_lanes(FloatI v) {
#if CC4S_VECTOR_BYTES == 64
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(v));
#elif CC4S_VECTOR_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(v)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < Lanes<float>::count; ++i) bits |= static_cast<uint32_t>(v[i] < 0) << i;
  return bits;
#endif
}
inline uint32_t negative_lanes(DoubleI v) {
  uint32_t bits = 0;
  for (int i = 0; i < Lanes<double>::count; ++i) bits |= static_cast<uint32_t>(v[i] < 0) << i;
  return bits;
}

inline float sum_of(FloatV v) {
#if CC4S_VECTOR_BYTES == 64
  return _mm512_reduce_add_ps(v);
#else
  float sum = 0;
  for (int i = 0; i < Lanes<float>::count; ++i) sum += v[i];
  return sum;
#endif
}
inline double sum_of(DoubleV v) {
  double sum = 0;
  for (int i = 0; i < Lanes<double>::count; ++i) sum += v[i];
  return sum;
}

// from[index[i]] for indices below the number of lanes, all of which are read.
inline FloatV pick_near(const float* from, FloatI index) {
#if CC4S_VECTOR_BYTES == 64
  return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), load<FloatV>(from));
#elif CC4S_VECTOR_BYTES == 32
  return _mm256_permutevar8x32_ps(load<FloatV>(from), reinterpret_cast<__m256i>(index));
#else
  FloatV v;
  for (int i = 0; i < Lanes<float>::count; ++i) v[i] = from[index[i]];
  return v;
#endif
}
inline DoubleV pick_near(const double* from, DoubleI index) {
  DoubleV v;
  for (int i = 0; i < Lanes<double>::count; ++i) v[i] = from[index[i]];
  return v;
}

// exp(x) for x <= 0; below -86.6, where float32 soon ends, exp(-86.6) = 2e-38.
inline FloatV exp_nonpositive(FloatV x) {
  // Adding 1.5 2^23 rounds to an integer and leaves it in the low bits.
  constexpr float kRound = 12582912.0f;
  x = larger(x, FloatV{} - 86.6f);
  const FloatV shifted = x * 1.44269504088896341f + kRound;
  const FloatV n = shifted - kRound;
  // ln 2 in two parts; r in [-ln 2 / 2, ln 2 / 2].
  const FloatV r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  // (e^r - 1 - r) / r^2, fitted to 3e-9 of e^r.
  FloatV y = r * 1.3813144393e-3f + 8.3694188465e-3f;
  y = y * r + 4.1668456790e-2f;
  y = y * r + 1.6666514791e-1f;
  y = y * r + 4.9999993051e-1f;
  y = y * (r * r) + r + 1.0f;
  // n goes to the exponent.
  return reinterpret_cast<FloatV>(reinterpret_cast<FloatI>(y) + (reinterpret_cast<FloatI>(shifted) << 23));
}
inline DoubleV exp_nonpositive(DoubleV x) {
  DoubleV y;
  for (int i = 0; i < Lanes<double>::count; ++i) y[i] = std::exp(x[i]);
  return y;
}

// ln(x) for normal x > 0.
inline FloatV log_positive(FloatV x) {
  const FloatI bits = reinterpret_cast<FloatI>(x);
  // x = m 2^n with m in [sqrt(1/2), sqrt(2)).
  const FloatI n = (bits - 0x3f3504f3) >> 23;
  const FloatV m = reinterpret_cast<FloatV>(bits - (n << 23));
  const FloatV f = m - 1.0f;
  // (ln(1 + f) - f + f^2 / 2) / f^3, fitted to 1e-9 of ln(1 + f).
  FloatV y = f * 6.7466382631e-2f - 1.1675651214e-1f;
  y = y * f + 1.1888162971e-1f;
  y = y * f - 1.2405589063e-1f;
  y = y * f + 1.4219552279e-1f;
  y = y * f - 1.6667995843e-1f;
  y = y * f + 2.0002118663e-1f;
  y = y * f - 2.5000009600e-1f;
  y = y * f + 3.3333312604e-1f;
  const FloatV e = __builtin_convertvector(n, FloatV);
  const FloatV square = f * f;
  y = y * f * square + e * -2.12194440e-4f - 0.5f * square;
  return (f + y) + e * 0.693359375f;
}
inline DoubleV log_positive(DoubleV x) {
  DoubleV y;
  for (int i = 0; i < Lanes<double>::count; ++i) y[i] = std::log(x[i]);
  return y;
}
