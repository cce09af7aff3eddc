// Step 5 for one row of pixels: blocks of as many pixels as a vector has lanes, whose nearest centroids stay in
// registers while all centroids within reach pass by.

using UnsignedV = uint32_t __attribute__((vector_size(CC4S_VECTOR_BYTES)));

// Sum of the squared differences of the two 16-bit halves of each lane.
inline UnsignedV squared_difference(FloatI a, FloatI b) {
#if CC4S_VECTOR_BYTES == 64
  const __m512i d = _mm512_sub_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
  return reinterpret_cast<UnsignedV>(_mm512_madd_epi16(d, d));
#elif CC4S_VECTOR_BYTES == 32
  const __m256i d = _mm256_sub_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  return reinterpret_cast<UnsignedV>(_mm256_madd_epi16(d, d));
#elif CC4S_X86
  const __m128i d = _mm_sub_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b));
  return reinterpret_cast<UnsignedV>(_mm_madd_epi16(d, d));
#else
  const FloatI low = (a & 0xffff) - (b & 0xffff), high = (a >> 16) - (b >> 16);
  return reinterpret_cast<UnsignedV>(low * low + high * high);
#endif
}

inline void assign_row(const Grid& grid, const State& state, int band, int64_t y, const int32_t* row_terms) {
  constexpr int kLanes = Lanes<float>::count;
  const int first = std::max(band - 1, 0), last = std::min(band + 1, grid.rows - 1);
  const int64_t row = y * grid.width;
  for (int64_t next = 0; next < grid.width; next += kLanes) {
    // The last block overlaps the one before; a label does not depend on the labels, so that twice is as good as once.
    const int64_t x = std::min(next, grid.width - kLanes);
    const FloatI la = load<FloatI>(state.la + row + x), b = load<FloatI>(state.b + row + x);
    FloatI nearest = load<FloatI>(state.labels + row + x);
    // No distance is below that of a masked pixel, which so keeps its -1. Distances are below 2^31; the terms of
    // columns out of reach are 2^31.
    UnsignedV low = reinterpret_cast<UnsignedV>(nearest < 0 ? FloatI{} : FloatI{} + 0x7fffffff);
    const int begin = std::max(grid.col_of[x] - 1, 0), end = std::min(grid.col_of[x + kLanes - 1] + 2, grid.cols);
    // Clusters in ascending order and a strict comparison: ties go to the lowest id.
    for (int i = first; i <= last; ++i) {
      for (int id = i * grid.cols + begin, j = begin; j < end; ++j, ++id) {
        const Centroid& centroid = state.centroids[id];
        if (!centroid.alive) continue;
        const UnsignedV terms =
            load<UnsignedV>(state.column_terms + int64_t{id} * grid.pitch() + kMargin + x - grid.reach_begin(j));
        const UnsignedV distance = squared_difference(la, FloatI{} + centroid.la) +
                                   squared_difference(b, FloatI{} + centroid.b) +
                                   (terms + static_cast<uint32_t>(row_terms[id - first * grid.cols]));
        const auto closer = distance < low;
        low = closer ? distance : low;
        nearest = closer ? FloatI{} + id : nearest;
      }
    }
    store(state.labels + row + x, nearest);
  }
}

// `row_terms`: room for [3, cols].
inline void assign_band(const Grid& grid, const State& state, int band, int32_t* row_terms) {
  const int first = std::max(band - 1, 0), last = std::min(band + 1, grid.rows - 1);
  for (int64_t y = grid.row_begin[band]; y < grid.row_begin[band + 1]; ++y) {
    for (int k = 0; k < (last - first + 1) * grid.cols; ++k) {
      const int64_t dy = kPositionScale * y - state.centroids[first * grid.cols + k].y;
      row_terms[k] = static_cast<int32_t>((grid.weight * dy * dy) >> kWeightShift);
    }
    assign_row(grid, state, band, y, row_terms);
  }
}
