// Sets as trees of parents, roots of which are their own; device code, free of torch and std headers.
#pragma once

__device__ __forceinline__ int load(const int* at) { return *static_cast<const volatile int*>(at); }
__device__ __forceinline__ void store(int* at, int value) { *static_cast<volatile int*>(at) = value; }

// The root of i. Shortens the way while others unite: what is stored here is an ancestor of i and stays one, and i is
// no root, where alone others may write anything else.
__device__ __forceinline__ int find(int* parent, int i) {
  for (;;) {
    const int up = load(parent + i);
    if (up == i) return i;
    const int next = load(parent + up);
    if (next == up) return up;
    store(parent + i, next);
    i = next;
  }
}
