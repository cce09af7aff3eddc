// The pass over the rows of one strip, forward or backward.
//
// Rows of an image are copied into [C, width] with margins of zeros, whatever their dtype and strides; a strip keeps
// the two or three rows that its pairs need. Lanes are adjacent pixels, so that a sum over classes has no horizontal
// step. A pair belongs to its upper or left pixel. Backward, what a pair's relaxation gives to its ends is kept for
// two rows, and each pixel gathers from all of its neighbours.
template <typename T>
class GridPass {
  using V = typename Lanes<T>::Vector;
  static constexpr int kLanes = Lanes<T>::count;

  // [C, stride] and what each pixel has alone [stride]; pixel x stands at kLanes + x.
  struct Row {
    std::vector<T> prob, own;
    int64_t image = -1, y = -1;
  };
  // Derivatives of the pairs of one row, each [D, stride]: see Relaxed.
  struct Pairs {
    std::vector<T> slope, near, far;
  };

 public:
  explicit GridPass(GridProblem<T>& problem)
      : p_(problem),
        directions_(static_cast<int>(problem.directions)),
        blocks_((problem.width + kLanes - 1) / kLanes),
        stride_((blocks_ + 2) * kLanes),
        own_(own_of(problem.relaxation)),
        weights_(directions_ * stride_, T{0}),
        zeros_(new_row()) {
    for (Row& row : rows_) row = new_row();
    if (!backward()) return;
    for (Pairs& pairs : pairs_) {
      for (auto* line : {&pairs.slope, &pairs.near, &pairs.far}) line->assign(directions_ * stride_, T{0});
    }
    if (p_.prob_gradient != nullptr) gradient_.assign(problem.classes * stride_, T{0});
  }

  // Task i is strip i % strips of image or group i / strips.
  void run(int64_t task) {
    const int64_t strips = static_cast<int64_t>(p_.strips.size()), group = p_.group();
    const Strip& strip = p_.strips[task % strips];
    const int64_t first = task / strips * group;
    if (!backward()) {
      forward(first, strip, p_.sums[task]);
      return;
    }
    if (p_.weight_gradient != nullptr) {
      weight_gradient_.assign((strip.end - strip.begin) * directions_ * stride_, T{0});
    }
    for (int64_t b = first; b < first + group; ++b) backward(b, strip);
    if (p_.weight_gradient != nullptr) write_weight_gradient(first / group, strip);
  }

 private:
  bool backward() const { return !p_.factors.empty(); }

  Row new_row() const {
    Row row;
    row.prob.assign(p_.classes * stride_, T{0});
    row.own.assign(stride_, T{0});
    return row;
  }

  // Row y of image b; zeros outside of it. Valid until two other rows were asked for.
  const Row& row_of(int64_t b, int64_t y) {
    if (y < 0 || y >= p_.height) return zeros_;
    Row& row = rows_[y % 3];
    if (row.image == b && row.y == y) return row;
    row.image = b;
    row.y = y;
    const int64_t* strides = p_.prob.strides;
    read_lines(p_.prob, b * strides[0] + y * strides[2], p_.classes, strides[1], p_.width, strides[3],
               row.prob.data() + kLanes, stride_);
    if (own_ == Own::kNothing) return row;
    for (int64_t x = kLanes; x < stride_ - kLanes; x += kLanes) {
      V sum{};
      for (int64_t c = 0; c < p_.classes; ++c) {
        const V p = load<V>(row.prob.data() + c * stride_ + x);
        sum = add_product(sum, p, own_ == Own::kSquare ? p : T{1} - p);
      }
      store(row.own.data() + x, sum);
    }
    return row;
  }

  // The weights of the pairs of row y, 0 where a pair leaves the grid.
  void read_weights(int64_t b, int64_t y) {
    const int64_t image = p_.weight_batch == 1 ? 0 : b;
    const int64_t* strides = p_.weight.strides;
    for (int d = 0; d < directions_; ++d) {
      T* line = weights_.data() + d * stride_ + kLanes;
      if (y + kDown[d] >= p_.height) {
        std::fill(line, line + p_.width, T{0});
        continue;
      }
      read_lines(p_.weight, image * strides[0] + d * strides[1] + y * strides[2], 1, 0, p_.width, strides[3], line, 0);
      if (kRight[d] > 0) line[p_.width - 1] = T{0};
      if (kRight[d] < 0) line[0] = T{0};
    }
  }

