// One source compiled for several instruction sets, chosen at run time.
//
// A kernel stands in a file `<name>.inl` without includes of its own, written with the vectors of
// common/vectors.inl; common/foreach_instruction_set.h compiles it for each.
#pragma once

#include "common/isa.h"

#if CC4S_X86
// GCC 12 takes the "undefined" vectors of its own intrinsics for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define CC4S_PRAGMA(text) _Pragma(#text)
#define CC4S_PUSH_AVX2 CC4S_PRAGMA(GCC push_options) CC4S_PRAGMA(GCC target("avx2,fma"))
#define CC4S_PUSH_AVX512 \
  CC4S_PRAGMA(GCC push_options) CC4S_PRAGMA(GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))
#define CC4S_POP CC4S_PRAGMA(GCC pop_options)

namespace cc4s {

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

// The widest of these that `current_isa` allows.
inline InstructionSet instruction_set() {
  const Isa isa = current_isa();
  if (isa >= Isa::avx512) return InstructionSet::kAvx512;
  return isa == Isa::avx2 ? InstructionSet::kAvx2 : InstructionSet::kPortable;
}

}  // namespace cc4s
