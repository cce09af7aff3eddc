// Runs CUDA device code on a CPU, for tests of its logic: one block at a time, one fiber per thread.
//
// Force-included before a `.cuh` (g++ -include). Barriers and warp collectives switch fibers; what a lane of a mask or a
// thread of a block never reaches ends the process with a message. `Launcher` starts kernels in the place of <<<>>>.
// With a seed, blocks and threads run in a random order, some warps only when the others can go no further, and a thread
// may be interrupted at each atomic: a missing barrier or an order that matters shows as a result that changes with the
// seed. An asynchronous copy happens when its thread waits for it, and dynamic shared memory starts as NaN: a missing wait
// shows. What it cannot show: races of plain loads and stores, speed, and whether PTX does what its twin here does.
// seed. What it cannot show: races of plain loads and stores, alignment, speed. `sm90_on_cpu.h` adds Hopper's copies and
// products.
#pragma once

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define CC4S_CUDA_ON_CPU

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using uint3 = dim3;

struct int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_on_cpu: block (%u, %u, %u), thread (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, threadIdx.y, threadIdx.z, message);
  std::abort();
}

enum class State { kReady, kBlockBarrier, kWarpBarrier, kPolling, kDone };

// A copy to shared memory that is on its way: it happens when its thread waits for it.
struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
};

// What a lane gives to a collective.
struct Value {
  uint64_t words[3] = {};
};

struct Fiber {
  static constexpr size_t kStack = 64 * 1024;

  ucontext_t context;  // where it starts
  jmp_buf place;       // where it goes on
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kDone;
  unsigned mask = 0;        // lanes that this one waits for
  Value values[2];          // what it gives to a collective, and to the one before
  unsigned collectives = 0;
  int vote = 0;  // what it gives to a block barrier
  std::vector<std::vector<Copy>> copies;  // by group; the last one is open
  std::function<bool()> ready;  // what it polls for
};

// Work of a block that runs beside its threads, such as copies.
struct Agent {
  virtual ~Agent() = default;
  virtual void start() = 0;
  // Does some of its work or none, all of it where random is null; whether it did any.
  virtual bool step(std::mt19937* random) = 0;
  // All threads have ended.
  virtual void finish() = 0;
};
inline Agent* agent = nullptr;

