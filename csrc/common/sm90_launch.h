// Starts Hopper kernels on a stream: what csrc/common/cuda_launch.h does, and the TensorMaps that TMA reads.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <torch/headeronly/util/Exception.h>

#include "common/sm90_maps.h"

class HopperLauncher {
 public:
  explicit HopperLauncher(cudaStream_t stream) : stream_(stream) {}

  // With dynamic shared memory, in bytes.
  template <class... Parameters, class... Arguments>
  void with_shared(dim3 grid, dim3 threads, int bytes, void (*kernel)(Parameters...), Arguments... arguments) const {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<grid, threads, bytes, stream_>>>(static_cast<Parameters>(arguments)...);
    check(cudaGetLastError());
  }

  // [batches, rows, columns] of 16-bit numbers in boxes of 64 columns, swizzled; strides in bytes.
  void encode(hopper::TensorMap& map, const void* data, long long row, long long batch, int columns, int rows,
              int batches, int box_rows) const {
    static_assert(sizeof(hopper::TensorMap) == sizeof(CUtensorMap), "a TensorMap is a CUtensorMap");
    const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                                 static_cast<cuuint64_t>(batches)};
    const cuuint64_t strides[2] = {static_cast<cuuint64_t>(row), static_cast<cuuint64_t>(batch)};
    const cuuint32_t box[3] = {hopper::kSlab, static_cast<cuuint32_t>(box_rows), 1}, steps[3] = {1, 1, 1};
    // The bits are copied as they are, whatever the type; zeros outside are zeros of both.
    const CUresult result = encoder()(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
                                      const_cast<void*>(data), sizes, strides, box, steps,
                                      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled returned ", static_cast<int>(result));
  }

 private:
  using Encoder = decltype(&cuTensorMapEncodeTiled);

  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "a CUDA kernel did not start: ", cudaGetErrorString(error));
  }

  // By name, so that the library loads without a driver.
  static Encoder encoder() {
    static const Encoder found = [] {
      void* function = nullptr;
      cudaDriverEntryPointQueryResult state;
      check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &state));
      STD_TORCH_CHECK(state == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled");
      return reinterpret_cast<Encoder>(function);
    }();
    return found;
  }

  cudaStream_t stream_;
};