  // Sums over classes of the pairs of a block, in D directions: of p q, or of (p - q)^2.
  template <int D, bool differences>
  void products(const Row& row, const Row& below, int64_t at, V* out) const {
    V sums[D] = {};
    const T *here = row.prob.data() + at, *under = below.prob.data() + at;
    for (int64_t c = 0; c < p_.classes; ++c, here += stride_, under += stride_) {
      const V p = load<V>(here);
      for (int d = 0; d < D; ++d) {
        const V q = load<V>((kDown[d] ? under : here) + kRight[d]);
        sums[d] = differences ? add_square(sums[d], p - q) : add_product(sums[d], p, q);
      }
    }
    for (int d = 0; d < D; ++d) out[d] = sums[d];
  }

  void products(const Row& row, const Row& below, int64_t at, V* out) const {
    const bool differences = by_differences(p_.relaxation);
    if (directions_ == 2) {
      differences ? products<2, true>(row, below, at, out) : products<2, false>(row, below, at, out);
    } else {
      differences ? products<4, true>(row, below, at, out) : products<4, false>(row, below, at, out);
    }
  }

  Relaxed<V> relaxed(const Row& row, const Row& below, int64_t at, int d, V product) const {
    const Row& other = kDown[d] ? below : row;
    return relax<T>(p_.relaxation, product, load<V>(row.own.data() + at), load<V>(other.own.data() + at + kRight[d]));
  }

  // ---- Forward

  void forward(int64_t b, const Strip& strip, Sums& out) {
    for (int64_t y = strip.begin; y < strip.end; ++y) {
      const Row &row = row_of(b, y), &below = row_of(b, y + 1);
      read_weights(b, y);
      V energy{}, weight{}, square{};
      for (int64_t at = kLanes; at < stride_ - kLanes; at += kLanes) {
        V product[kDirections];
        products(row, below, at, product);
        for (int d = 0; d < directions_; ++d) {
          const V w = load<V>(weights_.data() + d * stride_ + at);
          energy += w * relaxed(row, below, at, d, product[d]).value;
          weight += w;
          square += w * w;
        }
      }
      out.add({static_cast<double>(sum_of(energy)), static_cast<double>(sum_of(weight)),
               static_cast<double>(sum_of(square))});
    }
  }

  // ---- Backward

  void backward(int64_t b, const Strip& strip) {
    const bool prob_needed = p_.prob_gradient != nullptr;
    // The row above is another strip's; here only its pairs with this strip count.
    if (prob_needed) derive_pairs(b, strip.begin - 1, nullptr);
    for (int64_t y = strip.begin; y < strip.end; ++y) {
      T* to = p_.weight_gradient == nullptr
                  ? nullptr
                  : weight_gradient_.data() + (y - strip.begin) * directions_ * stride_;
      derive_pairs(b, y, to);
      if (prob_needed) write_prob_gradient(b, y);
    }
  }

  Pairs& pairs_of(int64_t y) { return pairs_[(y + 2) % 2]; }

  // Derivatives of the pairs of row y, and, unless it is null, their weights' gradient added to `to`.
  void derive_pairs(int64_t b, int64_t y, T* to) {
    Pairs& pairs = pairs_of(y);
    if (y < 0) {
      for (auto* line : {&pairs.slope, &pairs.near, &pairs.far}) std::fill(line->begin(), line->end(), T{0});
      return;
    }
    const Row &row = row_of(b, y), &below = row_of(b, y + 1);
    const Factors<T>& factors = p_.factors[b];
    read_weights(b, y);
    // The quadratic relaxation is linear in its derivative: nothing of the pair is needed.
    const bool constant = p_.relaxation == Relaxation::kQuadratic && to == nullptr;
    for (int64_t at = kLanes; at < stride_ - kLanes; at += kLanes) {
      V product[kDirections];
      if (!constant) products(row, below, at, product);
      for (int d = 0; d < directions_; ++d) {
        const int64_t place = d * stride_ + at;
        const V w = load<V>(weights_.data() + place), k = w * factors.slope;
        if (constant) {
          store(pairs.slope.data() + place, k);
          continue;
        }
        const Relaxed<V> r = relaxed(row, below, at, d, product[d]);
        store(pairs.slope.data() + place, k * r.slope);
        if (own_ == Own::kSquare) {
          store(pairs.near.data() + place, k * r.near);
          store(pairs.far.data() + place, k * r.far);
        }
        if (to != nullptr) {
          const V gradient = factors.slope * r.value - (factors.shift + factors.shift_by_weight * w);
          store(to + place, load<V>(to + place) + gradient);
        }
      }
    }
  }

