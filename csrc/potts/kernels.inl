// All that potts_cpu.cpp compiles for each instruction set; relax.inl is what the passes use.
#include "potts/relax.inl"

#include "potts/graph.inl"
#include "potts/grid.inl"
