// Starts kernels on a stream. The `<op>_launch.h` of an op says which kernels run in which order on any launcher with this
// call operator: this one, or the one of tests/cuda_on_cpu, which runs them on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <torch/headeronly/util/Exception.h>

struct StreamLauncher {
  cudaStream_t stream;

  template <class... Parameters, class... Arguments>
  void operator()(dim3 grid, dim3 threads, void (*kernel)(Parameters...), Arguments... arguments) const {
    kernel<<<grid, threads, 0, stream>>>(static_cast<Parameters>(arguments)...);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "a CUDA kernel did not start: ", cudaGetErrorString(error));
  }
};
