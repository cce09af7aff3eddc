// Starts kernels on a stream. The `<op>_launch.h` of an op says which kernels run in which order on any launcher with this
// call operator: this one, or the one of tests/cuda_on_cpu, which runs them on a CPU.
#pragma once

#include "common/strides_of.h"

#ifndef __CUDACC__
#include "common/jit_launch.h"
#else
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// Kernels on the current stream of a tensor's device, which is the current device as long as this lives.
class StreamLauncher {
 public:
  explicit StreamLauncher(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(dim3 grid, dim3 threads, void (*kernel)(Parameters...), Arguments... arguments) const {
    kernel<<<grid, threads, 0, stream_>>>(static_cast<Parameters>(arguments)...);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "a CUDA kernel did not start: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};
#endif
