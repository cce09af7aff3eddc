// Matrix instructions, asynchronous copies and exponentials of NVIDIA GPUs since Ampere (compute capability 8.0).
//
// Thin wrappers with two bodies: PTX on a GPU, plain C++ under tests/cuda_on_cpu. Free of torch, std and CUDA headers,
// also for NVRTC. Tiles in shared memory are panels of 64 columns: rows of 128 bytes, whose eight 16-byte chunks are
// permuted by the row, so that neither ldmatrix nor the copies meet in a bank.
#pragma once

#ifdef CC4S_CUDA_ON_CPU
#define CC4S_DYNAMIC_SHARED(name) unsigned char* const name = cuda_on_cpu::dynamic_shared()
#else
#define CC4S_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace mma_sm80 {

// 16-bit numbers as they lie in memory.
struct BFloat16 {
  unsigned short bits;
};
struct Half {
  unsigned short bits;
};

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kChunkColumns = 8;  // 16 bytes
constexpr unsigned kWarp = 0xffffffffu;

// Panels that `width` columns need, and the bytes of one with `rows` rows.
__host__ __device__ constexpr int panels_of(int width) { return (width + kPanelColumns - 1) / kPanelColumns; }
__host__ __device__ constexpr int panel_bytes(int rows) { return rows * kPanelRowBytes; }

// Where a chunk of a row of a panel is.
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * kPanelRowBytes + ((chunk ^ (row & 7)) << 4);
}

// ---- Copies to shared memory. A group is what a thread copied since its last commit.

#ifdef CC4S_CUDA_ON_CPU

__device__ inline void copy_16_async(void* to, const void* from, bool valid) {
  cuda_on_cpu::copy_async(to, valid ? from : nullptr, 16);
}
__device__ inline void commit_copies() { cuda_on_cpu::commit_copies(); }
template <int groups>
__device__ inline void wait_for_copies() {
  cuda_on_cpu::wait_for_copies(groups);
}

#else

__device__ __forceinline__ unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// 16 bytes, zeros where not valid; `from` is then not read.
__device__ __forceinline__ void copy_16_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last `groups` groups of this thread are on their way.
template <int groups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

#endif

// ---- Fragments. Lane l holds of each 8 x 8 matrix the values (row l / 4, columns 2 (l % 4) and the next), two to a register.

#ifdef CC4S_CUDA_ON_CPU

__device__ inline void load_matrices(unsigned (&out)[4], const void* row) {
  cuda_on_cpu::load_matrices(out, row, false);
}
__device__ inline void load_transposed(unsigned (&out)[4], const void* row) {
  cuda_on_cpu::load_matrices(out, row, true);
}
__device__ inline float widen(BFloat16 x) { return cuda_on_cpu::float_of_bfloat16(x.bits); }
__device__ inline float widen(Half x) { return cuda_on_cpu::float_of_half(x.bits); }
__device__ inline BFloat16 narrow(float x, BFloat16) { return {cuda_on_cpu::bfloat16_of(x)}; }
__device__ inline Half narrow(float x, Half) { return {cuda_on_cpu::half_of(x)}; }
template <class T>
__device__ inline unsigned pack(float low, float high) {
  return narrow(low, T{}).bits | static_cast<unsigned>(narrow(high, T{}).bits) << 16;
}
template <class T>
__device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  cuda_on_cpu::multiply_16x8x16(c, a, b0, b1, [](unsigned short bits) { return widen(T{bits}); });
}

