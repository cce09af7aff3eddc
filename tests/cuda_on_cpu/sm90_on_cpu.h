// The instructions of csrc/common/sm90.cuh on a CPU; to be included before it.
//
// Copies and products run beside the threads: with seed 0 as soon as they can, otherwise at a moment drawn from the seed,
// at the latest when no thread can go on. Products read their descriptors and their operands, in shared memory or in
// registers, when they run; sums are NaN from the product until the wait for it. A wait that nothing ends, products
// that differ between threads, that are not fenced or that nobody waits for end the process with a message. What it
// cannot show: proxy fences, limits of registers, speed.
#pragma once

#include <algorithm>
#include <limits>
#include <map>

#include "common/mma_sm80.cuh"

#define __grid_constant__

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace hopper {

struct TensorMap;
using Barrier = unsigned long long;

namespace on_cpu {

using cuda_on_cpu::block;
using cuda_on_cpu::fail;

constexpr size_t kShared = cuda_on_cpu::kMostShared;
inline char* const shared = reinterpret_cast<char*>(cuda_on_cpu::shared_memory);

// ---- barriers: their state is their eight bytes

struct State {
  int64_t bytes : 24;  // of copies to come, negative where they came before they were expected
  uint64_t pending : 12, arrivals : 12, parity : 1, valid : 15;
};
static_assert(sizeof(State) == 8);
constexpr unsigned kValid = 0x5a5a;

inline State* state_of(Barrier* barrier) {
  State* state = reinterpret_cast<State*>(barrier);
  if (state->valid != kValid) fail("a barrier that was not set up");
  return state;
}
inline void complete(State* state) {
  if (state->pending != 0 || state->bytes != 0) return;
  state->pending = state->arrivals;
  state->parity ^= 1;
}

// ---- copies

// What a TensorMap holds on a CPU. Strides in bytes.
struct Map {
  const char* data;
  long long row, batch;
  int columns, rows, batches, box_columns, box_rows;
};

struct Copy {
  Map map;
  char* tile;
  Barrier* barrier;
  int column, row, batch;

  void run() const {
    for (int r = 0; r < map.box_rows; ++r) {
      for (int c = 0; c < map.box_columns; ++c) {
        uint16_t value = 0;
        const bool inside = row + r >= 0 && row + r < map.rows && column + c < map.columns && batch < map.batches;
        if (inside) std::memcpy(&value, map.data + batch * map.batch + (row + r) * map.row + 2 * (column + c), 2);
        std::memcpy(shared + swizzled(static_cast<unsigned>(tile - shared) + r * 128 + c * 2), &value, 2);
      }
    }
    State* state = state_of(barrier);
    state->bytes -= map.box_rows * map.box_columns * 2;
    complete(state);
  }

  // Bits 4 to 6 of an address are combined with bits 7 to 9.
  static unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7u) << 4; }
};

// ---- products

struct Product {
  float (*widen)(unsigned short);
  bool registers, add;
  int columns;
  uint64_t a, b;
  unsigned issued = 0;  // threads
  float* sums[128] = {};
  const unsigned* operands[128] = {};

  bool same(const Product& o) const {
    return widen == o.widen && registers == o.registers && add == o.add && columns == o.columns && a == o.a && b == o.b;
  }
};

// Sums of a thread that products still write to.
struct Pending {
  std::vector<float> values;
  size_t last;  // product
};

struct Warpgroup {
  std::vector<Product> products;
  size_t done = 0;
  size_t issued[128] = {};                       // products, by thread
  std::vector<size_t> groups[128];               // products before the end of each group, by thread
  bool fenced[128] = {};
  std::map<float*, Pending> pending[128];

  void issue(Product product, float* sums, const unsigned* operand) {
    const unsigned thread = block.thread() % 128;
    if (!fenced[thread]) fail("a product without a fence after the last wait");
    const size_t index = issued[thread]++;
    if (index == products.size()) products.push_back(product);
    Product& mine = products[index];
    if (!mine.same(product)) fail("the threads of a warpgroup start different products");
    ++mine.issued;
    mine.sums[thread] = sums;
    mine.operands[thread] = operand;
    const int count = product.columns / 2;
    auto [found, fresh] = pending[thread].try_emplace(sums);
    if (fresh) {
      found->second.values.assign(sums, sums + count);
      std::fill(sums, sums + count, std::numeric_limits<float>::quiet_NaN());
    }
    found->second.last = index;
  }

  bool step() {
    if (done == products.size() || products[done].issued != 128) return false;
    run(products[done++]);
    return true;
  }

