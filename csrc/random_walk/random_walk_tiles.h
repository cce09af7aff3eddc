// Tile code of `random_walk`; compiled once for each instruction set. See docs/kernels/random_walk.md.
#include "common/tile_engine.h"

// ---- Forward: a task owns a tile of queries and walks over all keys

template <class En>
struct WalkForwardState {
  using S = typename En::Scalar;
  using O = typename En::Operand;
  typename En::Session session;
  int64_t ld = 0, width = 0;
  Buffer<S> scores{0}, sums{0};           // [kRowTile, ld], [kRowTile, width]
  Buffer<O> queries{0}, probabilities{0};  // left operands
  S peak[En::kRowTile], total[En::kRowTile];

  void reserve(int64_t d, int64_t value_width) {
    if (ld != 0) return;
    ld = En::kKeyTile + En::kSkew;
    width = round_up(value_width, En::kPanel);
    scores.reset(En::kRowTile * ld);
    sums.reset(En::kRowTile * width);
    queries.reset(En::left_rows_size(En::kRowTile, d));
    probabilities.reset(En::left_tile_size(En::kRowTile, En::kKeyTile));
  }
};

// Scores [rows, n] become exp(scale * score - peak); peak, total and the sums so far follow.
template <class S>
void online_softmax(S* scores, int64_t ld, int64_t rows, int64_t n, int64_t padded, S scale, S* peak, S* total,
                    S* sums, int64_t width) {
  using V = typename Simd<S>::Vec;
  constexpr int W = kLanes<S>;
  const S infinity = std::numeric_limits<S>::infinity();
  for (int64_t i = 0; i < rows; ++i) {
    S* row = scores + i * ld;
    V high = splat(peak[i]);
    int64_t j = 0;
    for (; j + W <= n; j += W) {
      const V x = load(row + j) * scale;
      store(row + j, x);
      high = x > high ? x : high;
    }
    S best = horizontal_max<S>(high);
    for (; j < n; ++j) {
      row[j] *= scale;
      best = row[j] > best ? row[j] : best;
    }
    for (; j < padded; ++j) row[j] = -infinity;
    const S old = peak[i];
    if (best > old) {
      peak[i] = best;
      const S shrink = std::exp(old - best);
      total[i] *= shrink;
      S* sum = sums + i * width;
      for (int64_t c = 0; c < width; c += W) store(sum + c, load(sum + c) * shrink);
    }
    V part{};
    for (j = 0; j < padded; j += W) {
      const V e = vexp(load(row + j) - peak[i]);
      store(row + j, e);
      part += e;
    }
    total[i] += horizontal_sum<S>(part);
  }
}

template <class En>
void walk_forward_tile(WalkForwardState<En>& state, const WalkInput<typename En::Element, typename En::Scalar>& in,
                       const WalkStep<typename En::Element, typename En::Scalar>& step,
                       const typename En::Operand* keys, const typename En::Operand* values, int64_t b,
                       int64_t begin) {
  using S = typename En::Scalar;
  using E = typename En::Element;
  const Positions at = (*in.valid)[b];
  const int64_t d = in.q.width, rows = std::min(En::kRowTile, at.count - begin);
  state.reserve(d, step.x.width);
  const int64_t width = state.width;
  const auto q = En::left_rows(in.q.rows(b, at), begin, rows, state.queries);
  // Finite, so that scores of -inf have weight 0.
  std::fill_n(state.peak, rows, std::numeric_limits<S>::lowest());
  std::fill_n(state.total, rows, S{0});
  for (int64_t first = 0; first < at.count; first += En::kKeyTile) {
    const int64_t n = std::min(En::kKeyTile, at.count - first);
    En::multiply(q, keys, En::depth(d) * En::kPanel, rows, n, d, state.scores, state.ld, false);
    online_softmax<S>(state.scores, state.ld, rows, n, round_up(n, En::kPanel), in.scale, state.peak, state.total,
                      state.sums, first == 0 ? 0 : width);
    const auto p = En::left_tile(state.scores, state.ld, rows, n, state.probabilities);
    En::multiply(p, values, En::depth(n) * En::kPanel, rows, step.x.width, n, state.sums, width, first > 0);
    keys += En::right_transposed_size(n, d);
    values += En::right_size(n, step.x.width);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t position = at[begin + i];
    step.lse[b * in.n + position] = state.peak[i] + std::log(state.total[i]);
    const S weight = in.move / state.total[i], back = 1 - in.move;
    E* y = step.y.rows(b, at)[begin + i];
    const E* start = step.start.rows(b, at)[begin + i];
    const S* sum = state.sums + i * width;
    if (back == 0) {
      for (int64_t c = 0; c < step.x.width; ++c) y[c] = narrow_to<E>(sum[c] * weight);
    } else {
      for (int64_t c = 0; c < step.x.width; ++c) y[c] = narrow_to<E>(sum[c] * weight + widen(start[c]) * back);
    }
  }
}