#else

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(unsigned (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_transposed(unsigned (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float widen(Half x) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
}

// Two rounded numbers in one register.
template <class T>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<BFloat16>(float low, float high) {
  unsigned out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
template <>
__device__ __forceinline__ unsigned pack<Half>(float low, float high) {
  unsigned out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// c [16, 8] += a [16, 16] b [16, 8], b as its transpose. Of c, lane l holds row l / 4 in c[0], c[1] and row l / 4 + 8 in
// c[2], c[3], columns 2 (l % 4) and the next.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void multiply<BFloat16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<Half>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

// Of rows `row` .. row + 15 and 16 columns (`step` of the four of a panel), as the left factor.
__device__ __forceinline__ void load_left(unsigned (&out)[4], const unsigned char* panel, int row, int step, int lane) {
  load_matrices(out, panel + chunk_at(row + (lane & 15), 2 * step + (lane >> 4)));
}

// Of the same rows and columns, as the right factor of left rows^T: rows are columns of the product; out[0], out[1] for
// the first eight, out[2], out[3] for the others.
__device__ __forceinline__ void load_right_rows(unsigned (&out)[4], const unsigned char* panel, int row, int step,
                                                int lane) {
  load_matrices(out, panel + chunk_at(row + (lane & 7) + ((lane >> 4) << 3), 2 * step + ((lane >> 3) & 1)));
}

// Of the same rows and columns, as the right factor of left rows: columns are columns of the product.
__device__ __forceinline__ void load_right_columns(unsigned (&out)[4], const unsigned char* panel, int row, int step,
                                                   int lane) {
  load_transposed(out, panel + chunk_at(row + (lane & 15), 2 * step + (lane >> 4)));
}

// The left factor [16, 16] made of two products [16, 8].
template <class T>
__device__ __forceinline__ void left_of(unsigned (&out)[4], const float (&first)[4], const float (&second)[4]) {
  out[0] = pack<T>(first[0], first[1]);
  out[1] = pack<T>(first[2], first[3]);
  out[2] = pack<T>(second[0], second[1]);
  out[3] = pack<T>(second[2], second[3]);
}

// ---- Exponentials

// Added to the scores of keys that are no state: their weight is 0 beside any other, and unlike with -inf all differences
// are numbers. A row that has seen no other key so far forgets what it summed as soon as one comes.
constexpr float kHidden = -1e30f;

#ifdef CC4S_CUDA_ON_CPU
__device__ inline float exp2_of(float x) { return exp2f(x); }
__device__ inline float log2_of(float x) { return log2f(x); }
#else
// Results below the smallest normal number are 0.
__device__ __forceinline__ float exp2_of(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
__device__ __forceinline__ float log2_of(float x) {
  float out;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
#endif

// 2^x by float32 products and sums alone, for x below 128; relative error 1.7e-7, exactly 1 for 0, and 0 for all that is
// far below the smallest normal number (between 2^-127 and 2^-126 anything below that). ex2 has a unit of its own, 16
// results per SM and cycle; a share of the exponentials taken from it lets both work at once.
//
// x = n + f, |f| <= 1/2: adding 1.5 2^23 rounds to n; 2^f = 1 + f c(f), c of degree 4 with the least largest relative error;
// n goes into the exponent.
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.0f;
  x = fmaxf(x, -127.0f);
  const float shifted = x + kRound;
  const float f = x - (shifted - kRound);
  float p = 0.00132647273f;
  p = fmaf(p, f, 0.00967151299f);
  p = fmaf(p, f, 0.0555073358f);
  p = fmaf(p, f, 0.240222424f);
  p = fmaf(p, f, 0.693147004f);
  p = fmaf(p, f, 1.0f);
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

// 2^x of value `index` of many: one in `share` by the polynomial. The SM of 8.0 has 64 lanes for float32, not 128: it has
// none to spare.
template <int share>
__device__ __forceinline__ float exp2_shared(float x, int index) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
  return exp2_of(x);
#else
  return index % share == share - 1 ? exp2_polynomial(x) : exp2_of(x);
#endif
}

// Whether position is a state.
__device__ __forceinline__ bool is_valid(const bool* mask, int position, int n) {
  return position < n && (mask == nullptr || mask[position]);
}

// Sum and maximum over the four lanes that hold one row of a product.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kWarp, x, 1);
  return x + __shfl_xor_sync(kWarp, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWarp, x, 2));
}

// Copies kRows rows from `first` and `panels` panels from `column` of the matrix x [n, width] (the batch is in `x.at`);
// zeros outside it and in rows that are no state.
template <int kRows, int kThreads, class X>
__device__ __forceinline__ void copy_rows_async(unsigned char* to, const X& x, int first, int column, int panels,
                                                const bool* mask, int n) {
  for (int i = threadIdx.x; i < panels * kRows * 8; i += kThreads) {
    const int panel = i / (kRows * 8), row = i / 8 % kRows, chunk = i % 8;
    const int position = first + row, from = column + panel * kPanelColumns + chunk * kChunkColumns;
    const bool valid = from < x.width && is_valid(mask, position, n);
    copy_16_async(to + panel * panel_bytes(kRows) + chunk_at(row, chunk),
                  valid ? x.at + static_cast<long long>(position) * x.row + from : x.at, valid);
  }
}

// scores [kRowTiles 16, kColumns] += own rows other rows^T over one panel of 64 columns.
template <class T, int kRowTiles, int kColumns>
__device__ __forceinline__ void multiply_panels(float (&scores)[kRowTiles][kColumns / 8][4], const unsigned char* own,
                                                int own_row, const unsigned char* other, int lane) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    unsigned left[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) load_left(left[r], own, own_row + 16 * r, step, lane);
#pragma unroll
    for (int c = 0; c < kColumns / 16; ++c) {
      unsigned right[4];
      load_right_rows(right, other, 16 * c, step, lane);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        multiply<T>(scores[r][2 * c], left[r], right[0], right[1]);
        multiply<T>(scores[r][2 * c + 1], left[r], right[2], right[3]);
      }
    }
  }
}

// sums [kRowTiles 16, 64] += weights [kRowTiles 16, kOthers] (rounded) times one panel [kOthers, 64].
template <class T, int kRowTiles, int kOthers>
__device__ __forceinline__ void accumulate_panel(float (&sums)[kRowTiles][8][4],
                                                 const unsigned (&weights)[kRowTiles][kOthers / 16][4],
                                                 const unsigned char* panel, int lane) {
#pragma unroll
  for (int k = 0; k < kOthers / 16; ++k) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      unsigned right[4];
      load_right_columns(right, panel, 16 * k, c, lane);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        multiply<T>(sums[r][2 * c], weights[r][k], right[0], right[1]);
        multiply<T>(sums[r][2 * c + 1], weights[r][k], right[2], right[3]);
      }
    }
  }
}

}  // namespace mma_sm80
