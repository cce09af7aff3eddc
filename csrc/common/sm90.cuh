// Instructions of Hopper GPUs (compute capability 9.0a) as functions: barriers in shared memory, copies by the tensor
// memory accelerator (TMA), matrix products of a warpgroup (wgmma). PTX ISA 8.0, "Asynchronous warpgroup level matrix
// instructions" and "mbarrier".
//
// Under g++ tests/cuda_on_cpu/sm90_on_cpu.h, included before, has the second body of each function.
#pragma once

#include "common/mma_sm80.cuh"

namespace hopper {

using mma_sm80::BFloat16;
using mma_sm80::exp2_of;
using mma_sm80::Half;
using mma_sm80::is_valid;
using mma_sm80::kWarp;
using mma_sm80::log2_of;
using mma_sm80::pack;
using mma_sm80::row_max;
using mma_sm80::row_sum;
using mma_sm80::widen;

// A CUtensorMap: how an array [batch, rows, columns] is cut into boxes.
struct alignas(64) TensorMap {
  unsigned long long words[16];
};

using Barrier = unsigned long long;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

constexpr int kWarpgroup = 128;
// A tile in shared memory is made of slabs 64 values wide: rows of 128 bytes whose 16-byte parts are swizzled
// (part ^= row % 8). Slabs start at multiples of 1024 bytes.
constexpr int kSlab = 64, kSlabRow = 128;
// What a block may use, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
constexpr int kSharedBytes = 227 * 1024;

#ifndef CC4S_CUDA_ON_CPU

extern __shared__ __align__(1024) char shared[];
__device__ __forceinline__ char* shared_memory() { return shared; }

__device__ __forceinline__ unsigned address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// ---- barriers

__device__ __forceinline__ void init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
}
// Barriers that were set up are seen by copies.
__device__ __forceinline__ void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}
// Arrives, and lets the phase wait for `bytes` of copies.
__device__ __forceinline__ void arrive_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended; a new barrier is in phase 0.
__device__ __forceinline__ void wait(Barrier* barrier, unsigned parity) {
  unsigned done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address(barrier)), "r"(parity)
        : "memory");
  }
}
// Barriers of some warps; `threads` is the number of all that come, id 1 to 15.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- copies

// The box at (column, row, batch) into `tile`, zeros where it leaves the array; counts its bytes on `barrier`.
__device__ __forceinline__ void load(const TensorMap& map, void* tile, Barrier* barrier, int column, int row,
                                     int batch) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(address(tile)),
      "l"(&map), "r"(address(barrier)), "r"(column), "r"(row), "r"(batch)
      : "memory");
}
__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// What this thread wrote to shared memory is seen by products and copies that start later.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers of a warpgroup

template <int count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- products

__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Keeps what reads or writes `values` on its side of a fence or a wait.
template <int count>
__device__ __forceinline__ void pin(float (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(values[i])::"memory");
}
// Before the first product of a group, with the sums that it adds to.
template <int... counts>
__device__ __forceinline__ void fence(float (&... sums)[counts]) {
  (pin(sums), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Until at most `groups` of the committed groups are unfinished; then the sums `done` may be read.
template <int groups, int... counts>
__device__ __forceinline__ void wait_products(float (&... done)[counts]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
  (pin(done), ...);
}

#define CC4S_F8(d, i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define CC4S_F32(d, i) CC4S_F8(d, i), CC4S_F8(d, i + 8), CC4S_F8(d, i + 16), CC4S_F8(d, i + 24)
#define CC4S_F64(d) CC4S_F32(d, 0), CC4S_F32(d, 32)
#define CC4S_F128(d) CC4S_F64(d), CC4S_F32(d, 64), CC4S_F32(d, 96)
#define CC4S_D32 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31} "
#define CC4S_D64 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63} "
#define CC4S_D128 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127} "

#define CC4S_SHARED_64(type)                                                                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " \
               CC4S_D32 ", %32, %33, p, 1, 1, 0, 0;\n}"                                                    \
               : CC4S_F32(d, 0)                                                                                   \
               : "l"(a), "l"(b), "r"(add)                                                                     \
               : "memory")
#define CC4S_REGISTERS_64(type)                                                                               \
  asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " \
               CC4S_D32 ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"                                               \
               : CC4S_F32(d, 0)                                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                           \
               : "memory")

#define CC4S_SHARED_128(type)                                                                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " \
               CC4S_D64 ", %64, %65, p, 1, 1, 0, 0;\n}"                                                    \
               : CC4S_F64(d)                                                                                   \
               : "l"(a), "l"(b), "r"(add)                                                                     \
               : "memory")
