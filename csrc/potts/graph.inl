// The pass over the edges of one image, forward or backward, in their order and by one thread.
//
// Rows of probabilities are copied into [K, padded C], whatever their dtype and strides. Edges are taken as many at a
// time as a vector has lanes: sums over classes one by one, the relaxation of all of them at once.
template <typename T>
class GraphPass {
  using V = typename Lanes<T>::Vector;
  static constexpr int kLanes = Lanes<T>::count;

 public:
  explicit GraphPass(GraphProblem<T>& problem)
      : p_(problem),
        padded_((problem.classes + kLanes - 1) / kLanes * kLanes),
        own_of_(own_of(problem.relaxation)),
        prob_(problem.nodes * padded_, T{0}),
        own_(problem.nodes, T{0}) {}

  void run(int64_t b) {
    read_nodes(b);
    if (p_.factors.empty()) {
      forward(b);
    } else {
      backward(b);
    }
  }

 private:
  // As many edges as a vector has lanes; behind the last one (0, 0) with weight 0.
  struct Chunk {
    int64_t first[kLanes] = {}, second[kLanes] = {};
    T weight[kLanes] = {};
    int count = 0;
  };

  void read_nodes(int64_t b) {
    const int64_t* strides = p_.prob.strides;
    read_lines(p_.prob, b * strides[0], p_.nodes, strides[1], p_.classes, strides[2], prob_.data(), padded_);
    if (own_of_ == Own::kNothing) return;
    for (int64_t k = 0; k < p_.nodes; ++k) {
      const T* row = prob_.data() + k * padded_;
      V sum{};
      for (int64_t c = 0; c < padded_; c += kLanes) {
        const V p = load<V>(row + c);
        sum = add_product(sum, p, own_of_ == Own::kSquare ? p : T{1} - p);
      }
      own_[k] = sum_of(sum);
    }
  }

  Chunk read_edges(int64_t b, int64_t e) const {
    Chunk chunk;
    chunk.count = static_cast<int>(std::min<int64_t>(kLanes, p_.edges - e));
    const int64_t* first = p_.ends + b * p_.end_strides[0] + e * p_.end_strides[2];
    for (int l = 0; l < chunk.count; ++l) {
      chunk.first[l] = first[l * p_.end_strides[2]];
      chunk.second[l] = first[l * p_.end_strides[2] + p_.end_strides[1]];
    }
    const int64_t* strides = p_.weight.strides;
    read_lines(p_.weight, b * strides[0] + e * strides[1], 1, 0, chunk.count, strides[1], chunk.weight, 0);
    return chunk;
  }

  Relaxed<V> relaxed(const Chunk& chunk) const {
    const bool differences = by_differences(p_.relaxation);
    T product[kLanes], p_own[kLanes], q_own[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const T *p = prob_.data() + chunk.first[l] * padded_, *q = prob_.data() + chunk.second[l] * padded_;
      V sum{};
      for (int64_t c = 0; c < padded_; c += kLanes) {
        const V a = load<V>(p + c), b = load<V>(q + c);
        sum = differences ? add_square(sum, a - b) : add_product(sum, a, b);
      }
      product[l] = sum_of(sum);
      p_own[l] = own_[chunk.first[l]];
      q_own[l] = own_[chunk.second[l]];
    }
    return relax<T>(p_.relaxation, load<V>(product), load<V>(p_own), load<V>(q_own));
  }

  void forward(int64_t b) {
    Sums& sums = p_.sums[b];
    for (int64_t e = 0; e < p_.edges; e += kLanes) {
      const Chunk chunk = read_edges(b, e);
      const V w = load<V>(chunk.weight);
      sums.add({static_cast<double>(sum_of(w * relaxed(chunk).value)), static_cast<double>(sum_of(w)),
                static_cast<double>(sum_of(w * w))});
    }
  }

  void backward(int64_t b) {
    const Factors<T>& factors = p_.factors[b];
    const bool prob_needed = p_.prob_gradient != nullptr, weight_needed = p_.weight_gradient != nullptr;
    if (prob_needed) gradient_.assign(p_.nodes * padded_, T{0});
    // The quadratic relaxation is linear in its derivative: nothing of the pair is needed.
    const bool constant = p_.relaxation == Relaxation::kQuadratic && !weight_needed;
    for (int64_t e = 0; e < p_.edges; e += kLanes) {
      const Chunk chunk = read_edges(b, e);
      const V w = load<V>(chunk.weight), k = w * factors.slope;
      Relaxed<V> r{V{}, V{} + T{1}, V{}, V{}};
      if (!constant) r = relaxed(chunk);
      if (weight_needed) {
        T gradient[kLanes];
        store(gradient, factors.slope * r.value - (factors.shift + factors.shift_by_weight * w));
        write_lines(gradient, 0, 1, chunk.count, p_.weight_gradient, p_.weight.dtype, b * p_.edges + e, 0);
      }
      if (prob_needed) scatter(chunk, k * r.slope, k * r.near, k * r.far);
    }
    if (!prob_needed) return;
    write_lines(gradient_.data(), padded_, p_.nodes, p_.classes, p_.prob_gradient, p_.prob.dtype,
                b * p_.nodes * p_.classes, p_.classes);
  }

  // Adds the gradients of both ends of each edge, one edge after the other.
  void scatter(const Chunk& chunk, V slope, V near, V far) {
    const bool differences = p_.relaxation == Relaxation::kQuadratic || own_of_ == Own::kSpread;
    const V half = own_of_ == Own::kSpread ? slope * T{0.5} : V{};
    for (int l = 0; l < chunk.count; ++l) {
      const int64_t i = chunk.first[l] * padded_, j = chunk.second[l] * padded_;
      const T *p = prob_.data() + i, *q = prob_.data() + j;
      T *p_gradient = gradient_.data() + i, *q_gradient = gradient_.data() + j;
      for (int64_t c = 0; c < padded_; c += kLanes) {
        const V a = load<V>(p + c), b = load<V>(q + c);
        const V to_p = differences ? slope[l] * (a - b) - half[l] : slope[l] * b + near[l] * a;
        const V to_q = differences ? slope[l] * (b - a) - half[l] : slope[l] * a + far[l] * b;
        // One after the other: an edge may have one end only.
        store(p_gradient + c, load<V>(p_gradient + c) + to_p);
        store(q_gradient + c, load<V>(q_gradient + c) + to_q);
      }
    }
  }

  GraphProblem<T>& p_;
  const int64_t padded_;
  const Own own_of_;
  std::vector<T> prob_;      // [K, padded C]
  std::vector<T> own_;       // [K]
  std::vector<T> gradient_;  // [K, padded C]
};

template <typename T>
void run_tasks(GraphProblem<T>& problem, int64_t begin, int64_t end) {
  GraphPass<T> pass(problem);
  for (int64_t i = begin; i < end; ++i) pass.run(i);
}