  const T* line_of(int64_t y, std::vector<T> Pairs::* which, int d, int64_t at) {
    return (pairs_of(y).*which).data() + d * stride_ + at;
  }

  // Sums over the pairs of each pixel of a block: of `mine` where the pair is its own, of `others` elsewhere.
  V gathered(int64_t y, int64_t at, std::vector<T> Pairs::* mine, std::vector<T> Pairs::* others) {
    V sum{};
    for (int d = 0; d < directions_; ++d) {
      sum += load<V>(line_of(y, mine, d, at)) + load<V>(line_of(y - kDown[d], others, d, at - kRight[d]));
    }
    return sum;
  }

  // The gradient of row y from the pairs of its own and of the row above.
  void write_prob_gradient(int64_t b, int64_t y) {
    const Row* rows[3] = {&row_of(b, y - 1), &row_of(b, y), &row_of(b, y + 1)};
    const bool eight = directions_ == 4;
    for (int64_t at = kLanes; at < stride_ - kLanes; at += kLanes) {
      V base{};
      if (own_ == Own::kSquare) base = gathered(y, at, &Pairs::near, &Pairs::far);
      if (own_ == Own::kSpread) base = gathered(y, at, &Pairs::slope, &Pairs::slope) * T{-0.5};
      if (p_.relaxation == Relaxation::kQuadratic || own_ == Own::kSpread) {
        eight ? gather<4, true>(rows, y, at, base) : gather<2, true>(rows, y, at, base);
      } else {
        eight ? gather<4, false>(rows, y, at, base) : gather<2, false>(rows, y, at, base);
      }
    }
    write_lines(gradient_.data() + kLanes, stride_, p_.classes, p_.width, p_.prob_gradient, p_.prob.dtype,
                (b * p_.classes * p_.height + y) * p_.width, p_.height * p_.width);
  }

  // All classes of a block: base + sum of slope (p - q), or base p + sum of slope q, over the neighbours q.
  template <int D, bool differences>
  void gather(const Row* const* rows, int64_t y, int64_t at, V base) {
    V slope[2 * D];
    const T* neighbours[2 * D];
    for (int d = 0; d < D; ++d) {
      slope[d] = load<V>(line_of(y, &Pairs::slope, d, at));
      slope[D + d] = load<V>(line_of(y - kDown[d], &Pairs::slope, d, at - kRight[d]));
      neighbours[d] = rows[1 + kDown[d]]->prob.data() + at + kRight[d];
      neighbours[D + d] = rows[1 - kDown[d]]->prob.data() + at - kRight[d];
    }
    const T* here = rows[1]->prob.data() + at;
    T* to = gradient_.data() + at;
    for (int64_t i = 0; i < p_.classes * stride_; i += stride_) {
      const V p = load<V>(here + i);
      V sum = differences ? base : base * p;
      for (int n = 0; n < 2 * D; ++n) {
        const V q = load<V>(neighbours[n] + i);
        sum += slope[n] * (differences ? p - q : q);
      }
      store(to + i, sum);
    }
  }

  void write_weight_gradient(int64_t image, const Strip& strip) {
    for (int64_t y = strip.begin; y < strip.end; ++y) {
      for (int d = 0; d < directions_; ++d) {
        T* line = weight_gradient_.data() + ((y - strip.begin) * directions_ + d) * stride_ + kLanes;
        // Pairs that leave the grid.
        if (y + kDown[d] >= p_.height) std::fill(line, line + p_.width, T{0});
        if (kRight[d] > 0) line[p_.width - 1] = T{0};
        if (kRight[d] < 0) line[0] = T{0};
        write_lines(line, 0, 1, p_.width, p_.weight_gradient, p_.weight.dtype,
                    ((image * directions_ + d) * p_.height + y) * p_.width, 0);
      }
    }
  }

  GridProblem<T>& p_;
  const int directions_;
  const int64_t blocks_, stride_;
  const Own own_;
  std::vector<T> weights_;  // [D, stride]
  Row zeros_, rows_[3];
  Pairs pairs_[2];
  std::vector<T> gradient_;         // [C, stride]
  std::vector<T> weight_gradient_;  // [rows of the strip, D, stride]
};

template <typename T>
void run_tasks(GridProblem<T>& problem, int64_t begin, int64_t end) {
  GridPass<T> pass(problem);
  for (int64_t i = begin; i < end; ++i) pass.run(i);
}