// The block that runs. Threads are numbered x first.
class Block {
 public:
  void run(dim3 shape, const std::function<void()>& body, std::mt19937* random) {
    shape_ = shape;
    count_ = shape.x * shape.y * shape.z;
    body_ = &body;
    random_ = random;
    while (fibers_.size() < count_) fibers_.push_back(std::make_unique<Fiber>());
    order_.resize(count_);
    std::iota(order_.begin(), order_.end(), 0u);
    for (unsigned i = 0; i < count_; ++i) {
      Fiber& fiber = *fibers_[i];
      fiber.state = State::kReady;
      fiber.started = false;
      fiber.collectives = 0;
      fiber.copies.assign(1, {});
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = Fiber::kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    if (agent != nullptr) agent->start();
    schedule();
    if (agent != nullptr) agent->finish();
  }

  // Until `ready()`.
  void poll(std::function<bool()> ready) {
    Fiber& fiber = *fibers_[current_];
    fiber.ready = std::move(ready);
    fiber.state = State::kPolling;
    leave();
  }
  unsigned thread() const { return current_; }

  // __syncthreads, and the number of threads whose vote is not 0.
  int block_barrier(int vote) {
    Fiber& fiber = *fibers_[current_];
    fiber.vote = vote;
    fiber.state = State::kBlockBarrier;
    leave();
    return votes_;
  }

  // Waits for the lanes of `mask`; then `lane_value` reads what each gave.
  void warp_barrier(unsigned mask, uint64_t value) { warp_barrier(mask, Value{{value}}); }
  void warp_barrier(unsigned mask, const Value& value) {
    if ((mask >> lane() & 1u) == 0) fail("a lane calls a collective whose mask does not name it");
    Fiber& fiber = *fibers_[current_];
    fiber.values[++fiber.collectives & 1] = value;
    fiber.mask = mask;
    fiber.state = State::kWarpBarrier;
    leave();
  }
  uint64_t lane_value(unsigned lane) const { return lane_values(lane).words[0]; }
  const Value& lane_values(unsigned lane) const {
    const Fiber& mine = *fibers_[current_];
    if ((mine.mask >> lane & 1u) == 0) return mine.values[mine.collectives & 1];
    const Fiber& other = *fibers_[current_ / 32 * 32 + lane];
    // One that has gone on to the next collective has this one's value in the other place.
    return other.values[(last_[current_ / 32 * 32 + lane]) & 1];
  }
  unsigned lane() const { return current_ % 32; }

  void copy_async(const Copy& copy) { fibers_[current_]->copies.back().push_back(copy); }
  void commit_copies() { fibers_[current_]->copies.emplace_back(); }
  // All but the last `groups` groups happen now.
  void wait_for_copies(size_t groups) {
    auto& copies = fibers_[current_]->copies;
    while (copies.size() > groups + 1) {
      for (const Copy& copy : copies.front()) {
        if (copy.from == nullptr) {
          std::memset(copy.to, 0, copy.bytes);
        } else {
          std::memcpy(copy.to, copy.from, copy.bytes);
        }
      }
      copies.erase(copies.begin());
    }
  }

  // At an atomic: lets others go first now and then.
  void interrupt() {
    if (random_ != nullptr && (*random_)() % 4 == 0) leave();
  }

 private:
  static void enter();

  // As swapcontext, without its system call.
  __attribute__((noinline)) static void jump(jmp_buf& from, jmp_buf& to) {
    if (_setjmp(from) == 0) _longjmp(to, 1);
  }
  __attribute__((noinline)) void start(Fiber& fiber) {
    fiber.started = true;
    if (_setjmp(scheduler_) == 0) setcontext(&fiber.context);
  }

  void leave() { jump(fibers_[current_]->place, scheduler_); }

  void schedule() {
    choose_slow_warps();
    for (;;) {
      if (random_ != nullptr) std::shuffle(order_.begin(), order_.end(), *random_);
      bool ran = false;
      for (const unsigned i : order_) {
        if (slow_[i / 32]) continue;
        if (fibers_[i]->state == State::kPolling && fibers_[i]->ready()) fibers_[i]->state = State::kReady;
        if (fibers_[i]->state != State::kReady) continue;
        ran = true;
        resume(i);
      }
      const bool warps = release_warps();
      // Beside the threads now and then, and where these can go no further.
      const bool now = random_ == nullptr || (*random_)() % 4 == 0 || !(ran || warps);
      const bool beside = agent != nullptr && now && agent->step(random_);
      if (ran || warps || beside) continue;
      if (std::find(slow_.begin(), slow_.end(), true) != slow_.end()) {
        std::fill(slow_.begin(), slow_.end(), false);
        continue;
      }
      if (!release_block()) return;
      choose_slow_warps();
    }
  }

  // Until all others wait at the next block barrier or have ended.
  void choose_slow_warps() {
    slow_.assign((count_ + 31) / 32, false);
    if (random_ == nullptr) return;
    for (size_t warp = 0; warp < slow_.size(); ++warp) slow_[warp] = (*random_)() % 4 == 0;
  }

  void resume(unsigned i) {
    current_ = i;
    threadIdx = {i % shape_.x, i / shape_.x % shape_.y, i / shape_.x / shape_.y};
    Fiber& fiber = *fibers_[i];
    if (fiber.started) {
      jump(scheduler_, fiber.place);
    } else {
      start(fiber);
    }
  }

  bool release_warps() {
    bool any = false;
    for (unsigned i = 0; i < count_; ++i) {
      if (fibers_[i]->state != State::kWarpBarrier) continue;
      const unsigned mask = fibers_[i]->mask, first = i / 32 * 32;
      bool all = true;
      for (unsigned lane = 0; lane < 32; ++lane) {
        if ((mask >> lane & 1u) == 0) continue;
        current_ = i;
        if (first + lane >= count_) fail("a mask names a lane that the block does not have");
        const Fiber& other = *fibers_[first + lane];
        if (other.state == State::kDone) fail("a mask names a lane that has ended");
        all = all && other.state == State::kWarpBarrier && other.mask == mask;
      }
      if (!all) continue;
      any = true;
      last_.resize(fibers_.size());
      for (unsigned lane = 0; lane < 32; ++lane) {
        if ((mask >> lane & 1u) == 0) continue;
        fibers_[first + lane]->state = State::kReady;
        last_[first + lane] = fibers_[first + lane]->collectives;
      }
    }
    return any;
  }

  // False where all threads have ended.
  bool release_block() {
    unsigned waiting = 0, live = 0;
    votes_ = 0;
    for (unsigned i = 0; i < count_; ++i) {
      const Fiber& fiber = *fibers_[i];
      live += fiber.state != State::kDone;
      waiting += fiber.state == State::kBlockBarrier;
      votes_ += fiber.state == State::kBlockBarrier && fiber.vote != 0;
      if (fiber.state == State::kWarpBarrier) {
        current_ = i;
        fail("a lane waits in a collective that the others of its mask do not reach");
      }
      if (fiber.state == State::kPolling) {
        current_ = i;
        threadIdx = {i % shape_.x, i / shape_.x % shape_.y, i / shape_.x / shape_.y};
        fail("a thread waits for what never comes");
      }
    }
    for (unsigned i = 0; i < count_; ++i) {
      if (fibers_[i]->state == State::kBlockBarrier) fibers_[i]->state = State::kReady;
    }
    return live > 0 && waiting == live;
  }

  dim3 shape_;
  unsigned count_ = 0, current_ = 0;
  int votes_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::mt19937* random_ = nullptr;
  jmp_buf scheduler_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<unsigned> order_, last_;
  std::vector<bool> slow_;  // by warp
};

inline Block block;

inline void Block::enter() {
  (*block.body_)();
  block.fibers_[block.current_]->state = State::kDone;
  _longjmp(block.scheduler_, 1);
}

// Told of each launch: the kernel's symbol, its grid and threads (six numbers), its arguments and their bytes.
using Listener = void (*)(const char* symbol, const unsigned* shape, void** arguments, const size_t* bytes,
                          size_t count);
inline Listener listener = nullptr;
// Kernels that were started once, by symbol; they take their arguments as cuLaunchKernel does.
inline std::map<std::string, std::function<void(dim3, dim3, void**)>> started;

constexpr size_t kMostShared = 227 * 1024;
alignas(1024) inline unsigned char shared_memory[kMostShared];
inline size_t shared_bytes = 0;
inline unsigned char* dynamic_shared() { return shared_memory; }

// Starts kernels. seed 0: in ascending order; otherwise in an order drawn from it.
class Launcher {
 public:
  explicit Launcher(unsigned seed = 0, int most_shared = kMostShared)
      : seed_(seed), random_(seed), most_shared_(most_shared) {}

