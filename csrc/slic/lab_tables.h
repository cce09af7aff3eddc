// The colours of SLIC in integers, step 1 of docs/kernels/slic.md; also device code, free of std headers.
#pragma once

#include "common/host_device.h"

namespace cc4s {

// round(2^16 linear(s / 255)) of the sRGB transfer function, for s = 0 .. 255.
CC4S_TABLE int kLinear[256] = {
    0, 20, 40, 60, 80, 99, 119, 139, 159, 179, 199, 219, 241, 264, 288, 313,
    340, 367, 396, 427, 458, 491, 526, 562, 599, 637, 677, 718, 761, 805, 851, 898,
    947, 997, 1048, 1101, 1156, 1212, 1270, 1330, 1391, 1453, 1517, 1583, 1651, 1720, 1791, 1863,
    1937, 2013, 2090, 2170, 2250, 2333, 2418, 2504, 2592, 2681, 2773, 2866, 2961, 3058, 3157, 3258,
    3360, 3464, 3570, 3678, 3788, 3900, 4014, 4129, 4247, 4366, 4488, 4611, 4736, 4864, 4993, 5124,
    5257, 5392, 5530, 5669, 5810, 5953, 6099, 6246, 6395, 6547, 6701, 6856, 7014, 7174, 7336, 7500,
    7666, 7834, 8004, 8177, 8352, 8529, 8708, 8889, 9072, 9258, 9446, 9636, 9828, 10022, 10219, 10418,
    10619, 10822, 11028, 11236, 11446, 11658, 11873, 12090, 12309, 12531, 12754, 12981, 13209, 13440, 13673, 13909,
    14147, 14387, 14629, 14874, 15122, 15372, 15624, 15878, 16135, 16394, 16656, 16920, 17187, 17456, 17727, 18001,
    18278, 18556, 18838, 19121, 19408, 19696, 19988, 20281, 20578, 20876, 21178, 21481, 21788, 22096, 22408, 22722,
    23038, 23357, 23679, 24003, 24329, 24659, 24991, 25325, 25662, 26002, 26344, 26689, 27036, 27387, 27739, 28095,
    28453, 28813, 29177, 29543, 29911, 30283, 30657, 31033, 31413, 31795, 32180, 32567, 32957, 33350, 33746, 34144,
    34545, 34949, 35355, 35765, 36177, 36591, 37009, 37429, 37852, 38278, 38707, 39138, 39572, 40009, 40449, 40892,
    41337, 41786, 42237, 42691, 43147, 43607, 44069, 44534, 45003, 45474, 45947, 46424, 46904, 47386, 47871, 48360,
    48851, 49345, 49842, 50342, 50844, 51350, 51859, 52370, 52884, 53402, 53922, 54445, 54972, 55501, 56033, 56568,
    57106, 57647, 58191, 58738, 59288, 59841, 60397, 60956, 61518, 62083, 62651, 63222, 63796, 64373, 64953, 65536,
};

constexpr int kCubeRootSteps = 1 << 14;

// round(2^15 f(t / 2^14)) with f of CIE Lab, t from 0 to 2^14. Integers decide, from any guess of the cube root.
CC4S_HOST_DEVICE inline int lab_root(int t, int guess) {
  // 841/108 u + 4/29 over the common denominator 3132, times 2^15, rounded.
  if (t * 24389 <= 216 * kCubeRootSteps) return (2 * (2 * t * 24389 + 432 * (1 << 15)) + 3132) / (2 * 3132);
  // The largest root with (2 root - 1)^3 2^14 <= 2^48 t, which is 2^15 cbrt(t / 2^14) rounded.
  const long long bound = static_cast<long long>(t) << 34;
  long long twice = 2LL * guess;
  while ((twice + 1) * (twice + 1) * (twice + 1) <= bound) twice += 2;
  while ((twice - 1) * (twice - 1) * (twice - 1) > bound) twice -= 2;
  return static_cast<int>(twice / 2);
}

// In 1/64; a and b shifted by 128. l is at most 6400, all three are from 0 to 2^14.
struct Lab {
  int l, a, b;
};

// Of linear values of kLinear; root(t) is the rounded root above.
template <class Root>
CC4S_HOST_DEVICE inline Lab lab_of(int red, int green, int blue, Root root) {
  const int fx = root((1777 * red + 1541 * green + 778 * blue + (1 << 13)) >> 14);
  const int fy = root((871 * red + 2929 * green + 296 * blue + (1 << 13)) >> 14);
  const int fz = root((73 * red + 448 * green + 3575 * blue + (1 << 13)) >> 14);
  return {((7424 * fy + (1 << 14)) >> 15) - 1024, (32000 * (fx - fy) + (1 << 28) + (1 << 14)) >> 15,
          (12800 * (fy - fz) + (1 << 28) + (1 << 14)) >> 15};
}

}  // namespace cc4s
