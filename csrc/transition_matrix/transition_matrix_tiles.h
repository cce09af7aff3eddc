// Tile code of `transition_matrix`; compiled once for each instruction set. See docs/kernels/transition_matrix.md.
#include "common/tile_engine.h"

// Rows of a strip: two blocks of registers. A strip holds all columns and stays in the cache up to N = 16,384.
constexpr int64_t kStripRows = 28;

template <class En>
struct StripState {
  using S = typename En::Scalar;
  using O = typename En::Operand;
  typename En::Session session;
  int64_t ld = 0;
  Buffer<S> scores{0}, other{0};  // [kStripRows, ld]
  Buffer<O> left{0};

  void reserve(int64_t n, int64_t d) {
    if (ld != 0) return;
    ld = round_up(n, En::kPanel) + En::kSkew;
    const int64_t rows = round_up(kStripRows, En::kRowPad);
    scores.reset(rows * ld);
    other.reset(rows * ld);
    left.reset(En::left_rows_size(kStripRows, d));
  }
};

// The right operands of all keys: [B] x panels.
template <class En>
struct PackedKeys {
  using E = typename En::Element;
  using O = typename En::Operand;
  int64_t size;
  Buffer<O> data;

  PackedKeys(const Matrix<const E>& k, const Valid& valid, int64_t batch)
      : size(En::right_transposed_size(k.n, k.width)), data(batch * size) {
    const int64_t tiles = (k.n + En::kKeyTile - 1) / En::kKeyTile;
    struct Nothing {};
    for_each<Nothing>(batch * tiles, [&](Nothing&, int64_t task) {
      const int64_t b = task / tiles, first = task % tiles * En::kKeyTile;
      const int64_t n = std::min(En::kKeyTile, k.n - first);
      En::pack_transposed(k.rows(b, valid[b]), first, n, data + b * size + En::right_transposed_size(first, k.width));
    });
  }
};

// Scores of the rows [begin, begin + rows), scaled; -inf in the padding.
template <class En>
void fill_strip(StripState<En>& state, const MatrixInput<typename En::Element, typename En::Scalar>& in,
                const PackedKeys<En>& keys, const PackedKeys<En>* queries, int64_t b, int64_t begin, int64_t rows) {
  using S = typename En::Scalar;
  constexpr int W = kLanes<S>;
  const Positions at = (*in.valid)[b];
  const int64_t d = in.q.width, stride = En::depth(d) * En::kPanel, padded = round_up(in.n, En::kPanel);
  state.reserve(in.n, d);
  const auto q = En::left_rows(in.q.rows(b, at), begin, rows, state.left);
  En::multiply(q, keys.data + b * keys.size, stride, rows, in.n, d, state.scores, state.ld, false);
  if (queries != nullptr) {
    const auto k = En::left_rows(in.k.rows(b, at), begin, rows, state.left);
    En::multiply(k, queries->data + b * queries->size, stride, rows, in.n, d, state.other, state.ld, false);
  }
  const S scale = queries != nullptr ? in.scale / 2 : in.scale;
  for (int64_t i = 0; i < rows; ++i) {
    S* row = state.scores + i * state.ld;
    const S* other = state.other + i * state.ld;
    for (int64_t j = 0; j < padded; j += W) {
      // Sum first: the same bits at (i, j) and (j, i).
      store(row + j, (queries != nullptr ? load(row + j) + load(other + j) : load(row + j)) * scale);
    }
    for (int64_t j = in.n; j < padded; ++j) row[j] = -std::numeric_limits<S>::infinity();
  }
}

// The row becomes exp(row - peak); returns the peak and the sum.
template <class S>
CC4S_INLINE void exponentiate(S* row, int64_t padded, S* peak, S* total) {
  using V = typename Simd<S>::Vec;
  constexpr int W = kLanes<S>;
  V high = splat(std::numeric_limits<S>::lowest()), sum{};
  for (int64_t j = 0; j < padded; j += W) {
    const V x = load(row + j);
    high = x > high ? x : high;
  }
  *peak = horizontal_max<S>(high);
  for (int64_t j = 0; j < padded; j += W) {
    const V e = vexp(load(row + j) - *peak);
    store(row + j, e);
    sum += e;
  }
  *total = horizontal_sum<S>(sum);
}

