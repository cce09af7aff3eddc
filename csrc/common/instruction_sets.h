// One source compiled for several instruction sets, chosen at run time.
//
// A kernel stands in a file `<name>.inl` without includes of its own, written with the vectors of
// common/vectors.inl. The .cpp includes both once for each instruction set:
//
//   #if CC4S_X86
//   CC4S_PUSH_AVX512
//   namespace avx512 {
//   #define CC4S_VECTOR_BYTES 64
//   #include "common/vectors.inl"
//   #include "<op>/<name>.inl"
//   #undef CC4S_VECTOR_BYTES
//   }
//   CC4S_POP
//   #endif
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CC4S_X86 1
// GCC 12 takes the "undefined" vectors of its own intrinsics for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#define CC4S_X86 0
#endif

#define CC4S_PRAGMA(text) _Pragma(#text)
#define CC4S_PUSH_AVX2 CC4S_PRAGMA(GCC push_options) CC4S_PRAGMA(GCC target("avx2,fma"))
#define CC4S_PUSH_AVX512 \
  CC4S_PRAGMA(GCC push_options) CC4S_PRAGMA(GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))
#define CC4S_POP CC4S_PRAGMA(GCC pop_options)

namespace cc4s {

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

// The widest one of this processor; CC4S_KERNELS_CPU=portable or avx2 takes a narrower one (for tests).
inline InstructionSet instruction_set() {
#if CC4S_X86
  static const InstructionSet widest = [] {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return InstructionSet::kAvx512;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? InstructionSet::kAvx2
                                                                           : InstructionSet::kPortable;
  }();
  const char* wish = std::getenv("CC4S_KERNELS_CPU");
  if (wish != nullptr && std::strcmp(wish, "portable") == 0) return InstructionSet::kPortable;
  if (wish != nullptr && std::strcmp(wish, "avx2") == 0 && widest == InstructionSet::kAvx512) {
    return InstructionSet::kAvx2;
  }
  return widest;
#else
  return InstructionSet::kPortable;
#endif
}

}  // namespace cc4s
