// Where the values of a batch of images or maps are; device code, free of torch and std headers.
#pragma once

#include "common/host_device.h"

// In elements; a map has no channels.
struct Strides {
  long long batch, channel, row, column;

  CC4S_HOST_DEVICE long long at(long long b, int y, int x) const { return b * batch + y * row + x * column; }
};