template <class En, class Body>
void for_each_strip(const MatrixInput<typename En::Element, typename En::Scalar>& in, const PackedKeys<En>& keys,
                    const PackedKeys<En>* queries, const Body& body) {
  const int64_t strips = (in.n + kStripRows - 1) / kStripRows;
  for_each<StripState<En>>(in.batch * strips, [&](StripState<En>& state, int64_t task) {
    const int64_t b = task / strips, begin = task % strips * kStripRows;
    const int64_t rows = std::min(kStripRows, in.n - begin);
    fill_strip<En>(state, in, keys, queries, b, begin, rows);
    for (int64_t i = 0; i < rows; ++i) body(state, b, begin + i, state.scores + i * state.ld);
  });
}

template <class En>
void matrix_forward(const MatrixInput<typename En::Element, typename En::Scalar>& in,
                    const MatrixOutput<typename En::Element, typename En::Scalar>& out) {
  using S = typename En::Scalar;
  using E = typename En::Element;
  using V = typename Simd<S>::Vec;
  constexpr int W = kLanes<S>;
  using State = StripState<En>;
  const bool symmetric = in.normalize == Normalize::symmetric;
  const int64_t padded = round_up(in.n, En::kPanel);
  const PackedKeys<En> keys(in.k, *in.valid, in.batch);
  if (in.normalize == Normalize::row) {
    for_each_strip<En>(in, keys, nullptr, [&](State&, int64_t b, int64_t i, S* row) {
      S peak, total;
      exponentiate(row, padded, &peak, &total);
      out.lse[b * in.n + i] = peak + std::log(total);
      E* to = out.matrix + (b * in.n + i) * in.n;
      const S weight = 1 / total;
      for (int64_t j = 0; j < in.n; ++j) to[j] = narrow_to<E>(row[j] * weight);
    });
    return;
  }
  const PackedKeys<En> queries(in.q, *in.valid, in.batch);
  MatrixInput<E, S> swapped = in;
  if (!symmetric) std::swap(swapped.q, swapped.k);
  for_each_strip<En>(swapped, symmetric ? keys : queries, symmetric ? &queries : nullptr,
                     [&](State&, int64_t b, int64_t i, S* row) {
                       S peak, total;
                       exponentiate(row, padded, &peak, &total);
                       out.lse[b * in.n + i] = peak + std::log(total);
                     });
  // Normalisers of the columns, padded for vectors.
  Buffer<S> columns(in.batch * padded);
  for (int64_t b = 0; b < in.batch; ++b) {
    for (int64_t j = 0; j < padded; ++j) columns[b * padded + j] = j < in.n ? out.lse[b * in.n + j] : S{0};
  }
  for_each_strip<En>(in, keys, symmetric ? &queries : nullptr, [&](State&, int64_t b, int64_t i, S* row) {
    const S* column = columns + b * padded;
    const S own = out.lse[b * in.n + i];
    for (int64_t j = 0; j < padded; j += W) {
      const V lse = symmetric ? V((load(column + j) + own) * S(0.5)) : load(column + j);
      store(row + j, vexp(load(row + j) - lse));
    }
    E* to = out.matrix + (b * in.n + i) * in.n;
    for (int64_t j = 0; j < in.n; ++j) to[j] = narrow_to<E>(row[j]);
  });
}

// ---- Backward: row sums of P o G first, then groups of keys that walk over all queries

// tile[i][j] (+)= G[begin + i][first + j], or G transposed.
template <class S, class E>
void read_gradient(const E* grad, bool transposed, int64_t n_all, int64_t begin, int64_t rows, int64_t first, int64_t n,
                   S* tile, int64_t ld, bool add) {
  if (!transposed) {
    for (int64_t i = 0; i < rows; ++i) {
      const E* in = grad + (begin + i) * n_all + first;
      for (int64_t j = 0; j < n; ++j) tile[i * ld + j] = (add ? tile[i * ld + j] : S{0}) + widen(in[j]);
    }
  } else {
    for (int64_t j = 0; j < n; ++j) {
      const E* in = grad + (first + j) * n_all + begin;
      for (int64_t i = 0; i < rows; ++i) tile[i * ld + j] = (add ? tile[i * ld + j] : S{0}) + widen(in[i]);
    }
  }
}

