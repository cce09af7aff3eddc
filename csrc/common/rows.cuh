// Where the rows of a batch of matrices are; device code, free of torch and std headers.
#pragma once

#include "common/host_device.h"

// [B, N, width], strides in elements. Columns are adjacent; the matrix-instruction kernels read 16 bytes at a time: `at`
// is a multiple of 16 bytes, and width, batch and row are multiples of 8 elements.
template <class T>
struct Rows {
  T* at;
  long long batch, row;
  int width;

  // The matrix of one entry of the batch.
  CC4S_HOST_DEVICE Rows entry(int b) const { return {at + b * batch, batch, row, width}; }
};
