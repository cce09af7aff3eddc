// The pass over one strip of one image, forward or backward.
//
// Blocks of as many pixels of a row as a vector has lanes; all classes of a block stay in the L1 cache. For the rows
// between two rows of logits a block's columns are interpolated once (`top`, `slope`), so that each pixel and class
// costs one multiply-add; the gradient of these two rows is likewise kept at full width, [block, C, lane], and
// is brought to the logits' columns once per row of logits.

// One row of a map as `To`, with `count` entries of `fill` after the last pixel.
template <typename From, typename To>
inline void copy_row(const PixelMap& map, int64_t b, int64_t y, int64_t width, To* __restrict to) {
  const From* __restrict from = static_cast<const From*>(map.data) + b * map.batch_stride + y * map.row_stride;
  if (map.column_stride == 1) {
    for (int64_t x = 0; x < width; ++x) to[x] = static_cast<To>(from[x]);
  } else {
    for (int64_t x = 0; x < width; ++x) to[x] = static_cast<To>(from[x * map.column_stride]);
  }
}

template <typename T>
inline void copy_weights(const PixelMap& map, int64_t b, int64_t y, int64_t width, T* to) {
  if (map.data == nullptr) {
    std::fill(to, to + width, T{1});
  } else if (map.dtype == ScalarType::Bool) {
    copy_row<uint8_t>(map, b, y, width, to);
  } else if (map.dtype == ScalarType::Double) {
    copy_row<double>(map, b, y, width, to);
  } else {
    copy_row<float>(map, b, y, width, to);
  }
}

template <typename To>
inline void copy_integers(const PixelMap& map, int64_t b, int64_t y, int64_t width, To* to) {
  switch (map.dtype) {
    case ScalarType::Byte:
      return copy_row<uint8_t>(map, b, y, width, to);
    case ScalarType::Short:
      return copy_row<int16_t>(map, b, y, width, to);
    case ScalarType::Int:
      return copy_row<int32_t>(map, b, y, width, to);
    default:
      return copy_row<int64_t>(map, b, y, width, to);
  }
}

template <typename T>
class StripPass {
  using V = typename Lanes<T>::Vector;
  using I = typename Lanes<T>::IntVector;
  using Int = typename Lanes<T>::Int;
  static constexpr int kLanes = Lanes<T>::count;

 public:
  explicit StripPass(const Problem<T>& problem)
      : p_(problem),
        classes_(problem.classes),
        blocks_((problem.width + kLanes - 1) / kLanes),
        padded_width_(blocks_ * kLanes),
        padded_low_width_(problem.low_width + kLanes),
        low_(padded_width_),
        high_(padded_width_),
        fraction_(padded_width_),
        near_(blocks_),
        wide_integers_(problem.width),
        labels_(kIntervalRows * padded_width_, Int{-1}),
        ids_(problem.ids.data != nullptr ? kIntervalRows * padded_width_ : 0, Int{-1}),
        weights_(kIntervalRows * padded_width_, T{0}),
        low_rows_{std::vector<T>(classes_ * padded_low_width_), std::vector<T>(classes_ * padded_low_width_)},
        top_(classes_ * kLanes),
        slope_(classes_ * kLanes),
        logit_(classes_ * kLanes),
        exp_(classes_ * kLanes) {
    for (int64_t x = 0; x < padded_width_; ++x) {
      const int64_t at = std::min(x, problem.width - 1);
      low_[x] = problem.column_axis.low[at];
      high_[x] = problem.column_axis.high[at];
      fraction_[x] = static_cast<T>(problem.column_axis.fraction[at]);
    }
    for (int64_t block = 0; block < blocks_; ++block) {
      near_[block] = high_[(block + 1) * kLanes - 1] - low_[block * kLanes] < kLanes;
    }
    if (problem.backward) {
      padded_classes_ = (classes_ + kLanes - 1) / kLanes * kLanes;
      for (auto& sum : full_gradient_) sum.assign(blocks_ * classes_ * kLanes, T{0});
      pixel_gradient_.assign(kLanes * padded_classes_, T{0});
      pooled_gradient_.assign(problem.pooled_gradient != nullptr ? classes_ * kLanes : 0, T{0});
    } else if (problem.ids.data != nullptr) {
      place_of_id_.assign(problem.num_ids, -1);
    }
  }

