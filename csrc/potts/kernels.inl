// All that potts_cpu.cpp compiles for each instruction set; image_rows.inl and relax.inl are what the passes use.
#include "common/image_rows.inl"
#include "potts/relax.inl"

#include "potts/graph.inl"
#include "potts/grid.inl"
