// Compiles the file CC4S_TILE_CODE once for each instruction set, in namespaces cc4s::generic, cc4s::avx2, ...
//
// Include it after all other headers: what the standard library defines must stay in the baseline instruction set.
// CC4S_VECTOR_BYTES is the width of a vector. CC4S_HALF is 1 for AVX512-BF16 and 2 for AMX, where only the
// bfloat16 engine is compiled, and 0 elsewhere, where only the plain one is.
#include "common/isa.h"
#include "common/tile_support.h"

#if CC4S_X86
// g++ 12 warns about its own _mm512_undefined_epi32 wherever these functions are inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define CC4S_VECTOR_BYTES 16
#define CC4S_HALF 0
namespace cc4s::generic {
#include CC4S_TILE_CODE
}
#undef CC4S_VECTOR_BYTES

#if CC4S_X86
#define CC4S_VECTOR_BYTES 32
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace cc4s::avx2 {
#include CC4S_TILE_CODE
}
#pragma GCC pop_options
#undef CC4S_VECTOR_BYTES

#define CC4S_VECTOR_BYTES 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace cc4s::avx512 {
#include CC4S_TILE_CODE
}
#pragma GCC pop_options
#undef CC4S_HALF

#define CC4S_HALF 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
namespace cc4s::avx512_bf16 {
#include CC4S_TILE_CODE
}
#pragma GCC pop_options
#undef CC4S_HALF

#define CC4S_HALF 2
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,prefer-vector-width=512")
namespace cc4s::amx {
#include CC4S_TILE_CODE
}
#pragma GCC pop_options
#undef CC4S_VECTOR_BYTES
#endif
#undef CC4S_HALF

// Calls function<Engine>(...) of the instruction set in force, with the engine for elements of type E.
#if CC4S_X86
#define CC4S_FOR_CURRENT_ISA(E, function, ...)                                                             \
  do {                                                                                                     \
    const ::cc4s::Isa isa = ::cc4s::current_isa();                                                         \
    if constexpr (std::is_same_v<E, ::cc4s::Half>) {                                                       \
      if (isa == ::cc4s::Isa::amx) return ::cc4s::amx::function<::cc4s::amx::Bf16>(__VA_ARGS__);           \
      if (isa == ::cc4s::Isa::avx512_bf16) {                                                               \
        return ::cc4s::avx512_bf16::function<::cc4s::avx512_bf16::Bf16>(__VA_ARGS__);                      \
      }                                                                                                    \
    }                                                                                                      \
    using Scalar = ::cc4s::ScalarFor<E>;                                                                   \
    if (isa >= ::cc4s::Isa::avx512) {                                                                      \
      return ::cc4s::avx512::function<::cc4s::avx512::Plain<Scalar, E>>(__VA_ARGS__);                      \
    }                                                                                                      \
    if (isa == ::cc4s::Isa::avx2) {                                                                        \
      return ::cc4s::avx2::function<::cc4s::avx2::Plain<Scalar, E>>(__VA_ARGS__);                          \
    }                                                                                                      \
    return ::cc4s::generic::function<::cc4s::generic::Plain<Scalar, E>>(__VA_ARGS__);                      \
  } while (false)
#else
#define CC4S_FOR_CURRENT_ISA(E, function, ...) \
  ::cc4s::generic::function<::cc4s::generic::Plain<::cc4s::ScalarFor<E>, E>>(__VA_ARGS__)
#endif
