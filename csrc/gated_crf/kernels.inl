// All that gated_crf_cpu.cpp compiles for each instruction set; image_rows.inl is what the pass uses.
#include "common/image_rows.inl"

#include "gated_crf/window.inl"
