// Tile code of `transition_consistency`; compiled once for each instruction set. See
// docs/kernels/transition_consistency.md.
#include "common/tile_engine.h"

// ---- Forward: a task owns a tile of queries and walks over all keys

template <class En>
struct ConsistencyForwardState {
  using S = typename En::Scalar;
  using E = typename En::Element;
  using O = typename En::Operand;
  typename En::Session session;
  int64_t ld = 0;
  Buffer<S> scores{0}, targets{0};    // [kRowTile, ld]
  Buffer<O> queries{0}, others{0};  // left operands
  // Of each row: peak and sum of exp for E and E', sum of exp(E' - peak') (E' - E), diagonal scores.
  S peak[En::kRowTile], total[En::kRowTile], peak_target[En::kRowTile], total_target[En::kRowTile];
  S gap[En::kRowTile], diagonal[En::kRowTile], diagonal_target[En::kRowTile];

  void reserve(int64_t d) {
    if (ld != 0) return;
    ld = En::kKeyTile + En::kSkew;
    scores.reset(En::kRowTile * ld);
    targets.reset(En::kRowTile * ld);
    queries.reset(En::left_rows_size(En::kRowTile, d));
    others.reset(En::left_rows_size(En::kRowTile, d));
  }
};

// Scales the scores of a row and returns their maximum, at least `peak`.
template <class S>
CC4S_INLINE S scale_row(S* row, int64_t n, int64_t padded, S scale, S peak) {
  constexpr int W = kLanes<S>;
  typename Simd<S>::Vec high = splat(peak);
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const auto x = load(row + j) * scale;
    store(row + j, x);
    high = x > high ? x : high;
  }
  S best = horizontal_max<S>(high);
  for (; j < n; ++j) {
    row[j] *= scale;
    best = row[j] > best ? row[j] : best;
  }
  // Finite, so that differences of two of them are 0; their exp is 0.
  for (; j < padded; ++j) row[j] = std::numeric_limits<S>::lowest() / 4;
  return best;
}

template <class En>
void consistency_rows(ConsistencyForwardState<En>& state, typename En::Scalar scale, int64_t rows, int64_t n) {
  using S = typename En::Scalar;
  using V = typename Simd<S>::Vec;
  const int64_t padded = round_up(n, En::kPanel);
  for (int64_t i = 0; i < rows; ++i) {
    S* x = state.scores + i * state.ld;
    S* y = state.targets + i * state.ld;
    const S peak = scale_row(x, n, padded, scale, state.peak[i]);
    const S peak_target = scale_row(y, n, padded, scale, state.peak_target[i]);
    if (peak > state.peak[i]) {
      state.total[i] *= std::exp(state.peak[i] - peak);
      state.peak[i] = peak;
    }
    if (peak_target > state.peak_target[i]) {
      const S shrink = std::exp(state.peak_target[i] - peak_target);
      state.total_target[i] *= shrink;
      state.gap[i] *= shrink;
      state.peak_target[i] = peak_target;
    }
    V total{}, total_target{}, gap{};
    for (int64_t j = 0; j < padded; j += kLanes<S>) {
      const V e = load(x + j), e_target = load(y + j);
      const V weight = vexp(e_target - peak_target);
      total += vexp(e - peak);
      total_target += weight;
      gap += weight * (e_target - e);
    }
    state.total[i] += horizontal_sum<S>(total);
    state.total_target[i] += horizontal_sum<S>(total_target);
    state.gap[i] += horizontal_sum<S>(gap);
  }
}

