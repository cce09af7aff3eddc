// Compiles the file CC4S_VECTOR_CODE, which is written with the vectors of common/vectors.inl, once for each instruction
// set, in namespaces avx512, avx2 and portable of the enclosing one.
//
// Include it after common/instruction_sets.h and all other headers: what the standard library defines must stay in the
// baseline instruction set.
#if CC4S_X86
CC4S_PUSH_AVX512
namespace avx512 {
#define CC4S_VECTOR_BYTES 64
#include "common/vectors.inl"
#include CC4S_VECTOR_CODE
#undef CC4S_VECTOR_BYTES
}  // namespace avx512
CC4S_POP

CC4S_PUSH_AVX2
namespace avx2 {
#define CC4S_VECTOR_BYTES 32
#include "common/vectors.inl"
#include CC4S_VECTOR_CODE
#undef CC4S_VECTOR_BYTES
}  // namespace avx2
CC4S_POP
#endif

namespace portable {
#define CC4S_VECTOR_BYTES 16
#include "common/vectors.inl"
#include CC4S_VECTOR_CODE
#undef CC4S_VECTOR_BYTES
}  // namespace portable
