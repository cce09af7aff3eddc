// The relaxations of a vector of pairs and their derivatives, with the clamps of the definition
// (cc4s_kernels/ops/potts/reference.py): a derivative is that of the inside where a clamp holds with equality.

// r, and dr/dp = slope * (p - q) - slope / 2 [log-quadratic] by differences, else slope * q + near * p and
// dr/dq = slope * p + far * q.
template <typename V>
struct Relaxed {
  V value, slope, near, far;
};

constexpr double kEps = 1e-6;

// -ln(eps + (1 - eps) x), x kept within 0 and 1, and its derivative.
template <typename T, typename V = typename Lanes<T>::Vector>
inline Relaxed<V> negative_log(V x) {
  const V zero{}, one = zero + T{1};
  constexpr T eps = static_cast<T>(kEps), rest = static_cast<T>(1 - kEps);
  const V inside = x < zero ? zero : (x > one ? one : x);
  const V shifted = eps + rest * inside;
  const V log = log_positive(shifted);
  // The logarithm takes numbers only.
  return {shifted == shifted ? zero - log : shifted, ((x >= zero) & (x <= one)) ? -rest / shifted : zero, zero, zero};
}

// p.q / (|p| |q|), at most 1, and 0 with derivative 0 where p or q is 0.
template <typename T, typename V = typename Lanes<T>::Vector>
inline Relaxed<V> cosine(V product, V p_square, V q_square) {
  const V zero{}, one = zero + T{1};
  const V squares = p_square * q_square;
  const V safe = squares > zero ? squares : one;
  const V length = root(safe);
  const V ratio = product / length;
  const V passes = ((squares > zero) & (ratio <= one)) ? one / length : zero;
  const V back = -(ratio / length) * passes;
  return {squares > zero ? (ratio > one ? one : ratio) : zero, passes, back * q_square, back * p_square};
}

// `product`: p.q, or |p - q|^2 by differences. `p`, `q`: what each end has alone.
template <typename T, typename V = typename Lanes<T>::Vector>
inline Relaxed<V> relax(Relaxation relaxation, V product, V p, V q) {
  const V zero{}, one = zero + T{1};
  switch (relaxation) {
    case Relaxation::kBilinear: {
      const V value = one - product;
      return {value < zero ? zero : value, value >= zero ? -one : zero, zero, zero};
    }
    case Relaxation::kQuadratic:
      return {product * T{0.5}, one, zero, zero};
    case Relaxation::kNormalizedQuadratic: {
      const Relaxed<V> c = cosine<T>(product, p, q);
      return {one - c.value, -c.slope, -c.near, -c.far};
    }
    case Relaxation::kCollisionCrossEntropy:
      return negative_log<T>(product);
    case Relaxation::kCollisionDivergence: {
      const Relaxed<V> c = cosine<T>(product, p, q), log = negative_log<T>(c.value);
      return {log.value, log.slope * c.slope, log.slope * c.near, log.slope * c.far};
    }
    default: {
      const Relaxed<V> log = negative_log<T>(product + p * T{0.5} + q * T{0.5});
      return {log.value, -log.slope, zero, zero};
    }
  }
}

// Both are used for sums over classes, with the same rounding: a distribution's cosine with itself is exactly 1.
template <typename V>
inline V add_product(V sum, V p, V q) {
  return sum + p * q;
}
template <typename V>
inline V add_square(V sum, V d) {
  return sum + d * d;
}

// `lines` lines of `count` elements of any dtype, `step` apart in a line, to or from lines of adjacent ones.
template <typename T>
inline void read_lines(const Array& array, int64_t at, int64_t lines, int64_t line_step, int64_t count, int64_t step,
                       T* __restrict to, int64_t to_step) {
  with_type(array.data, array.dtype, [&](const auto* data) {
    for (int64_t k = 0; k < lines; ++k) {
      const auto* __restrict from = data + at + k * line_step;
      T* __restrict line = to + k * to_step;
      if (step == 1) {
        for (int64_t i = 0; i < count; ++i) line[i] = static_cast<T>(from[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) line[i] = static_cast<T>(from[i * step]);
      }
    }
  });
}

template <typename T>
inline void write_lines(const T* __restrict from, int64_t from_step, int64_t lines, int64_t count, void* out,
                        ScalarType dtype, int64_t at, int64_t line_step) {
  with_type(out, dtype, [&](auto* data) {
    using E = std::remove_reference_t<decltype(*data)>;
    for (int64_t k = 0; k < lines; ++k) {
      E* __restrict to = data + at + k * line_step;
      const T* __restrict line = from + k * from_step;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<E>(line[i]);
    }
  });
}