  int most_shared() const { return most_shared_; }

  // With dynamic shared memory, in bytes. Every block finds it full of NaN.
  template <class... Parameters, class... Arguments>
  void with_shared(dim3 grid, dim3 threads, int bytes, void (*kernel)(Parameters...), Arguments... arguments) {
    if (bytes > most_shared_) fail("more shared memory than the device has");
    shared_bytes = static_cast<size_t>(bytes);
    (*this)(grid, threads, kernel, arguments...);
    shared_bytes = 0;
  }

  template <class... Parameters, class... Arguments>
  void operator()(dim3 grid, dim3 threads, void (*kernel)(Parameters...), Arguments... arguments) {
    std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
    if (listener != nullptr) tell(grid, threads, kernel, values);
    run(grid, threads, [&] { std::apply(kernel, values); });
  }

 private:
  template <class... Parameters>
  static void tell(dim3 grid, dim3 threads, void (*kernel)(Parameters...), std::tuple<Parameters...>& values) {
    Dl_info info{};
    if (dladdr(reinterpret_cast<const void*>(kernel), &info) == 0) fail("a kernel without a symbol");
    const unsigned shape[] = {grid.x, grid.y, grid.z, threads.x, threads.y, threads.z};
    const size_t bytes[] = {sizeof(Parameters)...};
    void* pointers[sizeof...(Parameters)];
    void** pointer = pointers;
    std::apply([&](auto&... value) { ((__builtin_clear_padding(&value), *pointer++ = &value), ...); }, values);
    listener(info.dli_sname, shape, pointers, bytes, sizeof...(Parameters));
    started[info.dli_sname] = [kernel](dim3 grid, dim3 threads, void** arguments) {
      std::tuple<Parameters*...> values;
      const auto start = [&](auto*&... value) {
        ((value = static_cast<std::remove_reference_t<decltype(value)>>(*arguments++)), ...);
        Launcher()(grid, threads, kernel, *value...);
      };
      std::apply(start, values);
    };
  }

  void run(dim3 grid, dim3 threads, const std::function<void()>& body) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) fail("an empty grid");
    if (threads.x * threads.y * threads.z > 1024 || threads.x * threads.y * threads.z == 0) fail("a block of this size");
    if (grid.y > 65535 || grid.z > 65535) fail("a grid of this size");
    gridDim = grid;
    blockDim = threads;
    std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), uint64_t{0});
    if (seed_ != 0) std::shuffle(blocks.begin(), blocks.end(), random_);
    for (const uint64_t i : blocks) {
      blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / grid.x / grid.y)};
      std::memset(shared_memory, 0xff, shared_bytes);
      block.run(threads, body, seed_ == 0 ? nullptr : &random_);
    }
  }

  unsigned seed_;
  std::mt19937 random_;
  int most_shared_;
};

