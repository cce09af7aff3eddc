// The engine for bfloat16 operands with float scores and sums: AVX512-BF16 (CC4S_HALF 1) or AMX (CC4S_HALF 2).
//
// A is row-major with k padded to 32; B has panels [k / 2][32 columns][2], the pairs that both instruction sets
// multiply and add at once.

CC4S_INLINE void transpose_words(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    y[i] = _mm512_unpacklo_epi64(a, c);
    y[i + 1] = _mm512_unpackhi_epi64(a, c);
    y[i + 2] = _mm512_unpacklo_epi64(b, d);
    y[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // y[4 g + r] holds columns r, r + 4, r + 8, r + 12 of rows 4 g .. 4 g + 3, one in each quarter.
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const __m512i a = _mm512_shuffle_i32x4(y[r], y[4 + r], 0x88), b = _mm512_shuffle_i32x4(y[8 + r], y[12 + r], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(y[r], y[4 + r], 0xdd), d = _mm512_shuffle_i32x4(y[8 + r], y[12 + r], 0xdd);
    x[r] = _mm512_shuffle_i32x4(a, b, 0x88);
    x[4 + r] = _mm512_shuffle_i32x4(c, d, 0x88);
    x[8 + r] = _mm512_shuffle_i32x4(a, b, 0xdd);
    x[12 + r] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
}

// Mask of the first n of 32 elements.
CC4S_INLINE __mmask32 first_of_32(int64_t n) {
  return n >= 32 ? ~__mmask32{0} : n <= 0 ? __mmask32{0} : (__mmask32{1} << n) - 1;
}

struct Bf16 {
  using Scalar = float;
  using Element = Half;
  using Operand = Half;
  static constexpr int64_t kPanel = 32;
  static constexpr int64_t kRowTile = 256;
  static constexpr int64_t kKeyTile = 256;
  static constexpr int64_t kSkew = 16;
  static constexpr int64_t kRowPad = 32;

  struct Left {
    const Half* data;
    int64_t row;
  };

#if CC4S_HALF == 2
  // g++ does not know which memory the tile instructions read and write.
  CC4S_INLINE static void memory_barrier() { __asm__ volatile("" ::: "memory"); }

  struct Session {
    Session() {
      struct alignas(64) Config {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      memory_barrier();
      _tile_loadconfig(&config);
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    ~Session() { _tile_release(); }
  };
#else
  struct Session {};
#endif

  static int64_t depth(int64_t k) { return round_up(k, 32); }
  static int64_t left_rows_size(int64_t count, int64_t width) { return round_up(count, 32) * depth(width); }
  static int64_t left_tile_size(int64_t m, int64_t k) { return round_up(m, 32) * depth(k); }
  static int64_t right_size(int64_t k, int64_t n) { return depth(k) * round_up(n, kPanel); }
  static int64_t right_transposed_size(int64_t n, int64_t k) { return depth(k) * round_up(n, kPanel); }

  static Left left_rows(const Rows<const Half>& rows, int64_t begin, int64_t count, Half* scratch) {
    const int64_t padded = depth(rows.width);
    // In place where no product reads beyond the rows.
    if (rows.at.index == nullptr && padded == rows.width && count % 32 == 0) return {rows[begin], padded};
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(scratch + i * padded, rows[begin + i], rows.width * sizeof(Half));
      std::memset(scratch + i * padded + rows.width, 0, (padded - rows.width) * sizeof(Half));
    }
    return {scratch, padded};
  }

  // Columns of the tile from n to the next multiple of 32 must be 0.
  static Left left_tile(const float* tile, int64_t ld, int64_t m, int64_t n, Half* out) {
    const int64_t padded = depth(n);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < padded; j += 32) {
        const float* in = tile + i * ld + j;
        const __m512i pair =
            reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(in + 16), _mm512_loadu_ps(in)));
        _mm512_storeu_si512(out + i * padded + j, pair);
      }
    }
    return {out, padded};
  }

  static Left left_transposed(const float* tile, int64_t ld, int64_t m, int64_t n, Half* out) {
    const int64_t padded = depth(m);
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
    const __m512i interleave = _mm512_load_si512(order);
    for (int64_t j = 0; j < n; j += 16) {
      for (int64_t i = 0; i < padded; i += 32) {
        __m512i x[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) {
          const int64_t even = i + 2 * r, odd = even + 1;
          const __m512 a = even < m ? _mm512_loadu_ps(tile + even * ld + j) : _mm512_setzero_ps();
          const __m512 b = odd < m ? _mm512_loadu_ps(tile + odd * ld + j) : _mm512_setzero_ps();
          x[r] = _mm512_permutexvar_epi16(interleave, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
        }
        transpose_words(x);
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) _mm512_storeu_si512(out + (j + r) * padded + i, x[r]);
      }
    }
    return {out, padded};
  }

  static void pack(const Rows<const Half>& rows, int64_t begin, int64_t count, Half* out) {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; ++i) {
      order[0][i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      order[1][i] = static_cast<uint16_t>(16 + i / 2 + i % 2 * 32);
    }
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    for (int64_t first = 0; first < rows.width; first += kPanel) {
      const __mmask32 columns = first_of_32(rows.width - first);
      for (int64_t i = 0; i < depth(count); i += 2, out += 2 * kPanel) {
        const __m512i a =
            i < count ? _mm512_maskz_loadu_epi16(columns, rows[begin + i] + first) : _mm512_setzero_si512();
        const __m512i b =
            i + 1 < count ? _mm512_maskz_loadu_epi16(columns, rows[begin + i + 1] + first) : _mm512_setzero_si512();
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(out + kPanel, _mm512_permutex2var_epi16(a, high, b));
      }
    }
  }

  static void pack_transposed(const Rows<const Half>& rows, int64_t begin, int64_t count, Half* out) {
    const int64_t padded = depth(rows.width);
    for (int64_t first = 0; first < count; first += kPanel, out += padded * kPanel) {
      for (int64_t group = 0; group < kPanel; group += 16) {
        for (int64_t k = 0; k < padded; k += 32) {
          const __mmask32 columns = first_of_32(rows.width - k);
          __m512i x[16];
          for (int r = 0; r < 16; ++r) {
            const int64_t position = first + group + r;
            x[r] = position < count ? _mm512_maskz_loadu_epi16(columns, rows[begin + position] + k)
                                    : _mm512_setzero_si512();
          }
          transpose_words(x);
          for (int r = 0; r < 16; ++r) _mm512_storeu_si512(out + (k + 2 * r) * kPanel + group * 2, x[r]);
        }
      }
    }
  }

  // Writes rows of C up to a multiple of kRowPad.
  static void multiply(const Left& a, const Half* b, int64_t stride, int64_t m, int64_t n, int64_t k, float* c,
                       int64_t ldc, bool add) {
    for (int64_t first = 0; first < n; first += kPanel, b += stride) {
#if CC4S_HALF == 2
      for (int64_t i = 0; i < m; i += 32) {
        multiply_tiles(a.data + i * a.row, a.row, b, depth(k), c + i * ldc + first, ldc, add);
      }
#else
      for (int64_t i = 0; i < m;) {
        const int rows = block_rows(m - i);
        multiply_some_pairs<kRowsInRegisters>(rows, a.data + i * a.row, a.row, b, depth(k), c + i * ldc + first, ldc,
                                              add);
        i += rows;
      }
#endif
    }
  }

