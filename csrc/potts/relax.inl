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
