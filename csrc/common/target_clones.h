// Run-time choice of the instruction set for one function, without -march on the command line.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define CC4S_TARGET_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define CC4S_TARGET_CLONES
#endif