// For the test of kernels that are compiled at run time.
extern "C" __attribute__((used)) inline void listen(Listener listener) { cuda_on_cpu::listener = listener; }
extern "C" __attribute__((used)) inline int launch(const char* symbol, const unsigned* shape, void** arguments) {
  const auto found = started.find(symbol);
  if (found == started.end()) return 1;
  found->second({shape[0], shape[1], shape[2]}, {shape[3], shape[4], shape[5]}, arguments);
  return 0;
}

template <class T>
uint64_t bits(T value) {
  static_assert(sizeof(T) <= 8, "collectives take up to 8 bytes");
  uint64_t out = 0;
  std::memcpy(&out, &value, sizeof(T));
  return out;
}
template <class T>
T from_bits(uint64_t value) {
  T out;
  std::memcpy(&out, &value, sizeof(T));
  return out;
}

template <class T, class Function>
T reduce(unsigned mask, T value, Function function) {
  block.warp_barrier(mask, bits(value));
  bool first = true;
  T out{};
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    const T other = from_bits<T>(block.lane_value(lane));
    out = first ? other : function(out, other);
    first = false;
  }
  return out;
}

template <class T, class Function>
T update(T* address, Function function) {
  block.interrupt();
  const T old = *address;
  *address = function(old);
  return old;
}

// 16-bit numbers, by their bits, rounded to nearest and ties to even.
inline float float_of_bfloat16(unsigned short x) { return from_bits<float>(uint64_t{x} << 16); }
inline unsigned short bfloat16_of(float x) {
  const uint32_t b = static_cast<uint32_t>(bits(x));
  if (std::isnan(x)) return static_cast<unsigned short>(b >> 16 | 0x40u);
  return static_cast<unsigned short>((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
}
inline float float_of_half(unsigned short x) {
  const uint64_t sign = uint64_t{x & 0x8000u} << 16, size = uint64_t{x & 0x7fffu} << 13;
  // The exponent of infinities and NaN is the largest there too.
  if ((x & 0x7c00u) == 0x7c00u) return from_bits<float>(sign | size | 0x7f800000u);
  return from_bits<float>(sign | bits(from_bits<float>(size) * 0x1p112f));
}
inline unsigned short half_of(float x) {
  const unsigned sign = static_cast<unsigned>(bits(x)) >> 16 & 0x8000u;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7fffu;
  // Halfway between the largest number and the next power of two.
  if (size >= 65520.0f) return static_cast<unsigned short>(sign | 0x7c00u);
  if (size < 0x1p-14f) return static_cast<unsigned short>(sign | static_cast<unsigned>(std::nearbyint(size * 0x1p24f)));
  const uint32_t b = static_cast<uint32_t>(bits(size));
  return static_cast<unsigned short>(sign | ((b + 0xfffu + (b >> 13 & 1u) - (112u << 23)) >> 13));
}

// The instructions that csrc/common/mma_sm80.cuh wraps.
inline void copy_async(void* to, const void* from, size_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0) fail("a copy is not aligned");
  block.copy_async({to, from, bytes});
}
inline void commit_copies() { block.commit_copies(); }
inline void wait_for_copies(size_t groups) { block.wait_for_copies(groups); }

// ldmatrix.x4: lane l gives row l % 8 of matrix l / 8.
inline void load_matrices(unsigned (&out)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("a row of a matrix is not aligned");
  block.warp_barrier(0xffffffffu, bits(row));
  const unsigned lane = block.lane();
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    unsigned short pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned major = lane / 4, minor = 2 * (lane % 4) + i;
      const unsigned r = transposed ? minor : major, c = transposed ? major : minor;
      const auto* values = from_bits<const unsigned short*>(block.lane_value(8 * matrix + r));
      pair[i] = values[c];
    }
    out[matrix] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
  }
}

