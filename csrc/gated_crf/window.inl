// The pass over the rows of one strip, forward or backward.
//
// Rows of an image are copied into [C, stride] with margins as wide as the window, whatever their dtype and strides, and
// stay as long as a window reaches them. Lanes are adjacent pixels, so that a sum over classes has no horizontal step.
// Pixels outside of the image have closed gates. Forward, a pair is computed once, by its upper or left pixel;
// backward, each pixel gathers from its whole window: the kernel is symmetric.
template <typename T>
class WindowPass {
  using V = typename Lanes<T>::Vector;
  static constexpr int kLanes = Lanes<T>::count;
  // Offsets along a row whose sums are in registers at once, and classes whose gradients are.
  static constexpr int kRun = 6, kClasses = 8;

  // Lines of `stride_`; pixel x stands at margin_ + x.
  struct Row {
    std::vector<T> prob, color, source, destination;
    int64_t image = -1, y = -1;
  };

 public:
  explicit WindowPass(Problem<T>& problem)
      : p_(problem),
        radius_(problem.radius),
        side_(2 * problem.radius + 1),
        margin_((problem.radius + kLanes - 1) / kLanes * kLanes),
        stride_((problem.width + kLanes - 1) / kLanes * kLanes + 2 * margin_),
        zeros_(new_row()) {
    for (int64_t i = 0; i < side_; ++i) rows_.push_back(new_row());
    if (!backward()) return;
    weights_.resize(side_ * side_ * kLanes);
    gradient_.assign(problem.classes * stride_, T{0});
  }

  // Task i is strip i % strips of image i / strips.
  void run(int64_t task) {
    const int64_t strips = static_cast<int64_t>(p_.strips.size()), b = task / strips;
    const Strip& strip = p_.strips[task % strips];
    for (int64_t y = strip.begin; y < strip.end; ++y) {
      if (backward()) {
        write_gradient(b, y);
      } else {
        add_energy(b, y, p_.sums[task]);
      }
    }
  }

 private:
  bool backward() const { return !p_.factors.empty(); }

  Row new_row() const {
    Row row;
    row.prob.assign(p_.classes * stride_, T{0});
    row.color.assign(p_.channels * stride_, T{0});
    row.source.assign(stride_, T{0});
    row.destination.assign(stride_, T{0});
    return row;
  }

  // Row y of image b; closed gates outside of it. Valid until a row 2 radius + 1 away is asked for.
  const Row& row_of(int64_t b, int64_t y) {
    if (y < 0 || y >= p_.height) return zeros_;
    Row& row = rows_[y % side_];
    if (row.image == b && row.y == y) return row;
    row.image = b;
    row.y = y;
    read(p_.prob, p_.classes, b, y, row.prob);
    read(p_.color, p_.channels, b, y, row.color);
    read(p_.source, b, y, row.source);
    read(p_.destination, b, y, row.destination);
    return row;
  }

  void read(const Array& array, int64_t lines, int64_t b, int64_t y, std::vector<T>& to) const {
    const int64_t* strides = array.strides;
    read_lines(array, b * strides[0] + y * strides[2], lines, strides[1], p_.width, strides[3], to.data() + margin_,
               stride_);
  }

  void read(const Gate& gate, int64_t b, int64_t y, std::vector<T>& to) const {
    const bool* from = gate.data == nullptr ? nullptr : gate.data + b * gate.strides.batch + y * gate.strides.row;
    for (int64_t x = 0; x < p_.width; ++x) {
      to[margin_ + x] = from == nullptr || from[x * gate.strides.column] ? T{1} : T{0};
    }
  }

  // Sums over lines of a block of pixels and D blocks beside `there`: of products, or of squared differences.
  template <int D, bool differences>
  void sums(const T* here, const T* there, int64_t lines, V* out) const {
    V sums[D] = {};
    for (int64_t i = 0; i < lines; ++i, here += stride_, there += stride_) {
      const V p = load<V>(here);
      for (int d = 0; d < D; ++d) {
        const V q = load<V>(there + d);
        sums[d] += differences ? (p - q) * (p - q) : p * q;
      }
    }
    for (int d = 0; d < D; ++d) out[d] = sums[d];
  }

  // Weights of the pairs of a block at `at` with D blocks dy rows and dx, dx + 1, ... columns away, both directions.
  template <int D>
  void pair_weights(const Row& row, const Row& other, int64_t at, int64_t dy, int64_t dx, V* out) const {
    sums<D, true>(row.color.data() + at, other.color.data() + at + dx, p_.channels, out);
    const V source = load<V>(row.source.data() + at), destination = load<V>(row.destination.data() + at);
    for (int d = 0; d < D; ++d) {
      const T distance = static_cast<T>(dy * dy + (dx + d) * (dx + d)) * p_.falloff;
      const V gates = destination * load<V>(other.source.data() + at + dx + d) +
                      source * load<V>(other.destination.data() + at + dx + d);
      out[d] = exp_nonpositive(out[d] * T{-0.5} - distance) * gates;
    }
  }