  void run(const Product& p) {
    const int columns = p.columns;
    float a[64][16];
    std::vector<float> b(static_cast<size_t>(columns) * 16), d(64 * static_cast<size_t>(columns));  // [16, N], [64, N]
    for (int row = 0; row < 64; ++row) {
      for (int k = 0; k < 16; ++k) {
        const int thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2, word = k / 8 * 2 + row % 16 / 8;
        const uint16_t bits = p.registers ? static_cast<uint16_t>(p.operands[thread][word] >> k % 2 * 16) : by_columns(p.a, row, k);
        a[row][k] = p.widen(bits);
      }
    }
    for (int column = 0; column < columns; ++column) {
      for (int k = 0; k < 16; ++k) {
        b[static_cast<size_t>(k) * columns + column] = p.widen(p.registers ? by_rows(p.b, k, column) : by_columns(p.b, column, k));
      }
    }
    for (int thread = 0; thread < 128; ++thread) {
      const float* from = pending[thread].at(p.sums[thread]).values.data();
      for (int i = 0; i < columns / 2; ++i) d[place(thread, i, columns)] = p.add ? from[i] : 0.0f;
    }
    for (int row = 0; row < 64; ++row) {
      float* __restrict__ sums = &d[static_cast<size_t>(row) * columns];
      for (int k = 0; k < 16; ++k) {
        const float* __restrict__ factors = &b[static_cast<size_t>(k) * columns];
        for (int column = 0; column < columns; ++column) sums[column] += a[row][k] * factors[column];
      }
    }
    for (int thread = 0; thread < 128; ++thread) {
      float* to = pending[thread].at(p.sums[thread]).values.data();
      for (int i = 0; i < columns / 2; ++i) to[i] = d[place(thread, i, columns)];
    }
  }

  static size_t place(int thread, int i, int columns) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    return static_cast<size_t>(row) * columns + column;
  }

  // Fields of a descriptor, in bytes.
  static unsigned start(uint64_t d) { return static_cast<unsigned>(d & 0x3fff) << 4; }
  static unsigned leading(uint64_t d) { return static_cast<unsigned>(d >> 16 & 0x3fff) << 4; }
  static unsigned stride(uint64_t d) { return static_cast<unsigned>(d >> 32 & 0x3fff) << 4; }
  static uint16_t read(uint64_t descriptor, unsigned offset) {
    if (descriptor >> 62 != 1) fail("an operand without the 128-byte swizzle");
    const unsigned at = Copy::swizzled(start(descriptor) + offset);
    if (at + 2 > kShared) fail("an operand outside shared memory");
    uint16_t bits;
    std::memcpy(&bits, shared + at, 2);
    return bits;
  }
  // The operand is K-major: rows of 128 bytes, groups of eight rows `stride` apart.
  static uint16_t by_columns(uint64_t d, int row, int k) { return read(d, row / 8 * stride(d) + row % 8 * 128 + k * 2); }
  // MN-major: 64 columns in 128 bytes, groups of eight k `stride` apart, groups of 64 columns `leading` apart.
  static uint16_t by_rows(uint64_t d, int k, int column) {
    return read(d, k / 8 * stride(d) + k % 8 * 128 + column / 64 * leading(d) + column % 64 * 2);
  }
};

struct NamedBarrier {
  unsigned arrived = 0, round = 0;
};

class Beside : public cuda_on_cpu::Agent {
 public:
  void start() override {
    copies.clear();
    for (Warpgroup& warpgroup : warpgroups) warpgroup = Warpgroup();
    for (NamedBarrier& barrier : named) barrier = NamedBarrier();
  }
  bool step(std::mt19937* random) override {
    if (random == nullptr) {
      bool any = !copies.empty();
      for (const Copy& copy : std::exchange(copies, {})) copy.run();
      for (Warpgroup& warpgroup : warpgroups) {
        while (warpgroup.step()) any = true;
      }
      return any;
    }
    // One of what can be done, drawn; the others after it where that one cannot.
    const unsigned first = (*random)() % 9;
    for (unsigned i = 0; i < 9; ++i) {
      const unsigned drawn = (first + i) % 9;
      if (drawn < 8 && warpgroups[drawn].step()) return true;
      if (drawn == 8 && !copies.empty()) {
        std::swap(copies[(*random)() % copies.size()], copies.back());
        const Copy copy = copies.back();
        copies.pop_back();
        copy.run();
        return true;
      }
    }
    return false;
  }
  void finish() override {
    if (!copies.empty()) fail("a block ends before its copies");
    for (const Warpgroup& warpgroup : warpgroups) {
      for (const auto& pending : warpgroup.pending) {
        if (!pending.empty()) fail("a product that no thread waits for");
      }
    }
    for (const NamedBarrier& barrier : named) {
      if (barrier.arrived != 0) fail("a named barrier that some threads never come to");
    }
  }

  std::vector<Copy> copies;
  Warpgroup warpgroups[8];
  NamedBarrier named[16];
};
inline Beside beside;
// The launcher knows it from here on.
inline const bool registered = (cuda_on_cpu::agent = &beside) != nullptr;

inline Warpgroup& warpgroup() { return beside.warpgroups[block.thread() / 128]; }

template <class T, int count>
Product product_of(bool registers, uint64_t a, uint64_t b, bool add) {
  Product product;
  product.widen = [](unsigned short bits) { return mma_sm80::widen(T{bits}); };
  product.registers = registers;
  product.add = add;
  product.columns = 2 * count;
  product.a = a;
  product.b = b;
  return product;
}

}  // namespace on_cpu

