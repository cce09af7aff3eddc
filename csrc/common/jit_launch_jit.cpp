// Where cc4s_kernels/_jit.py sets the driver.
#include "common/jit_launch.h"

JitDriver jit_driver{};
JitFunctions jit_functions;

extern "C" void cc4s_kernels_set_driver(const JitDriver* driver) {
  jit_driver = *driver;
  jit_functions.forget();
}
