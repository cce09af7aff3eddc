// Conjugate gradients for R right-hand sides of one system at once: adjacent in memory, one to a lane, so that the
// chains of dependent operations in the triangular solves are shared.
template <int R>
struct Lanes {
  typedef double V __attribute__((vector_size(8 * R)));
};
template <>
struct Lanes<1> {
  typedef double V;
};

inline double lane(const double& v, int) { return v; }
template <typename V>
inline double lane(const V& v, int l) {
  return v[l];
}
inline void set_lane(double& v, int, double value) { v = value; }
template <typename V>
inline void set_lane(V& v, int l, double value) {
  v[l] = value;
}

// z = (L L^T)^-1 r; returns r . z. In place: q stands where z will.
template <int R>
inline void precondition(const System& s, const typename Lanes<R>::V* r, typename Lanes<R>::V* z,
                         typename Lanes<R>::V& dot) {
  using V = typename Lanes<R>::V;
  const double *a = s.right_factor.data(), *b = s.down_factor.data(), *pivot = s.pivot.data();
  const int64_t stride = s.stride;
  V last{};
  for (int64_t i = s.first(); i < s.last(); ++i) {
    last = (r[i] + a[i - 1] * last + b[i - stride] * z[i - stride]) * pivot[i];
    z[i] = last;
  }
  V sum{};
  last = V{};
  for (int64_t i = s.last() - 1; i >= s.first(); --i) {
    last = (z[i] + a[i] * last + b[i] * z[i + stride]) * pivot[i];
    z[i] = last;
    sum += r[i] * last;
  }
  dot = sum;
}

// out = A p; p . out.
template <int R>
inline void multiply(const System& s, const typename Lanes<R>::V* p, typename Lanes<R>::V* out,
                     typename Lanes<R>::V& dot) {
  using V = typename Lanes<R>::V;
  const double *right = s.right.data(), *down = s.down.data(), *diagonal = s.diagonal.data();
  const int64_t stride = s.stride;
  V sum{};
  for (int64_t i = s.first(); i < s.last(); ++i) {
    const V v = diagonal[i] * p[i] - right[i] * p[i + 1] - right[i - 1] * p[i - 1] - down[i] * p[i + stride] -
                down[i - stride] * p[i - stride];
    out[i] = v;
    sum += p[i] * v;
  }
  dot = sum;
}

// x [size, R] of right-hand sides b [size, R], 0 where a pixel is not free; false where a lane does not converge.
template <int R>
bool solve(const System& s, const double* b, double* solution) {
  using V = typename Lanes<R>::V;
  std::vector<double> memory((4 * s.size + 4) * R, 0.0);
  // Vectors need their alignment.
  double* aligned = memory.data();
  while (reinterpret_cast<uintptr_t>(aligned) % sizeof(V) != 0) ++aligned;
  V *r = reinterpret_cast<V*>(aligned), *z = r + s.size, *p = z + s.size, *x = p + s.size;
  V total{};
  for (int64_t i = 0; i < s.size; ++i) {
    for (int l = 0; l < R; ++l) set_lane(r[i], l, b[i * R + l]);
    const V change = r[i] / s.diagonal[i];
    total += change * change;
  }
  double bound[R], accepted[R];
  for (int l = 0; l < R; ++l) {
    bound[l] = kTolerance * kTolerance * lane(total, l);
    accepted[l] = kAccepted * kAccepted * lane(total, l);
  }
  V rz{}, pa{};
  precondition<R>(s, r, z, rz);
  for (int64_t i = 0; i < s.size; ++i) p[i] = z[i];
  // What is not finite stays so.
  for (int64_t i = 0; i < s.size; ++i) x[i] = 0.0 * total;
  // A solved system stands still: its numbers would get too small to divide.
  bool active[R];
  for (int l = 0; l < R; ++l) active[l] = lane(total, l) > 0;
  bool done = false, converged = false;
  for (int step = 0; step < kMaxIterations && !done; ++step) {
    // Nobody needs z before the next preconditioning: it holds A p.
    multiply<R>(s, p, z, pa);
    V alpha{};
    for (int l = 0; l < R; ++l) set_lane(alpha, l, active[l] && lane(pa, l) > 0 ? lane(rz, l) / lane(pa, l) : 0.0);
    V residual{};
    for (int64_t i = s.first(); i < s.last(); ++i) {
      x[i] += alpha * p[i];
      r[i] -= alpha * z[i];
      const V change = r[i] / s.diagonal[i];
      residual += change * change;
    }
    done = true;
    converged = true;
    for (int l = 0; l < R; ++l) {
      active[l] = lane(residual, l) > bound[l];
      done = done && !active[l];
      converged = converged && !(lane(residual, l) > accepted[l]);
    }
    if (done) break;
    const V before = rz;
    precondition<R>(s, r, z, rz);
    V beta{};
    for (int l = 0; l < R; ++l) set_lane(beta, l, active[l] && lane(before, l) > 0 ? lane(rz, l) / lane(before, l) : 0.0);
    for (int64_t i = s.first(); i < s.last(); ++i) p[i] = z[i] + beta * p[i];
  }
  for (int64_t i = 0; i < s.size; ++i) {
    for (int l = 0; l < R; ++l) solution[i * R + l] = lane(x[i], l);
  }
  return converged;
}

inline bool solve_lanes(const System& s, int lanes, const double* b, double* x) {
  return lanes == 1 ? solve<1>(s, b, x) : lanes == 2 ? solve<2>(s, b, x) : solve<4>(s, b, x);
}