template <class En>
struct MatrixBackwardState {
  using S = typename En::Scalar;
  using O = typename En::Operand;
  typename En::Session session;
  int64_t ld = 0;
  Buffer<S> scores{0}, other{0}, grad{0}, dk{0};        // [kRowTile, ld] each; [kKeyTile, d]
  Buffer<O> keys_across{0}, queries_across{0}, keys{0};  // right operands of the key tile
  Buffer<O> queries{0}, left{0}, left_ds{0}, left_across{0};

  void reserve(int64_t d) {
    if (ld != 0) return;
    ld = En::kKeyTile + En::kSkew;
    for (Buffer<S>* x : {&scores, &other, &grad}) x->reset(En::kRowTile * ld);
    dk.reset(En::kKeyTile * round_up(d, En::kPanel));
    keys_across.reset(En::right_transposed_size(En::kKeyTile, d));
    queries_across.reset(En::right_transposed_size(En::kKeyTile, d));
    keys.reset(En::right_size(En::kKeyTile, d));
    queries.reset(En::right_size(En::kRowTile, d));
    left.reset(En::left_rows_size(En::kRowTile, d));
    left_ds.reset(En::left_tile_size(En::kRowTile, En::kKeyTile));
    left_across.reset(En::left_tile_size(En::kKeyTile, En::kRowTile));
  }
};

template <class En>
void matrix_backward_tile(MatrixBackwardState<En>& state,
                          const MatrixInput<typename En::Element, typename En::Scalar>& in,
                          const MatrixBackward<typename En::Element, typename En::Scalar>& out,
                          const typename En::Scalar* delta, const typename En::Scalar* weight, int64_t b,
                          int64_t first, int64_t n, typename En::Scalar* dq, bool add) {
  using S = typename En::Scalar;
  using E = typename En::Element;
  using V = typename Simd<S>::Vec;
  constexpr int W = kLanes<S>;
  const Positions at = (*in.valid)[b];
  const bool symmetric = in.normalize == Normalize::symmetric;
  const int64_t d = in.q.width, ld = state.ld, n_padded = round_up(n, En::kPanel), width = round_up(d, En::kPanel);
  const int64_t stride = En::depth(d) * En::kPanel;
  const E* grad = out.grad + b * in.n * in.n;
  const S* lse = out.lse + b * in.n;
  delta += b * in.n;
  weight += b * in.n;
  En::pack_transposed(in.k.rows(b, at), first, n, state.keys_across);
  En::pack(in.k.rows(b, at), first, n, state.keys);
  if (symmetric) En::pack_transposed(in.q.rows(b, at), first, n, state.queries_across);
  S column_lse[En::kKeyTile + 64], column_delta[En::kKeyTile + 64];
  for (int64_t j = 0; j < n_padded; ++j) {
    column_lse[j] = j < n ? lse[first + j] : S{0};
    column_delta[j] = j < n ? delta[first + j] : S{0};
  }

  for (int64_t begin = 0; begin < in.n; begin += En::kRowTile) {
    const int64_t rows = std::min(En::kRowTile, in.n - begin);
    const auto q = En::left_rows(in.q.rows(b, at), begin, rows, state.left);
    En::multiply(q, state.keys_across, stride, rows, n, d, state.scores, ld, false);
    if (symmetric) {
      const auto k = En::left_rows(in.k.rows(b, at), begin, rows, state.left);
      En::multiply(k, state.queries_across, stride, rows, n, d, state.other, ld, false);
    }
    read_gradient<S>(grad, out.transposed, in.n, begin, rows, first, n, state.grad.get(), ld, false);
    if (symmetric) read_gradient<S>(grad, !out.transposed, in.n, begin, rows, first, n, state.grad.get(), ld, true);
    for (int64_t i = 0; i < rows; ++i) {
      S* x = state.scores + i * ld;
      S* g = state.grad + i * ld;
      const S* other = state.other + i * ld;
      const S own = lse[begin + i], sum = delta[begin + i], factor = weight[begin + i];
      for (int64_t j = n; j < n_padded; ++j) g[j] = 0;
      for (int64_t j = 0; j < n_padded; j += W) {
        if (symmetric) {
          const V s = (load(x + j) + load(other + j)) * (in.scale / 2), across = load(column_lse + j);
          const V m = vexp(s - (across + own) * S(0.5));
          const V row = sum * vexp(s - own), column = load(column_delta + j) * vexp(s - across);
          store(x + j, V((m * load(g + j) - (row + column) * S(0.5)) * S(0.5)));
        } else {
          store(x + j, V(vexp(load(x + j) * in.scale - own) * factor * (load(g + j) - sum)));
        }
      }
      for (int64_t j = n; j < n_padded; ++j) x[j] = 0;
    }
    En::pack(in.q.rows(b, at), begin, rows, state.queries);
    const auto across = En::left_transposed(state.scores, ld, rows, n, state.left_across);
    En::multiply(across, state.queries, En::depth(rows) * En::kPanel, n, d, rows, state.dk, width, begin > 0);
    const auto ds = En::left_tile(state.scores, ld, rows, n, state.left_ds);
    En::multiply(ds, state.keys, En::depth(n) * En::kPanel, rows, d, n, dq + begin * width, width, add);
  }
  for (int64_t j = 0; j < n; ++j) {
    E* to = out.grad_k.rows(b, at)[first + j];
    for (int64_t c = 0; c < d; ++c) to[c] = narrow_to<E>(in.scale * state.dk[j * width + c]);
  }
}