template <class En>
void walk_forward(const WalkInput<typename En::Element, typename En::Scalar>& in,
                  const WalkStep<typename En::Element, typename En::Scalar>& step) {
  using O = typename En::Operand;
  const int64_t d = in.q.width, key_tiles = (in.n + En::kKeyTile - 1) / En::kKeyTile;
  const int64_t key_size = key_tiles * En::right_transposed_size(En::kKeyTile, d);
  const int64_t value_size = key_tiles * En::right_size(En::kKeyTile, step.x.width);
  Buffer<O> keys(in.batch * key_size), values(in.batch * value_size);
  struct Nothing {};
  for_each<Nothing>(in.batch * key_tiles, [&](Nothing&, int64_t task) {
    const int64_t b = task / key_tiles, tile = task % key_tiles, first = tile * En::kKeyTile;
    const Positions at = (*in.valid)[b];
    if (first >= at.count) return;
    const int64_t n = std::min(En::kKeyTile, at.count - first);
    En::pack_transposed(in.k.rows(b, at), first, n,
                        keys + b * key_size + tile * En::right_transposed_size(En::kKeyTile, d));
    En::pack(step.x.rows(b, at), first, n, values + b * value_size + tile * En::right_size(En::kKeyTile, step.x.width));
  });
  const int64_t row_tiles = (in.n + En::kRowTile - 1) / En::kRowTile;
  for_each<WalkForwardState<En>>(in.batch * row_tiles, [&](WalkForwardState<En>& state, int64_t task) {
    const int64_t b = task / row_tiles, begin = task % row_tiles * En::kRowTile;
    if (begin >= (*in.valid)[b].count) return;
    walk_forward_tile<En>(state, in, step, keys + b * key_size, values + b * value_size, b, begin);
  });
}

// ---- Backward: a task owns a group of keys and walks over all queries

template <class En>
struct WalkBackwardState {
  using S = typename En::Scalar;
  using O = typename En::Operand;
  typename En::Session session;
  int64_t ld = 0, tile = 0;
  Buffer<S> p{0}, ds{0};                     // [kRowTile, ld] P and dE
  Buffer<S> dk{0}, dv{0};                    // [tile, d], [tile, D] sums
  Buffer<O> keys_across{0}, keys{0}, values_across{0};  // right operands of the key tile
  Buffer<O> queries{0}, grads{0};                       // right operands of the query tile
  Buffer<O> left_queries{0}, left_grads{0}, left_ds{0}, left_across{0};

  void reserve(int64_t key_tile, int64_t d, int64_t width) {
    if (ld != 0) return;
    tile = key_tile;
    ld = tile + En::kSkew;
    p.reset(En::kRowTile * ld);
    ds.reset(En::kRowTile * ld);
    dk.reset(round_up(tile, En::kRowPad) * round_up(d, En::kPanel));
    dv.reset(round_up(tile, En::kRowPad) * round_up(width, En::kPanel));
    keys_across.reset(En::right_transposed_size(tile, d));
    keys.reset(En::right_size(tile, d));
    values_across.reset(En::right_transposed_size(tile, width));
    queries.reset(En::right_size(En::kRowTile, d));
    grads.reset(En::right_size(En::kRowTile, width));
    left_queries.reset(En::left_rows_size(En::kRowTile, d));
    left_grads.reset(En::left_rows_size(En::kRowTile, width));
    left_ds.reset(En::left_tile_size(En::kRowTile, tile));
    left_across.reset(En::left_tile_size(tile, En::kRowTile));
  }
};