  void run(int64_t b, const Strip& strip, Partial<T>& out) {
    image_ = b;
    strip_ = &strip;
    out_ = &out;
    low_row_tag_[0] = low_row_tag_[1] = -1;
    gradient_tag_[0] = gradient_tag_[1] = -1;
    if (p_.backward) {
      out.gradient.assign((strip.row_end - strip.row_begin) * p_.low_width * padded_classes_, T{0});
    }
    for (size_t i = strip.begin; i < strip.end; ++i) {
      const Interval& interval = p_.rows.intervals[i];
      read_logits(interval);
      read_maps(interval);
      if (p_.backward) {
        turn_gradient_rows(interval.low, interval.high);
        for (int64_t block = 0; block < blocks_; ++block) backward_block(interval, block);
      } else {
        for (int64_t block = 0; block < blocks_; ++block) forward_block(interval, block);
      }
    }
    if (p_.backward) turn_gradient_rows(-1, -1);
    for (const int32_t id : out.ids) place_of_id_[id] = -1;
  }

 private:
  // ---- Inputs

  void read_logits(const Interval& interval) {
    if (low_row_tag_[1] == interval.low && low_row_tag_[0] != interval.low) {
      std::swap(low_rows_[0], low_rows_[1]);
      std::swap(low_row_tag_[0], low_row_tag_[1]);
    }
    const int32_t wanted[2] = {interval.low, interval.high};
    for (int side = 0; side < 2; ++side) {
      if (low_row_tag_[side] == wanted[side]) continue;
      low_row_tag_[side] = wanted[side];
      for (int64_t c = 0; c < classes_; ++c) {
        const T* from = p_.logits + image_ * p_.logit_strides[0] + c * p_.logit_strides[1] +
                        wanted[side] * p_.logit_strides[2];
        T* to = low_rows_[side].data() + c * padded_low_width_;
        for (int64_t j = 0; j < p_.low_width; ++j) to[j] = from[j * p_.logit_strides[3]];
        std::fill(to + p_.low_width, to + padded_low_width_, T{0});
      }
    }
  }

  // Labels, ids and weights of the interval's rows. The lanes behind the last pixel stay -1, -1 and 0.
  void read_maps(const Interval& interval) {
    const int64_t width = p_.width;
    for (int64_t y = interval.begin; y < interval.end; ++y) {
      const int64_t at = (y - interval.begin) * padded_width_;
      int64_t* wide = wide_integers_.data();
      Int* labels = labels_.data() + at;
      copy_integers(p_.labels, image_, y, width, wide);
      for (int64_t x = 0; x < width; ++x) {
        const bool labelled = wide[x] != p_.ignore_index && wide[x] >= 0 && wide[x] < classes_;
        labels[x] = labelled ? static_cast<Int>(wide[x]) : Int{-1};
      }
      T* weights = weights_.data() + at;
      copy_weights(p_.weight, image_, y, width, weights);
      if (!p_.backward) {
        double sum = 0;
        if (p_.weight.data == nullptr) {
          sum = static_cast<double>(width);
        } else {
          V sums{};
          for (int64_t x = 0; x < padded_width_; x += kLanes) sums += load<V>(weights + x);
          sum = sum_of(sums);
        }
        out_->weight += sum;
      }
      if (p_.ids.data == nullptr) continue;
      Int* ids = ids_.data() + at;
      copy_integers(p_.ids, image_, y, width, wide);
      if (p_.backward) {
        for (int64_t x = 0; x < width; ++x) {
          ids[x] = wide[x] >= 0 && wide[x] < p_.num_ids ? static_cast<Int>(wide[x]) : Int{-1};
        }
        continue;
      }
      // Forward, ids become their place in this strip's list.
      for (int64_t x = 0; x < width;) {
        const int64_t begin = x, id = wide[x];
        while (x < width && wide[x] == id) ++x;
        Int place = -1;
        if (id >= 0 && id < p_.num_ids) {
          if (place_of_id_[id] < 0) {
            place_of_id_[id] = static_cast<int32_t>(out_->ids.size());
            out_->ids.push_back(static_cast<int32_t>(id));
            out_->counts.push_back(0);
            out_->pooled.resize(out_->pooled.size() + classes_, T{0});
          }
          place = place_of_id_[id];
          out_->counts[place] += x - begin;
        }
        std::fill(ids + begin, ids + x, place);
      }
    }
  }