#if CC4S_HALF == 2
  // 32 x 32 of C in four tile registers.
  static void multiply_tiles(const Half* a, int64_t row, const Half* b, int64_t k, float* c, int64_t ldc, bool add) {
    const int64_t row_bytes = row * 2, c_bytes = ldc * 4;
    memory_barrier();
    if (add) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(1, c + 16, c_bytes);
      _tile_loadd(2, c + 16 * ldc, c_bytes);
      _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t i = 0; i < k; i += 32) {
      _tile_loadd(4, a + i, row_bytes);
      _tile_loadd(6, b + i * kPanel, 128);
      _tile_loadd(7, b + i * kPanel + 32, 128);
      _tile_loadd(5, a + 16 * row + i, row_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, c + 16 * ldc, c_bytes);
    _tile_stored(3, c + 16 * ldc + 16, c_bytes);
    memory_barrier();
  }
#else
  template <int R>
  static void multiply_pairs(const Half* a, int64_t row, const Half* b, int64_t k, float* c, int64_t ldc, bool add) {
    constexpr int kBases = (R + 2) / 3;
    __m512 left[R], right[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      left[r] = add ? _mm512_loadu_ps(c + r * ldc) : _mm512_setzero_ps();
      right[r] = add ? _mm512_loadu_ps(c + r * ldc + 16) : _mm512_setzero_ps();
    }
    const Half* base[kBases];
#pragma GCC unroll 8
    for (int g = 0; g < kBases; ++g) base[g] = a + 3 * g * row;
    for (int64_t i = 0; i < k; i += 2) {
      const __m512bh b0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
      const __m512bh b1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + kPanel));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, base[r / 3] + (r % 3) * row, 4);
        const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        left[r] = _mm512_dpbf16_ps(left[r], x, b0);
        right[r] = _mm512_dpbf16_ps(right[r], x, b1);
      }
#pragma GCC unroll 8
      for (int g = 0; g < kBases; ++g) base[g] += 2;
      b += 2 * kPanel;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      _mm512_storeu_ps(c + r * ldc, left[r]);
      _mm512_storeu_ps(c + r * ldc + 16, right[r]);
    }
  }

  template <int R>
  static void multiply_some_pairs(int rows, const Half* a, int64_t row, const Half* b, int64_t k, float* c,
                                  int64_t ldc, bool add) {
    if (rows == R) return multiply_pairs<R>(a, row, b, k, c, ldc, add);
    if constexpr (R > 1) multiply_some_pairs<R - 1>(rows, a, row, b, k, c, ldc, add);
  }
#endif
};