// What one step of the backward pass reads and writes.
template <class E, class S>
struct WalkStepBackward {
  Matrix<const E> x, start;  // Y_i, V
  Matrix<const E> g;         // gradient of Y_{i+1}, or null
  const S *lse, *delta;      // [B, N]; delta = move <g, P x> - gradient of lse
  bool first, last;          // of the steps as they are processed
  Matrix<E> grad_k, grad_v;
  Matrix<S> grad_k_sum, grad_v_sum, next_g;  // with more than one step
};

template <class En>
void walk_backward_tile(WalkBackwardState<En>& state, const WalkInput<typename En::Element, typename En::Scalar>& in,
                        const WalkStepBackward<typename En::Element, typename En::Scalar>& step, int64_t b,
                        int64_t first, int64_t n, typename En::Scalar* dq, bool add) {
  using S = typename En::Scalar;
  using E = typename En::Element;
  using V = typename Simd<S>::Vec;
  constexpr int W = kLanes<S>;
  const Positions at = (*in.valid)[b];
  const int64_t d = in.q.width, width = step.x.width, ld = state.ld;
  const int64_t d_padded = round_up(d, En::kPanel), width_padded = round_up(width, En::kPanel);
  const int64_t n_padded = round_up(n, En::kPanel);
  const bool values = static_cast<bool>(step.g);
  En::pack_transposed(in.k.rows(b, at), first, n, state.keys_across);
  En::pack(in.k.rows(b, at), first, n, state.keys);
  if (values) En::pack_transposed(step.x.rows(b, at), first, n, state.values_across);

  for (int64_t begin = 0; begin < at.count; begin += En::kRowTile) {
    const int64_t rows = std::min(En::kRowTile, at.count - begin);
    const auto q = En::left_rows(in.q.rows(b, at), begin, rows, state.left_queries);
    En::multiply(q, state.keys_across, En::depth(d) * En::kPanel, rows, n, d, state.p, ld, false);
    if (values) {
      const auto g = En::left_rows(step.g.rows(b, at), begin, rows, state.left_grads);
      En::multiply(g, state.values_across, En::depth(width) * En::kPanel, rows, n, width, state.ds, ld, false);
    }
    for (int64_t i = 0; i < rows; ++i) {
      S* p = state.p + i * ld;
      S* ds = state.ds + i * ld;
      const int64_t position = b * in.n + at[begin + i];
      const S lse = step.lse[position], delta = step.delta[position];
      for (int64_t j = 0; j < n_padded; j += W) {
        const V e = vexp(load(p + j) * in.scale - lse);
        store(p + j, e);
        store(ds + j, values ? V(e * (load(ds + j) * in.move - delta)) : V(e * -delta));
      }
      for (int64_t j = n; j < n_padded; ++j) p[j] = ds[j] = 0;
    }
    const bool more = begin > 0;
    if (values) {
      En::pack(step.g.rows(b, at), begin, rows, state.grads);
      const auto p = En::left_transposed(state.p, ld, rows, n, state.left_across);
      En::multiply(p, state.grads, En::depth(rows) * En::kPanel, n, width, rows, state.dv, width_padded, more);
    }
    En::pack(in.q.rows(b, at), begin, rows, state.queries);
    const auto across = En::left_transposed(state.ds, ld, rows, n, state.left_across);
    En::multiply(across, state.queries, En::depth(rows) * En::kPanel, n, d, rows, state.dk, d_padded, more);
    const auto ds = En::left_tile(state.ds, ld, rows, n, state.left_ds);
    En::multiply(ds, state.keys, En::depth(n) * En::kPanel, rows, d, n, dq + begin * d_padded, d_padded, add);
  }

  const S back = 1 - in.move;
  for (int64_t j = 0; j < n; ++j) {
    const S* dk = state.dk + j * d_padded;
    if (step.grad_k_sum) {
      S* sum = step.grad_k_sum.rows(b, at)[first + j];
      for (int64_t c = 0; c < d; ++c) sum[c] = (step.first ? S{0} : sum[c]) + in.scale * dk[c];
    } else {
      E* out = step.grad_k.rows(b, at)[first + j];
      for (int64_t c = 0; c < d; ++c) out[c] = narrow_to<E>(in.scale * dk[c]);
    }
    if (!values) continue;
    const S* dv = state.dv + j * width_padded;
    const E* g = step.g.rows(b, at)[first + j];
    if (step.grad_v_sum) {
      S* sum = step.grad_v_sum.rows(b, at)[first + j];
      S* next = step.next_g.rows(b, at)[first + j];
      for (int64_t c = 0; c < width; ++c) {
        next[c] = in.move * dv[c];
        sum[c] = (step.first ? S{0} : sum[c]) + back * widen(g[c]) + (step.last ? next[c] : S{0});
      }
    } else {
      E* out = step.grad_v.rows(b, at)[first + j];
      for (int64_t c = 0; c < width; ++c) out[c] = narrow_to<E>(in.move * dv[c] + back * widen(g[c]));
    }
  }
}

