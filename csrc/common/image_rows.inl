// Rows of images in and out of lines of adjacent numbers. Included after common/vectors.inl, once for each instruction
// set.

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