  // ---- Interpolation and softmax

  // Both rows of logits at the columns of a block: the upper one, and the lower minus the upper.
  void interpolate_columns(int64_t block) {
    const int64_t at = block * kLanes;
    const V fraction = load<V>(fraction_.data() + at);
    const I low = load<I>(low_.data() + at), high = load<I>(high_.data() + at);
    const int64_t base = low_[at];
    const T* upper = low_rows_[0].data();
    const T* lower = low_rows_[1].data();
    const Int first = static_cast<Int>(base);
    for (int64_t c = 0; c < classes_; ++c, upper += padded_low_width_, lower += padded_low_width_) {
      V a, b, d, e;
      if (near_[block]) {
        a = pick_near(upper + base, low - first);
        b = pick_near(upper + base, high - first);
        d = pick_near(lower + base, low - first);
        e = pick_near(lower + base, high - first);
      } else {
        for (int i = 0; i < kLanes; ++i) {
          a[i] = upper[low[i]];
          b[i] = upper[high[i]];
          d[i] = lower[low[i]];
          e[i] = lower[high[i]];
        }
      }
      a += fraction * (b - a);
      d += fraction * (e - d);
      store(top_.data() + c * kLanes, a);
      store(slope_.data() + c * kLanes, d - a);
    }
  }

  // Logits of a block of one row to logit_; their maximum.
  V logits_of_row(T fraction) {
    const T *top = top_.data(), *slope = slope_.data();
    T* logit = logit_.data();
    V highest = load<V>(top) + fraction * load<V>(slope);
    store(logit, highest);
#pragma GCC unroll 4
    for (int64_t at = kLanes; at < classes_ * kLanes; at += kLanes) {
      const V z = load<V>(top + at) + fraction * load<V>(slope + at);
      store(logit + at, z);
      highest = larger(highest, z);
    }
    return highest;
  }

  // Whether no term of the losses sees this block of a row.
  bool is_dead(int64_t at, uint32_t labelled) const {
    if (labelled != 0) return false;
    if (negative_lanes(reinterpret_cast<I>(load<V>(weights_.data() + at) > T{0})) != 0) return false;
    return ids_.empty() || (~negative_lanes(load<I>(ids_.data() + at)) & kAllLanes) == 0;
  }

  uint32_t labelled_lanes(int64_t at) const { return ~negative_lanes(load<I>(labels_.data() + at)) & kAllLanes; }

  T label_weight(Int label) const { return p_.class_weight.empty() ? T{1} : p_.class_weight[label]; }

  void forward_block(const Interval& interval, int64_t block) {
    bool interpolated = false;
    V entropy{};
    double cross_entropy = 0, labelled_sum = 0;
    for (int64_t y = interval.begin; y < interval.end; ++y) {
      const int64_t at = (y - interval.begin) * padded_width_ + block * kLanes;
      uint32_t labelled = labelled_lanes(at);
      if (is_dead(at, labelled)) continue;
      if (!interpolated) interpolate_columns(block);
      interpolated = true;
      const V highest = logits_of_row(static_cast<T>(p_.row_axis.fraction[y]));
      V sum{}, weighted{};  // of e^d and of e^d d, d = logit - highest
      T *logit = logit_.data(), *exps = exp_.data();
#pragma GCC unroll 2
      for (int64_t i = 0; i < classes_ * kLanes; i += kLanes) {
        const V d = load<V>(logit + i) - highest;
        const V e = exp_nonpositive(d);
        store(exps + i, e);
        sum += e;
        weighted += e * d;
      }
      const V log_sum = log_positive(sum);
      entropy += load<V>(weights_.data() + at) * (log_sum - weighted / sum);
      const V log_total = highest + log_sum;
      for (; labelled != 0; labelled &= labelled - 1) {
        const int lane = __builtin_ctz(labelled);
        const Int label = labels_[at + lane];
        const T scale = label_weight(label);
        cross_entropy += static_cast<double>(scale * (log_total[lane] - logit[label * kLanes + lane]));
        labelled_sum += static_cast<double>(scale);
      }
      if (!ids_.empty()) pool(ids_.data() + at, T{1} / sum);
    }
    out_->entropy += static_cast<double>(sum_of(entropy));
    out_->cross_entropy += cross_entropy;
    out_->labelled += labelled_sum;
  }