template <class En>
void walk_backward(const WalkInput<typename En::Element, typename En::Scalar>& in,
                   const WalkBackward<typename En::Element, typename En::Scalar>& out) {
  using S = typename En::Scalar;
  using E = typename En::Element;
  const int64_t d = in.q.width, width = out.states[0].width;
  const int64_t steps = static_cast<int64_t>(out.states.size()) - 1;
  const int64_t key_tile = width > 512 ? En::kKeyTile / 2 : En::kKeyTile;
  const GroupSums<S> dq(*in.valid, in.batch, in.n, round_up(d, En::kPanel), key_tile, En::kRowTile);
  Buffer<S> delta(in.batch * in.n);
  struct Nothing {};
  constexpr int64_t kRows = 64;
  const int64_t row_blocks = (in.n + kRows - 1) / kRows;

  WalkStepBackward<E, S> step{};
  step.lse = out.lse;
  step.delta = delta;
  step.start = out.states[0];
  step.grad_k = out.grad_k;
  step.grad_v = out.grad_v;
  step.g = out.grad_y;
  for (int64_t i = steps - 1; i >= 0; --i) {
    step.first = i == steps - 1;
    step.last = i == 0;
    step.x = out.states[i];
    if constexpr (std::is_same_v<E, S>) {
      if (steps > 1) {
        step.grad_k_sum = out.grad_k;
        step.grad_v_sum = out.grad_v;
        step.next_g = out.carry[i % 2];
      }
    }
    for_each<Nothing>(in.batch * row_blocks, [&](Nothing&, int64_t task) {
      const int64_t b = task / row_blocks, begin = task % row_blocks * kRows;
      const Positions at = (*in.valid)[b];
      for (int64_t r = begin; r < std::min(begin + kRows, at.count); ++r) {
        S sum = 0;
        if (step.g) {
          const E* g = step.g.rows(b, at)[r];
          const E* y = out.states[i + 1].rows(b, at)[r];
          const E* v = step.start.rows(b, at)[r];
          // move <g, P x> = <g, y - (1 - move) v>
          const S back = 1 - in.move;
          S part[8] = {};
          for (int64_t c = 0; c < width; ++c) {
            part[c % 8] += widen(g[c]) * (back == 0 ? widen(y[c]) : widen(y[c]) - back * widen(v[c]));
          }
          for (const S x : part) sum += x;
        }
        const int64_t position = b * in.n + at[r];
        if (step.first && out.grad_lse != nullptr) sum -= out.grad_lse[position];
        delta[position] = sum;
      }
    });
    for_each<WalkBackwardState<En>>(dq.tasks(), [&](WalkBackwardState<En>& state, int64_t task) {
      state.reserve(key_tile, d, width);
      dq.for_each_tile(task, [&](int64_t first, int64_t n, bool first_tile) {
        walk_backward_tile<En>(state, in, step, dq.batch_of(task), first, n, dq.sum(task), !(first_tile && step.first));
      });
    });
    if (!step.g) break;  // the gradient of lse alone takes no further step
    if constexpr (std::is_same_v<E, S>) step.g = {out.carry[i % 2].data, in.n, width};
  }
  dq.write(out.grad_q, in.scale);
}
