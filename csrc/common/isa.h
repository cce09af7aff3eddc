// Which instruction set the kernels use, chosen at run time.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CC4S_X86 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define CC4S_X86 0
#endif

namespace cc4s {

// Ordered: each level has all instructions of the levels before it.
enum class Isa { generic, avx2, avx512, avx512_bf16, amx };

inline bool machine_has_amx() {
#if CC4S_X86
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool instructions = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
  // Linux gives a process the tile registers only on request (ARCH_REQ_XCOMP_PERM, XTILEDATA).
  return instructions && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

inline Isa machine_isa() {
#if CC4S_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::generic;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::avx2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  return machine_has_amx() ? Isa::amx : Isa::avx512_bf16;
#else
  return Isa::generic;
#endif
}

// CC4S_KERNELS_CPU=generic|avx2|avx512|avx512_bf16|amx lowers the level; read at every call.
inline Isa current_isa() {
  static const Isa machine = machine_isa();
  const char* wanted = std::getenv("CC4S_KERNELS_CPU");
  if (wanted == nullptr) return machine;
  const char* const names[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};
  for (int level = 0; level < static_cast<int>(machine); ++level) {
    if (std::strcmp(wanted, names[level]) == 0) return static_cast<Isa>(level);
  }
  return machine;
}

}  // namespace cc4s