template <class En>
void consistency_forward_tile(ConsistencyForwardState<En>& state,
                              const ConsistencyInput<typename En::Element, typename En::Scalar>& in,
                              const ConsistencyOutput<typename En::Scalar>& out, const typename En::Operand* keys,
                              const typename En::Operand* others, int64_t b, int64_t begin) {
  using S = typename En::Scalar;
  const Positions at = (*in.valid)[b];
  const int64_t d = in.q.width, rows = std::min(En::kRowTile, at.count - begin);
  state.reserve(d);
  const auto q = En::left_rows(in.q.rows(b, at), begin, rows, state.queries);
  const auto q_target = En::left_rows(in.q_target.rows(b, at), begin, rows, state.others);
  for (S* peak : {state.peak, state.peak_target}) std::fill_n(peak, rows, std::numeric_limits<S>::lowest());
  for (S* sum : {state.total, state.total_target, state.gap}) std::fill_n(sum, rows, S{0});
  for (int64_t first = 0; first < at.count; first += En::kKeyTile) {
    const int64_t n = std::min(En::kKeyTile, at.count - first), stride = En::depth(d) * En::kPanel;
    En::multiply(q, keys, stride, rows, n, d, state.scores, state.ld, false);
    En::multiply(q_target, others, stride, rows, n, d, state.targets, state.ld, false);
    consistency_rows<En>(state, in.scale, rows, n);
    for (int64_t i = std::max<int64_t>(0, first - begin); i < std::min(rows, first + n - begin); ++i) {
      state.diagonal[i] = state.scores[i * state.ld + begin + i - first];
      state.diagonal_target[i] = state.targets[i * state.ld + begin + i - first];
    }
    keys += En::right_transposed_size(n, d);
    others += En::right_transposed_size(n, d);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t position = b * in.n + at[begin + i];
    const S lse = state.peak[i] + std::log(state.total[i]);
    const S lse_target = state.peak_target[i] + std::log(state.total_target[i]);
    out.lse[position] = lse;
    out.lse_target[position] = lse_target;
    out.kl[position] = state.gap[i] / state.total_target[i] - (lse_target - lse);
    out.diagonal[position] = std::exp(state.diagonal[i] - lse);
    out.diagonal_target[position] = std::exp(state.diagonal_target[i] - lse_target);
  }
}

template <class En>
void consistency_forward(const ConsistencyInput<typename En::Element, typename En::Scalar>& in,
                         const ConsistencyOutput<typename En::Scalar>& out) {
  using O = typename En::Operand;
  const int64_t d = in.q.width, key_tiles = (in.n + En::kKeyTile - 1) / En::kKeyTile;
  const int64_t tile_size = En::right_transposed_size(En::kKeyTile, d), size = key_tiles * tile_size;
  Buffer<O> keys(in.batch * size), others(in.batch * size);
  struct Nothing {};
  for_each<Nothing>(in.batch * key_tiles, [&](Nothing&, int64_t task) {
    const int64_t b = task / key_tiles, tile = task % key_tiles, first = tile * En::kKeyTile;
    const Positions at = (*in.valid)[b];
    if (first >= at.count) return;
    const int64_t n = std::min(En::kKeyTile, at.count - first);
    En::pack_transposed(in.k.rows(b, at), first, n, keys + b * size + tile * tile_size);
    En::pack_transposed(in.k_target.rows(b, at), first, n, others + b * size + tile * tile_size);
  });
  const int64_t row_tiles = (in.n + En::kRowTile - 1) / En::kRowTile;
  using State = ConsistencyForwardState<En>;
  for_each<State>(in.batch * row_tiles, [&](State& state, int64_t task) {
    const int64_t b = task / row_tiles, begin = task % row_tiles * En::kRowTile;
    if (begin >= (*in.valid)[b].count) return;
    consistency_forward_tile<En>(state, in, out, keys + b * size, others + b * size, b, begin);
  });
}

// ---- Backward: a task owns a group of keys and walks over all queries

template <class En>
struct ConsistencyBackwardState {
  using S = typename En::Scalar;
  using O = typename En::Operand;
  typename En::Session session;
  int64_t ld = 0;
  Buffer<S> scores{0}, targets{0}, dk{0};                 // [kRowTile, ld], [kRowTile, ld], [kKeyTile, d]
  Buffer<O> keys_across{0}, others_across{0}, keys{0};  // right operands of the key tile
  Buffer<O> queries{0}, left_queries{0}, left_others{0}, left_ds{0}, left_across{0};

