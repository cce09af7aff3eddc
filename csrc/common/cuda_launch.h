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
  explicit StreamLauncher(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(dim3 grid, dim3 threads, void (*kernel)(Parameters...), Arguments... arguments) const {
    kernel<<<grid, threads, 0, stream_>>>(static_cast<Parameters>(arguments)...);
    check(cudaGetLastError());
  }

  // With dynamic shared memory, in bytes.
  template <class... Parameters, class... Arguments>
  void with_shared(dim3 grid, dim3 threads, int bytes, void (*kernel)(Parameters...), Arguments... arguments) const {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<grid, threads, bytes, stream_>>>(static_cast<Parameters>(arguments)...);
    check(cudaGetLastError());
  }

  // Bytes of shared memory that a block may have.
  int most_shared() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  // Whether the device's compute capability is 9.0, the one of wgmma.
  bool is_sm90() const {
    return attribute(cudaDevAttrComputeCapabilityMajor) == 9 && attribute(cudaDevAttrComputeCapabilityMinor) == 0;
  }

  cudaStream_t stream() const { return stream_; }

 private:
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "a CUDA kernel did not start: ", cudaGetErrorString(error));
  }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }

  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};
#endif