// mma.m16n8k16 with float32 sums; widen: float of the bits.
template <class Widen>
void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Widen widen) {
  const auto two = [](unsigned low, unsigned high) { return low | uint64_t{high} << 32; };
  block.warp_barrier(0xffffffffu, Value{{two(a[0], a[1]), two(a[2], a[3]), two(b0, b1)}});
  const unsigned lane = block.lane();
  // value i of a row of registers
  const auto half = [&](uint64_t word, unsigned i) {
    return widen(static_cast<unsigned short>(word >> (16 * i)));
  };
  for (unsigned k = 0; k < 16; ++k) {
    const unsigned holder = k % 8 / 2, odd = k % 2, upper = k / 8;
    const Value& left = block.lane_values(lane / 4 * 4 + holder);
    float right[2];
    for (unsigned i = 0; i < 2; ++i) {
      right[i] = half(block.lane_values((2 * (lane % 4) + i) * 4 + holder).words[2], 2 * upper + odd);
    }
    for (unsigned h = 0; h < 2; ++h) {
      const float value = half(left.words[upper], 2 * h + odd);
      for (unsigned i = 0; i < 2; ++i) c[2 * h + i] += value * right[i];
    }
  }
}

}  // namespace cuda_on_cpu

// Barriers and fences.
inline void __syncthreads() { cuda_on_cpu::block.block_barrier(0); }
inline int __syncthreads_or(int vote) { return cuda_on_cpu::block.block_barrier(vote) > 0; }
inline int __syncthreads_count(int vote) { return cuda_on_cpu::block.block_barrier(vote); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::block.warp_barrier(mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Warp collectives.
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  cuda_on_cpu::block.warp_barrier(mask, cuda_on_cpu::bits(value));
  const unsigned own = cuda_on_cpu::block.lane();
  return cuda_on_cpu::from_bits<T>(cuda_on_cpu::block.lane_value(own / width * width + lane % width));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  cuda_on_cpu::block.warp_barrier(mask, cuda_on_cpu::bits(value));
  const unsigned own = cuda_on_cpu::block.lane(), from = own ^ static_cast<unsigned>(lanes);
  return cuda_on_cpu::from_bits<T>(cuda_on_cpu::block.lane_value(from / width == own / width ? from : own));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  cuda_on_cpu::block.warp_barrier(mask, cuda_on_cpu::bits(value));
  const unsigned own = cuda_on_cpu::block.lane();
  return cuda_on_cpu::from_bits<T>(cuda_on_cpu::block.lane_value(own % width >= delta ? own - delta : own));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  cuda_on_cpu::block.warp_barrier(mask, cuda_on_cpu::bits(value));
  const unsigned own = cuda_on_cpu::block.lane();
  return cuda_on_cpu::from_bits<T>(cuda_on_cpu::block.lane_value(own % width + delta < unsigned(width) ? own + delta : own));
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  const unsigned bit = vote != 0 ? 1u << cuda_on_cpu::block.lane() : 0u;
  return cuda_on_cpu::reduce(mask, bit, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  cuda_on_cpu::block.warp_barrier(mask, cuda_on_cpu::bits(value));
  unsigned same = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) != 0 && cuda_on_cpu::block.lane_value(lane) == cuda_on_cpu::bits(value)) same |= 1u << lane;
  }
  return same;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return cuda_on_cpu::reduce(mask, value, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return cuda_on_cpu::reduce(mask, value, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return cuda_on_cpu::reduce(mask, value, [](T a, T b) { return a < b ? b : a; });
}

// Atomics. The types are those that the device has.
#define CUDA_ON_CPU_ATOMIC(type)                                                                                     \
  inline type atomicAdd(type* at, type by) { return cuda_on_cpu::update(at, [=](type old) { return old + by; }); }    \
  inline type atomicMin(type* at, type by) { return cuda_on_cpu::update(at, [=](type old) { return old < by ? old : by; }); } \
  inline type atomicMax(type* at, type by) { return cuda_on_cpu::update(at, [=](type old) { return old < by ? by : old; }); } \
  inline type atomicOr(type* at, type by) { return cuda_on_cpu::update(at, [=](type old) { return old | by; }); }     \
  inline type atomicExch(type* at, type by) { return cuda_on_cpu::update(at, [=](type) { return by; }); }             \
  inline type atomicCAS(type* at, type expected, type by) {                                                           \
    return cuda_on_cpu::update(at, [=](type old) { return old == expected ? by : old; });                             \
  }
CUDA_ON_CPU_ATOMIC(int)
CUDA_ON_CPU_ATOMIC(unsigned)
CUDA_ON_CPU_ATOMIC(unsigned long long)
#undef CUDA_ON_CPU_ATOMIC

// Integer and float intrinsics.
template <class T>
T __ldg(const T* at) {
  return *at;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::from_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(cuda_on_cpu::bits(x)); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu::from_bits<long long>(cuda_on_cpu::bits(x)); }
inline double __longlong_as_double(long long x) { return cuda_on_cpu::from_bits<double>(cuda_on_cpu::bits(x)); }
using std::max;
using std::min;