inline char* shared_memory() { return on_cpu::shared; }
inline unsigned address(const void* pointer) {
  const auto offset = static_cast<const char*>(pointer) - on_cpu::shared;
  if (offset < 0 || offset >= static_cast<long>(on_cpu::kShared)) cuda_on_cpu::fail("an address outside shared memory");
  return static_cast<unsigned>(offset);
}

inline void init(Barrier* barrier, int arrivals) {
  const uint64_t count = static_cast<uint64_t>(arrivals);
  const on_cpu::State state{0, count, count, 0, on_cpu::kValid};
  std::memcpy(barrier, &state, 8);
}
inline void fence_init() {}
inline void fence_shared() {}
inline void arrive(Barrier* barrier) {
  on_cpu::State* state = on_cpu::state_of(barrier);
  if (state->pending == 0) cuda_on_cpu::fail("more arrivals than a barrier takes");
  state->pending -= 1;
  on_cpu::complete(state);
}
inline void arrive_expect(Barrier* barrier, int bytes) {
  on_cpu::state_of(barrier)->bytes += bytes;
  arrive(barrier);
}
inline void wait(Barrier* barrier, unsigned parity) {
  on_cpu::State* state = on_cpu::state_of(barrier);
  cuda_on_cpu::block.poll([=] { return state->parity != (parity & 1u); });
}
inline void named_arrive(int id, int threads) {
  on_cpu::NamedBarrier& barrier = on_cpu::beside.named[id];
  if (++barrier.arrived == static_cast<unsigned>(threads)) {
    barrier.arrived = 0;
    ++barrier.round;
  }
}
inline void named_sync(int id, int threads) {
  on_cpu::NamedBarrier* barrier = &on_cpu::beside.named[id];
  const unsigned round = barrier->round;
  named_arrive(id, threads);
  cuda_on_cpu::block.poll([=] { return barrier->round != round; });
}

inline void load(const TensorMap& map, void* tile, Barrier* barrier, int column, int row, int batch) {
  on_cpu::Copy copy{{}, static_cast<char*>(tile), barrier, column, row, batch};
  std::memcpy(&copy.map, &map, sizeof(copy.map));
  if (address(tile) % 1024 != 0) cuda_on_cpu::fail("a swizzled tile that is not aligned");
  on_cpu::beside.copies.push_back(copy);
}
inline void prefetch(const TensorMap&) {}

template <int count>
void give_registers() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256);
}
template <int count>
void take_registers() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256);
}

template <int... counts>
void fence([[maybe_unused]] float (&... sums)[counts]) {
  on_cpu::warpgroup().fenced[cuda_on_cpu::block.thread() % 128] = true;
}
inline void commit() {
  const unsigned thread = cuda_on_cpu::block.thread() % 128;
  on_cpu::warpgroup().groups[thread].push_back(on_cpu::warpgroup().issued[thread]);
}
template <int left, int... counts>
void wait_products([[maybe_unused]] float (&... done)[counts]) {
  on_cpu::Warpgroup* const group = &on_cpu::warpgroup();
  const unsigned thread = cuda_on_cpu::block.thread() % 128;
  const auto& groups = group->groups[thread];
  const size_t until = groups.size() > left ? groups[groups.size() - 1 - left] : 0;
  cuda_on_cpu::block.poll([=] { return group->done >= until; });
  auto& pending = group->pending[thread];
  for (auto it = pending.begin(); it != pending.end();) {
    if (it->second.last < until) {
      std::copy(it->second.values.begin(), it->second.values.end(), it->first);
      it = pending.erase(it);
    } else {
      ++it;
    }
  }
  group->fenced[thread] = false;
}

template <class T, int count>
void multiply(float (&d)[count], unsigned long long a, unsigned long long b, int add) {
  on_cpu::warpgroup().issue(on_cpu::product_of<T, count>(false, a, b, add != 0), d, nullptr);
}
template <class T, int count>
void multiply(float (&d)[count], const unsigned (&a)[4], unsigned long long b) {
  on_cpu::warpgroup().issue(on_cpu::product_of<T, count>(true, 0, b, true), d, a);
}

}  // namespace hopper

namespace cuda_on_cpu {

// `Launcher` for kernels with TensorMaps.
struct HopperLauncher : Launcher {
  using Launcher::Launcher;

  // Strides in bytes.
  template <class TensorMap>
  static void encode(TensorMap& map, const void* data, long long row, long long batch, int columns, int rows, int batches,
                     int box_rows) {
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || row % 16 != 0 || batch % 16 != 0) fail("a matrix that TMA cannot read");
    if (box_rows > 256) fail("a box that TMA does not take");
    const hopper::on_cpu::Map values{static_cast<const char*>(data), row, batch, columns, rows, batches, 64, box_rows};
    std::memcpy(&map, &values, sizeof(values));
  }
};

}  // namespace cuda_on_cpu