  void reserve(int64_t d) {
    if (ld != 0) return;
    ld = En::kKeyTile + En::kSkew;
    scores.reset(En::kRowTile * ld);
    targets.reset(En::kRowTile * ld);
    dk.reset(En::kKeyTile * round_up(d, En::kPanel));
    keys_across.reset(En::right_transposed_size(En::kKeyTile, d));
    others_across.reset(En::right_transposed_size(En::kKeyTile, d));
    keys.reset(En::right_size(En::kKeyTile, d));
    queries.reset(En::right_size(En::kRowTile, d));
    left_queries.reset(En::left_rows_size(En::kRowTile, d));
    left_others.reset(En::left_rows_size(En::kRowTile, d));
    left_ds.reset(En::left_tile_size(En::kRowTile, En::kKeyTile));
    left_across.reset(En::left_tile_size(En::kKeyTile, En::kRowTile));
  }
};

template <class En>
void consistency_backward_tile(ConsistencyBackwardState<En>& state,
                               const ConsistencyInput<typename En::Element, typename En::Scalar>& in,
                               const ConsistencyBackward<typename En::Element, typename En::Scalar>& out, int64_t b,
                               int64_t first, int64_t n, typename En::Scalar* dq, bool add) {
  using S = typename En::Scalar;
  using E = typename En::Element;
  using V = typename Simd<S>::Vec;
  constexpr int W = kLanes<S>;
  const Positions at = (*in.valid)[b];
  const int64_t d = in.q.width, ld = state.ld, n_padded = round_up(n, En::kPanel), width = round_up(d, En::kPanel);
  const int64_t stride = En::depth(d) * En::kPanel;
  const S grad_trace = out.grad_trace != nullptr ? out.grad_trace[b] : S{0};
  En::pack_transposed(in.k.rows(b, at), first, n, state.keys_across);
  En::pack_transposed(in.k_target.rows(b, at), first, n, state.others_across);
  En::pack(in.k.rows(b, at), first, n, state.keys);

  for (int64_t begin = 0; begin < at.count; begin += En::kRowTile) {
    const int64_t rows = std::min(En::kRowTile, at.count - begin);
    const auto q = En::left_rows(in.q.rows(b, at), begin, rows, state.left_queries);
    En::multiply(q, state.keys_across, stride, rows, n, d, state.scores, ld, false);
    if (out.grad_kl != nullptr) {
      const auto q_target = En::left_rows(in.q_target.rows(b, at), begin, rows, state.left_others);
      En::multiply(q_target, state.others_across, stride, rows, n, d, state.targets, ld, false);
    }
    for (int64_t i = 0; i < rows; ++i) {
      S* x = state.scores + i * ld;
      const S* y = state.targets + i * ld;
      const int64_t position = b * in.n + at[begin + i];
      const S lse = out.lse[position], on_diagonal = grad_trace * out.diagonal[position];
      if (out.grad_kl != nullptr) {
        const S g = out.grad_kl[position], lse_target = out.lse_target[position];
        for (int64_t j = 0; j < n_padded; j += W) {
          const V p = vexp(load(x + j) * in.scale - lse), target = vexp(load(y + j) * in.scale - lse_target);
          store(x + j, V(g * (p - target) - on_diagonal * p));
        }
      } else {
        for (int64_t j = 0; j < n_padded; j += W) {
          store(x + j, V(-on_diagonal * vexp(load(x + j) * in.scale - lse)));
        }
      }
      for (int64_t j = n; j < n_padded; ++j) x[j] = 0;
      const int64_t own = begin + i - first;
      if (own >= 0 && own < n) x[own] += on_diagonal;
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
void consistency_backward(const ConsistencyInput<typename En::Element, typename En::Scalar>& in,
                          const ConsistencyBackward<typename En::Element, typename En::Scalar>& out) {
  using S = typename En::Scalar;
  const int64_t d = in.q.width;
  const GroupSums<S> dq(*in.valid, in.batch, in.n, round_up(d, En::kPanel), En::kKeyTile, En::kRowTile);
  using State = ConsistencyBackwardState<En>;
  for_each<State>(dq.tasks(), [&](State& state, int64_t task) {
    state.reserve(d);
    dq.for_each_tile(task, [&](int64_t first, int64_t n, bool first_tile) {
      consistency_backward_tile<En>(state, in, out, dq.batch_of(task), first, n, dq.sum(task), !first_tile);
    });
  });
  dq.write(out.grad_q, in.scale);
}