  // The pairs of a block with D blocks: sum of w (1 - p.q).
  template <int D>
  V energy(const Row& row, const Row& other, int64_t at, int64_t dy, int64_t dx) const {
    V weights[D], dots[D], sum{};
    pair_weights<D>(row, other, at, dy, dx, weights);
    sums<D, false>(row.prob.data() + at, other.prob.data() + at + dx, p_.classes, dots);
    for (int d = 0; d < D; ++d) sum += weights[d] * (T{1} - dots[d]);
    return sum;
  }

  V energy(int64_t count, const Row& row, const Row& other, int64_t at, int64_t dy, int64_t dx) const {
    switch (count) {
      case 1:
        return energy<1>(row, other, at, dy, dx);
      case 2:
        return energy<2>(row, other, at, dy, dx);
      case 3:
        return energy<3>(row, other, at, dy, dx);
      case 4:
        return energy<4>(row, other, at, dy, dx);
      case 5:
        return energy<5>(row, other, at, dy, dx);
      default:
        return energy<kRun>(row, other, at, dy, dx);
    }
  }

  void pair_weights(int64_t count, const Row& row, const Row& other, int64_t at, int64_t dy, int64_t dx,
                    V* out) const {
    switch (count) {
      case 1:
        return pair_weights<1>(row, other, at, dy, dx, out);
      case 2:
        return pair_weights<2>(row, other, at, dy, dx, out);
      case 3:
        return pair_weights<3>(row, other, at, dy, dx, out);
      case 4:
        return pair_weights<4>(row, other, at, dy, dx, out);
      case 5:
        return pair_weights<5>(row, other, at, dy, dx, out);
      default:
        return pair_weights<kRun>(row, other, at, dy, dx, out);
    }
  }

  int64_t end_of_blocks() const { return stride_ - margin_; }

  // ---- Forward

  void add_energy(int64_t b, int64_t y, double& out) {
    for (int64_t dy = 0; dy <= radius_; ++dy) row_of(b, y + dy);
    const Row& row = row_of(b, y);
    for (int64_t at = margin_; at < end_of_blocks(); at += kLanes) {
      V sum{};
      for (int64_t dy = 0; dy <= radius_ && y + dy < p_.height; ++dy) {
        const Row& other = row_of(b, y + dy);
        for (int64_t dx = dy == 0 ? 1 : -radius_; dx <= radius_; dx += kRun) {
          sum += energy(std::min<int64_t>(kRun, radius_ - dx + 1), row, other, at, dy, dx);
        }
      }
      // 2r(r+1) terms in a lane, then float64: as exact as a pairwise sum.
      out += static_cast<double>(sum_of(sum));
    }
  }

  // ---- Backward

  void write_gradient(int64_t b, int64_t y) {
    std::vector<const Row*> window(static_cast<size_t>(side_));
    for (int64_t i = 0; i < side_; ++i) window[i] = &row_of(b, y + i - radius_);
    const Row& row = *window[radius_];
    for (int64_t at = margin_; at < end_of_blocks(); at += kLanes) {
      for (int64_t i = 0; i < side_; ++i) {
        for (int64_t dx = -radius_; dx <= radius_; dx += kRun) {
          const int64_t count = std::min<int64_t>(kRun, radius_ - dx + 1);
          V weights[kRun];
          pair_weights(count, row, *window[i], at, i - radius_, dx, weights);
          T* to = weights_.data() + (i * side_ + dx + radius_) * kLanes;
          for (int64_t d = 0; d < count; ++d) store(to + d * kLanes, weights[d]);
        }
      }
      // A pixel is no pair with itself.
      store(weights_.data() + side_ * side_ / 2 * kLanes, V{});
      int64_t c = 0;
      for (; c + kClasses <= p_.classes; c += kClasses) gather<kClasses>(window, at, c, p_.factors[b]);
      for (; c + 4 <= p_.classes; c += 4) gather<4>(window, at, c, p_.factors[b]);
      for (; c < p_.classes; ++c) gather<1>(window, at, c, p_.factors[b]);
    }
    write_lines(gradient_.data() + margin_, stride_, p_.classes, p_.width, p_.gradient, p_.prob.dtype,
                (b * p_.classes * p_.height + y) * p_.width, p_.height * p_.width);
  }

  // G classes from c on of a block.
  template <int G>
  void gather(const std::vector<const Row*>& window, int64_t at, int64_t c, T factor) {
    V sums[G] = {};
    const T* weight = weights_.data();
    for (const Row* row : window) {
      const T* there = row->prob.data() + c * stride_ + at - radius_;
      for (int64_t dx = 0; dx < side_; ++dx, weight += kLanes) {
        const V w = load<V>(weight);
        for (int g = 0; g < G; ++g) sums[g] += w * load<V>(there + g * stride_ + dx);
      }
    }
    for (int g = 0; g < G; ++g) store(gradient_.data() + (c + g) * stride_ + at, sums[g] * -factor);
  }

  Problem<T>& p_;
  const int64_t radius_, side_, margin_, stride_;
  Row zeros_;
  std::vector<Row> rows_;
  std::vector<T> weights_;   // [side, side, kLanes] of a block
  std::vector<T> gradient_;  // [C, stride]
};

template <typename T>
void run_tasks(Problem<T>& problem, int64_t begin, int64_t end) {
  WindowPass<T> pass(problem);
  for (int64_t i = begin; i < end; ++i) pass.run(i);
}
