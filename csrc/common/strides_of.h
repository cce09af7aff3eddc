// The strides of a tensor with the pixels of images or maps; for launchers and CPU kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "common/strides.cuh"

// Of [B, C, H, W] or [B, H, W].
inline Strides strides_of(const torch::stable::Tensor& tensor) {
  const bool planar = tensor.dim() == 4;
  return {tensor.stride(0), planar ? tensor.stride(1) : 0, tensor.stride(planar ? 2 : 1),
          tensor.stride(planar ? 3 : 2)};
}