  // Adds the probabilities exp_ * scale of each run of equal ids.
  void pool(const Int* ids, V scale) {
    for (int begin = 0; begin < kLanes;) {
      const Int id = ids[begin];
      int end = begin + 1;
      while (end < kLanes && ids[end] == id) ++end;
      if (id >= 0) {
        const I lane = lane_numbers();
        const V share = (lane >= Int(begin)) & (lane < Int(end)) ? scale : V{};
        T* sums = out_->pooled.data() + id * classes_;
        for (int64_t c = 0; c < classes_; ++c) sums[c] += sum_of(load<V>(exp_.data() + c * kLanes) * share);
      }
      begin = end;
    }
  }

  static I lane_numbers() {
    I lanes{};
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    return lanes;
  }

  // ---- Backward
  //
  // With A = the gradient of the cross-entropy times the label's weight, M = that of the entropy times the pixel's
  // weight, and G_c = that of the pooled sums of the pixel's id:
  //   dz_c = p_c (A + t_c - sum_k p_k t_k) - A [c = label],  t_c = G_c - M ln p_c

  void backward_block(const Interval& interval, int64_t block) {
    bool interpolated = false;
    const bool pooled = p_.pooled_gradient != nullptr;
    const T entropy_gradient = p_.entropy_gradient[image_];
    const T cross_entropy_gradient = p_.cross_entropy_gradient[image_];
    T* upper = full_gradient_[0].data() + block * classes_ * kLanes;
    T* lower = full_gradient_[1].data() + block * classes_ * kLanes;
    for (int64_t y = interval.begin; y < interval.end; ++y) {
      const int64_t at = (y - interval.begin) * padded_width_ + block * kLanes;
      uint32_t labelled = labelled_lanes(at);
      if (is_dead(at, labelled)) continue;
      if (!interpolated) interpolate_columns(block);
      interpolated = true;
      const T fraction = static_cast<T>(p_.row_axis.fraction[y]), rest = T{1} - fraction;
      const V highest = logits_of_row(fraction);
      V sum{}, weighted{}, inner{};
      T *logit = logit_.data(), *exps = exp_.data();
      if (pooled) spread_pooled_gradient(ids_.data() + at);
      const T* outer = pooled_gradient_.data();
#pragma GCC unroll 2
      for (int64_t i = 0; i < classes_ * kLanes; i += kLanes) {
        const V d = load<V>(logit + i) - highest;
        const V e = exp_nonpositive(d);
        store(logit + i, d);
        store(exps + i, e);
        sum += e;
        weighted += e * d;
        if (pooled) inner += e * load<V>(outer + i);
      }
      const V inverse = T{1} / sum, log_sum = log_positive(sum);
      const V m = entropy_gradient * load<V>(weights_.data() + at);
      V a{};
      for (uint32_t left = labelled; left != 0; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        const Int label = labels_[at + lane];
        a[lane] = cross_entropy_gradient * label_weight(label);
        upper[label * kLanes + lane] -= rest * a[lane];
        lower[label * kLanes + lane] -= fraction * a[lane];
      }
      // ln p = d - log_sum and H = log_sum - weighted / sum: dz = e (constant - slope d + G / sum).
      const V slope = m * inverse;
      const V constant = (a + slope * weighted - inner * inverse) * inverse;
#pragma GCC unroll 2
      for (int64_t i = 0; i < classes_ * kLanes; i += kLanes) {
        V factor = constant - slope * load<V>(logit + i);
        if (pooled) factor += load<V>(outer + i) * inverse;
        const V dz = load<V>(exps + i) * factor;
        store(upper + i, load<V>(upper + i) + rest * dz);
        store(lower + i, load<V>(lower + i) + fraction * dz);
      }
      (void)log_sum;
    }
  }

