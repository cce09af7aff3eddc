// What `<op>_cuda.cu` needs of CUDA where a host compiler reads it: the host part of an op, for kernels that NVRTC compiles
// when they are first started. cc4s_kernels/_jit.py is the other side. Include it before everything else.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

// Exported are the kernels, for their symbols, and no more.
#define CC4S_HIDDEN __attribute__((visibility("hidden")))

// Set before the first call of an op.
struct JitDriver {
  // A function of the CUDA driver for the kernel with this symbol; null, and `message`, where there is none.
  void* (*find)(const char* symbol, const char* name, int device, char* message, int message_bytes);
  // 0 and the current stream of torch on a device.
  int (*current_stream)(int device, void** stream);
  // cuLaunchKernel
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared_bytes, void* stream, void** arguments, void** extra);
  // cuFuncSetAttribute
  int (*set_attribute)(void* function, int attribute, int value);
  // cuDeviceGetAttribute
  int (*device_attribute)(int* value, int attribute, int device);
};
extern CC4S_HIDDEN JitDriver jit_driver;

// Functions of the driver by kernel and device: each is asked for once.
class CC4S_HIDDEN JitFunctions {
 public:
  // kernel: what stands in for it on the host; its symbol is that of the device code.
  void* operator()(const void* kernel, int device) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = functions_.find({kernel, device});
      if (found != functions_.end()) return found->second;
    }
    // Without the lock: the other side may wait for Python.
    Dl_info info{};
    STD_TORCH_CHECK(dladdr(kernel, &info) != 0 && info.dli_saddr == kernel, "a kernel without a symbol");
    char* const name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
    std::array<char, 4096> message{};
    void* const function = jit_driver.find(info.dli_sname, name == nullptr ? info.dli_sname : name, device,
                                           message.data(), static_cast<int>(message.size() - 1));
    std::free(name);
    STD_TORCH_CHECK(function != nullptr, message.data());
    const std::lock_guard<std::mutex> lock(mutex_);
    functions_[{kernel, device}] = function;
    return function;
  }
  // They belong to a driver.
  void forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    functions_.clear();
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, void*> functions_;
};
extern CC4S_HIDDEN JitFunctions jit_functions;

// As in common/cuda_launch.h.
class CC4S_HIDDEN StreamLauncher {
 public:
  explicit StreamLauncher(const torch::stable::Tensor& tensor) : device_(tensor.get_device_index()) {
    STD_TORCH_CHECK(jit_driver.launch != nullptr, "kernels that are compiled at run time have no driver");
    // A driver for tests has tensors on the CPU.
    if (tensor.is_cuda()) guard_.emplace(device_);
    STD_TORCH_CHECK(jit_driver.current_stream(device_, &stream_) == 0, "torch has no current CUDA stream");
  }

  template <class... Parameters, class... Arguments>
  void operator()(dim3 grid, dim3 threads, void (*kernel)(Parameters...), Arguments... arguments) const {
    start<Parameters...>(function_of(kernel), grid, threads, 0, arguments...);
  }

  // With dynamic shared memory, in bytes.
  template <class... Parameters, class... Arguments>
  void with_shared(dim3 grid, dim3 threads, int bytes, void (*kernel)(Parameters...), Arguments... arguments) const {
    constexpr int kMaxDynamicSharedBytes = 8;
    void* const function = function_of(kernel);
    check(jit_driver.set_attribute(function, kMaxDynamicSharedBytes, bytes));
    start<Parameters...>(function, grid, threads, static_cast<unsigned>(bytes), arguments...);
  }

  // Bytes of shared memory that a block may have.
  int most_shared() const {
    constexpr int kMaxSharedBytesPerBlockOptIn = 97;
    int value = 0;
    check(jit_driver.device_attribute(&value, kMaxSharedBytesPerBlockOptIn, device_));
    return value;
  }

 private:
  static void check(int error) {
    STD_TORCH_CHECK(error == 0, "a CUDA kernel did not start: error ", error, " of the driver");
  }

  template <class... Parameters>
  void* function_of(void (*kernel)(Parameters...)) const {
    return jit_functions(reinterpret_cast<const void*>(kernel), device_);
  }

  template <class... Parameters, class... Arguments>
  void start(void* function, dim3 grid, dim3 threads, unsigned bytes, Arguments... arguments) const {
    std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
    const auto pointers = std::apply(
        [](auto&... value) {
          return std::array<void*, sizeof...(value)>{const_cast<void*>(static_cast<const void*>(&value))...};
        },
        values);
    check(jit_driver.launch(function, grid.x, grid.y, grid.z, threads.x, threads.y, threads.z, bytes, stream_,
                            const_cast<void**>(pointers.data()), nullptr));
  }

  int device_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

// Says that `_JIT.so` has the host part of an op.
#define CC4S_JIT_OP(op) \
  extern "C" void cc4s_kernels_jit_##op() {}