#define CC4S_REGISTERS_128(type)                                                                               \
  asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " \
               CC4S_D64 ", {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"                                               \
               : CC4S_F64(d)                                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                           \
               : "memory")

#define CC4S_SHARED_256(type)                                                                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " " \
               CC4S_D128 ", %128, %129, p, 1, 1, 0, 0;\n}"                                                    \
               : CC4S_F128(d)                                                                                   \
               : "l"(a), "l"(b), "r"(add)                                                                     \
               : "memory")
#define CC4S_REGISTERS_256(type)                                                                               \
  asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " " \
               CC4S_D128 ", {%128, %129, %130, %131}, %132, p, 1, 1, 1;\n}"                                               \
               : CC4S_F128(d)                                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                           \
               : "memory")

// d [64, N] (+)= a [64, 16] b [N, 16]^T of one warpgroup, a and b in shared memory; `add` false forgets d. Ends some
// time before `wait_products` does.
template <class T, int count>
__device__ __forceinline__ void multiply(float (&d)[count], unsigned long long a, unsigned long long b, int add);
// d [64, N] += a [64, 16] b [16, N], a in registers (its place in a score tile: see below), b in shared memory.
template <class T, int count>
__device__ __forceinline__ void multiply(float (&d)[count], const unsigned (&a)[4], unsigned long long b);

#define CC4S_MULTIPLY(T, type, N)                                                                                     \
  template <>                                                                                                         \
  __device__ __forceinline__ void multiply<T, N / 2>(float (&d)[N / 2], unsigned long long a, unsigned long long b,  \
                                                     int add) {                                                       \
    CC4S_SHARED_##N(type);                                                                                            \
  }                                                                                                                   \
  template <>                                                                                                         \
  __device__ __forceinline__ void multiply<T, N / 2>(float (&d)[N / 2], const unsigned (&a)[4], unsigned long long b) { \
    CC4S_REGISTERS_##N(type);                                                                                         \
  }
CC4S_MULTIPLY(BFloat16, "bf16", 64)
CC4S_MULTIPLY(BFloat16, "bf16", 128)
CC4S_MULTIPLY(BFloat16, "bf16", 256)
CC4S_MULTIPLY(Half, "f16", 64)
CC4S_MULTIPLY(Half, "f16", 128)
CC4S_MULTIPLY(Half, "f16", 256)

#endif

template <class T>
__device__ __forceinline__ void unpack(unsigned both, float& low, float& high) {
  low = widen(T{static_cast<unsigned short>(both)});
  high = widen(T{static_cast<unsigned short>(both >> 16)});
}

// ---- descriptors of operands (PTX ISA, "Matrix descriptor"); addresses and strides in units of 16 bytes. A tile has one
// descriptor, to which constants are added: fewer instructions than one for each step.

__device__ __forceinline__ unsigned long long descriptor(const char* start, int leading, int stride) {
  constexpr unsigned long long kSwizzle128 = 1ull << 62;
  return kSwizzle128 | static_cast<unsigned long long>(stride >> 4) << 32 |
         static_cast<unsigned long long>(leading >> 4) << 16 | (address(start) & 0x3ffff) >> 4;
}

// Columns 16 step .. 16 step + 16 of the rows of a tile [rows, 64 m]: the product sums over columns. `rows`: of the
// whole slab; `tile` may start at any row that is a multiple of 8.
__device__ __forceinline__ unsigned long long by_columns(const char* tile, int rows, int step) {
  return descriptor(tile, 16, 8 * kSlabRow) + (step / 4 * rows * kSlabRow + step % 4 * 32) / 16;
}
// Rows 16 step .. 16 step + 16 of all columns of a tile [rows, 64 m]: the product sums over rows.
__device__ __forceinline__ unsigned long long by_rows(const char* tile, int rows, int step) {
  return descriptor(tile, rows * kSlabRow, 8 * kSlabRow) + step * 16 * kSlabRow / 16;
}

// Sums d [64, 2 count] lie in a warpgroup so: a thread of lane l of warp w has rows 16 w + l / 4 (half 0) and 8 more
// (half 1), and in d[4 j + 2 half + e] column 8 j + 2 (l % 4) + e.

// The 16 columns from 16 step of a score tile d, as operand in registers.
template <class T, int count>
__device__ __forceinline__ void operand(unsigned (&a)[4], const float (&d)[count], int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack<T>(d[8 * step + 2 * i], d[8 * step + 2 * i + 1]);
}

// Where a ring of `stages` buffers stands.
struct Place {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace hopper