template <class En>
void matrix_backward(const MatrixInput<typename En::Element, typename En::Scalar>& in,
                     const MatrixBackward<typename En::Element, typename En::Scalar>& out) {
  using S = typename En::Scalar;
  using V = typename Simd<S>::Vec;
  constexpr int W = kLanes<S>;
  const bool symmetric = in.normalize == Normalize::symmetric;
  const int64_t d = in.q.width, padded = round_up(in.n, En::kPanel);
  Buffer<S> delta(in.batch * in.n), weight(in.batch * in.n);
  {
    const PackedKeys<En> keys(in.k, *in.valid, in.batch);
    const PackedKeys<En> queries(in.q, *in.valid, symmetric ? in.batch : 0);
    Buffer<S> columns(in.batch * padded);
    for (int64_t b = 0; b < in.batch; ++b) {
      for (int64_t j = 0; j < padded; ++j) columns[b * padded + j] = j < in.n ? out.lse[b * in.n + j] : S{0};
    }
    const int64_t strips = (in.n + kStripRows - 1) / kStripRows;
    struct State {
      StripState<En> strip;
      Buffer<S> grad{0};
      int64_t ld = 0;
    };
    for_each<State>(in.batch * strips, [&](State& state, int64_t task) {
      const int64_t b = task / strips, begin = task % strips * kStripRows;
      const int64_t rows = std::min(kStripRows, in.n - begin);
      if (state.ld == 0) {
        state.ld = padded + En::kSkew;
        state.grad.reset(kStripRows * state.ld);
      }
      fill_strip<En>(state.strip, in, keys, symmetric ? &queries : nullptr, b, begin, rows);
      const auto* grad = out.grad + b * in.n * in.n;
      read_gradient<S>(grad, out.transposed, in.n, begin, rows, 0, in.n, state.grad.get(), state.ld, false);
      if (symmetric) {
        read_gradient<S>(grad, !out.transposed, in.n, begin, rows, 0, in.n, state.grad.get(), state.ld, true);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const S* x = state.strip.scores + i * state.strip.ld;
        S* g = state.grad + i * state.ld;
        const S own = out.lse[b * in.n + begin + i];
        for (int64_t j = in.n; j < padded; ++j) g[j] = 0;
        V sum{}, total{};
        for (int64_t j = 0; j < padded; j += W) {
          const V lse = symmetric ? V((load(columns + b * padded + j) + own) * S(0.5)) : splat(own);
          const V p = vexp(load(x + j) - lse);
          total += p;
          sum += p * load(g + j);
        }
        // A rounded normaliser moves a whole row: its probabilities are divided by their sum once more.
        const S factor = symmetric ? S{1} : 1 / horizontal_sum<S>(total);
        weight[b * in.n + begin + i] = factor;
        delta[b * in.n + begin + i] = factor * horizontal_sum<S>(sum);
      }
    });
  }
  const GroupSums<S> dq(*in.valid, in.batch, in.n, round_up(d, En::kPanel), En::kKeyTile, En::kRowTile);
  using State = MatrixBackwardState<En>;
  for_each<State>(dq.tasks(), [&](State& state, int64_t task) {
    state.reserve(d);
    dq.for_each_tile(task, [&](int64_t first, int64_t n, bool first_tile) {
      matrix_backward_tile<En>(state, in, out, delta, weight, dq.batch_of(task), first, n, dq.sum(task), !first_tile);
    });
  });
  dq.write(out.grad_q, in.scale);
}
