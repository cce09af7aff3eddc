// Small kernels that show what cuda_on_cpu.h does; expected values stand in test_header.py.

constexpr unsigned kAll = 0xffffffffu, kFirst20 = 0xfffffu;

// out [blocks, threads]: the values of each block in reverse.
template <bool barrier>
__global__ void reverse(const int* in, int* out) {
  __shared__ int values[64];
  const unsigned i = blockIdx.x * blockDim.x;
  values[threadIdx.x] = in[i + threadIdx.x];
  if (barrier) __syncthreads();
  out[i + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = -1;
}

// For one warp; out [6, 32].
__global__ void shuffles(const double* in, double* out) {
  const unsigned lane = threadIdx.x;
  const double value = in[lane];
  out[lane] = __shfl_sync(kAll, value, 5);
  out[32 + lane] = __shfl_sync(kAll, value, 3, 8);
  out[64 + lane] = __shfl_up_sync(kAll, value, 3u);
  out[96 + lane] = __shfl_down_sync(kAll, value, 3u, 16);
  out[128 + lane] = __shfl_xor_sync(kAll, value, 6);
  out[160 + lane] = __shfl_xor_sync(kAll, value, 16, 16);
}

// Two warps, of which the first 20 lanes take part; out [7, 64].
__global__ void votes(const int* in, int* out) {
  const unsigned i = threadIdx.x;
  if (i % 32 >= 20) return;
  out[i] = static_cast<int>(__ballot_sync(kFirst20, in[i] > 3));
  out[64 + i] = __any_sync(kFirst20, in[i] > 8);
  out[128 + i] = __all_sync(kFirst20, in[i] >= 0);
  out[192 + i] = static_cast<int>(__match_any_sync(kFirst20, in[i]));
  out[256 + i] = __reduce_add_sync(kFirst20, in[i]);
  out[320 + i] = __reduce_min_sync(kFirst20, in[i]);
  out[384 + i] = __reduce_max_sync(kFirst20, in[i]);
}

// One block of 8 x 4 x 2 threads; out [2, 64].
__global__ void block_votes(const int* in, int* out) {
  const unsigned i = threadIdx.x + 8 * threadIdx.y + 32 * threadIdx.z;
  out[i] = __syncthreads_count(in[i] > 3);
  out[64 + i] = __syncthreads_or(in[i] > 8);
}

// totals [6]: number, smallest, largest, bits, the last to be exchanged, the first to come. tickets [threads].
__global__ void atomics(const int* in, int* totals, int* tickets) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  tickets[i] = atomicAdd(&totals[0], 1);
  atomicMin(&totals[1], in[i]);
  atomicMax(&totals[2], in[i]);
  atomicOr(&totals[3], 1 << in[i]);
  atomicExch(&totals[4], in[i]);
  atomicCAS(&totals[5], -1, in[i]);
}

// One thread copies in [2, 4] in two groups of 16 bytes; out [4]: what is there with so many of them waited for.
__global__ void copies(const int* in, int* out, int groups) {
  auto* const to = reinterpret_cast<int*>(cuda_on_cpu::dynamic_shared());
  for (int i = 0; i < 2; ++i) {
    cuda_on_cpu::copy_async(to + 4 * i, i == 0 ? in : nullptr, 16);
    cuda_on_cpu::commit_copies();
  }
  if (groups > 0) cuda_on_cpu::wait_for_copies(2 - groups);
  for (int i = 0; i < 4; ++i) out[i] = to[2 * i];
}

// Errors that a GPU may or may not forgive.
__global__ void half_of_a_warp() {
  if (threadIdx.x % 2 == 0) __ballot_sync(kAll, 1);
}
__global__ void not_in_the_mask() { __ballot_sync(kFirst20, 1); }
__global__ void two_barriers() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

template <class... Arguments>
static void launch(unsigned seed, dim3 grid, dim3 threads, Arguments... arguments) {
  cuda_on_cpu::Launcher launcher(seed);
  launcher(grid, threads, arguments...);
}

extern "C" {
void run_reverse(const int* in, int* out, int barrier, unsigned seed) {
  launch(seed, dim3(3), dim3(64), barrier ? reverse<true> : reverse<false>, in, out);
}
void run_shuffles(const double* in, double* out, unsigned seed) {
  launch(seed, dim3(1), dim3(32), shuffles, in, out);
}
void run_votes(const int* in, int* out, unsigned seed) {
  launch(seed, dim3(1), dim3(64), votes, in, out);
}
void run_block_votes(const int* in, int* out, unsigned seed) {
  launch(seed, dim3(1), dim3(8, 4, 2), block_votes, in, out);
}
void run_atomics(const int* in, int* totals, int* tickets, unsigned seed) {
  launch(seed, dim3(2), dim3(32), atomics, in, totals, tickets);
}
void run_copies(const int* in, int* out, int groups, unsigned seed) {
  cuda_on_cpu::Launcher(seed).with_shared(dim3(1), dim3(1), 64, copies, in, out, groups);
}
// Of all 2^16 bits as bfloat16 and float16, out [2, 65536]; and back from floats.
void widen_all(float* out) {
  for (int i = 0; i < 65536; ++i) {
    out[i] = cuda_on_cpu::float_of_bfloat16(static_cast<unsigned short>(i));
    out[65536 + i] = cuda_on_cpu::float_of_half(static_cast<unsigned short>(i));
  }
}
void round_all(const float* in, unsigned short* bfloat16, unsigned short* half, int count) {
  for (int i = 0; i < count; ++i) {
    bfloat16[i] = cuda_on_cpu::bfloat16_of(in[i]);
    half[i] = cuda_on_cpu::half_of(in[i]);
  }
}
void run_half_of_a_warp() { launch(0, dim3(1), dim3(32), half_of_a_warp); }
void run_not_in_the_mask() { launch(0, dim3(1), dim3(32), not_in_the_mask); }
void run_two_barriers() { launch(0, dim3(1), dim3(32), two_barriers); }
void run_no_blocks() { launch(0, dim3(0), dim3(32), not_in_the_mask); }
void run_large_block() { launch(0, dim3(1), dim3(32, 33), not_in_the_mask); }
}