  void spread_pooled_gradient(const Int* ids) {
    const T* all = p_.pooled_gradient + image_ * p_.pooled_strides[0];
    T* to = pooled_gradient_.data();
    bool first = true;
    for (int begin = 0; begin < kLanes;) {
      const Int id = ids[begin];
      int end = begin + 1;
      while (end < kLanes && ids[end] == id) ++end;
      const I lane = lane_numbers();
      const I inside = (lane >= Int(begin)) & (lane < Int(end));
      const T* from = all + id * p_.pooled_strides[1];
      for (int64_t c = 0; c < classes_; ++c) {
        const V value = V{} + (id < 0 ? T{0} : from[c * p_.pooled_strides[2]]);
        store(to + c * kLanes, first ? value : (inside ? value : load<V>(to + c * kLanes)));
      }
      first = false;
      begin = end;
    }
  }

  // Makes full_gradient_ those of rows `low` and `high` of the logits; finished rows go to the strip's gradient.
  void turn_gradient_rows(int32_t low, int32_t high) {
    if (gradient_tag_[0] == low && gradient_tag_[1] == high) return;
    const bool step = gradient_tag_[1] == low && gradient_tag_[0] != low && low != high;
    finish_gradient_row(0);
    if (step) {
      std::swap(full_gradient_[0], full_gradient_[1]);
    } else {
      finish_gradient_row(1);
    }
    gradient_tag_[0] = low;
    gradient_tag_[1] = high;
  }

  // The transpose of the interpolation of columns, lanes turned into columns first.
  void finish_gradient_row(int side) {
    if (gradient_tag_[side] < 0) return;
    T* row = out_->gradient.data() + (gradient_tag_[side] - strip_->row_begin) * p_.low_width * padded_classes_;
    T* full = full_gradient_[side].data();
    for (int64_t block = 0; block < blocks_; ++block, full += classes_ * kLanes) {
      for (int64_t c = 0; c < classes_; ++c) {
        for (int i = 0; i < kLanes; ++i) pixel_gradient_[i * padded_classes_ + c] = full[c * kLanes + i];
      }
      std::fill(full, full + classes_ * kLanes, T{0});
      for (int i = 0; i < kLanes; ++i) {
        const int64_t x = block * kLanes + i;
        const T fraction = fraction_[x], rest = T{1} - fraction;
        const T* pixel = pixel_gradient_.data() + i * padded_classes_;
        T* left = row + low_[x] * padded_classes_;
        T* right = row + high_[x] * padded_classes_;
        for (int64_t c = 0; c < padded_classes_; c += kLanes) {
          store(left + c, load<V>(left + c) + rest * load<V>(pixel + c));
          store(right + c, load<V>(right + c) + fraction * load<V>(pixel + c));
        }
      }
    }
  }

  static constexpr uint32_t kAllLanes = (uint32_t{1} << kLanes) - 1;

  const Problem<T>& p_;
  const int64_t classes_, blocks_, padded_width_, padded_low_width_;
  int64_t padded_classes_ = 0;
  std::vector<Int> low_, high_;     // [padded W]
  std::vector<T> fraction_;         // [padded W]
  std::vector<uint8_t> near_;       // [blocks]: its columns of logits fit in a vector
  std::vector<int64_t> wide_integers_;
  std::vector<Int> labels_, ids_;   // [kIntervalRows, padded W], -1 = none
  std::vector<T> weights_;          // [kIntervalRows, padded W]
  std::vector<T> low_rows_[2];      // [C, padded w]
  int32_t low_row_tag_[2] = {-1, -1};
  std::vector<T> top_, slope_, logit_, exp_;  // [C, lanes]
  std::vector<T> full_gradient_[2];           // [blocks, C, lanes]
  int32_t gradient_tag_[2] = {-1, -1};
  std::vector<T> pixel_gradient_;             // [lanes, padded C]
  std::vector<T> pooled_gradient_;            // [C, lanes]
  std::vector<int32_t> place_of_id_;          // [K]
  int64_t image_ = 0;
  const Strip* strip_ = nullptr;
  Partial<T>* out_ = nullptr;
};

template <typename T>
void run_strips(const Problem<T>& problem, int64_t begin, int64_t end, std::vector<Partial<T>>& partials) {
  StripPass<T> pass(problem);
  const int64_t strips = static_cast<int64_t>(problem.rows.strips.size());
  for (int64_t i = begin; i < end; ++i) pass.run(i / strips, problem.rows.strips[i % strips], partials[i]);
}
