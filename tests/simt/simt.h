// CUDA kernels on a CPU: every CUDA thread is a fiber, every block runs on one thread of the CPU.
//
//   fibers           switching between them, announced to the sanitizers
//   Worker           runs one block after the other: warps, lanes, barriers, collectives
//   built-ins        threadIdx and the like, __syncthreads, __shfl_sync, atomicAdd, ...
//   LAUNCH           runs a grid on two workers; defined before the kernels are included
//
// A fiber runs until it must wait for others. Stricter than a GPU: it is an error where lanes meet at
// different collectives, or leave while others wait for them. Not emulated: incoherent memory, clocks,
// asynchronous copies, inline PTX.
//
// Shared memory is static per worker: the sanitizers check it, and a block finds what the block before
// left there, as on a GPU. Accesses can be watched: see traffic.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <driver_types.h>
#include <sys/mman.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(SIMT_TRAFFIC)
#define SIMT_TSAN 0
#elif defined(__SANITIZE_THREAD__)
#define SIMT_TSAN 1
#include <sanitizer/tsan_interface.h>
#else
#define SIMT_TSAN 0
#endif
#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#include <sanitizer/common_interface_defs.h>
#else
#define SIMT_ASAN 0
#endif

// Functions of the emulator itself, which no sanitizer checks.
#define SIMT_OWN __attribute__((no_sanitize("thread", "address", "undefined")))

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __forceinline__ inline
#define __noinline__  // empty, for attributes of this name too
#define __launch_bounds__(...)

namespace simt {

// ---- options --------------------------------------------------------------------

enum class Order { kForward, kReversed, kShuffled };  // of the warps of a block and lanes of a warp

struct Options {
  Order order = Order::kForward;
  unsigned seed = 0;
  int workers = 2;
};
inline Options options;

// The error that the next launch returns, for tests of error handling.
inline cudaError_t planted_error = cudaSuccess;

inline std::map<std::string, int>& launches() {  // of each kernel, by name
  static std::map<std::string, int> counts;
  return counts;
}

// Called at each launch.
inline std::function<void(const std::string& kernel, void* stream)> on_launch;

// Observes accesses; see traffic.h.
struct Watcher {
  virtual ~Watcher() = default;
  virtual void atomic(const void* address, int bytes) = 0;
  virtual void collective(int warp) = 0;  // the lanes of a warp have met
  virtual bool block(int64_t index) = 0;  // before a block begins; false: it is left out
  virtual void kernel(const std::string& name, int64_t blocks, int threads) = 0;
};
inline Watcher* watcher = nullptr;

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = SIMT_ASAN || SIMT_TSAN ? 256 * 1024 : 64 * 1024;

// ---- fibers --------------------------------------------------------------------------------------

#if !defined(__x86_64__)
#error "the emulator switches fibers on x86-64 only"
#endif

// Saves the callee's registers and the stack pointer in *from, continues at `to`.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.weak simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

struct Stack {
  void* top = nullptr;  // saved stack pointer
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;  // ASan's
  void* tsan = nullptr;  // TSan's
};

SIMT_OWN inline void switch_stacks(Stack& from, Stack& to) {
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.bytes);
#endif
#if SIMT_TSAN
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  simt_switch(&from.top, to.top);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

SIMT_OWN inline void publish(void* place) {
#if SIMT_TSAN
  __tsan_release(place);
#endif
}
SIMT_OWN inline void observe(void* place) {
#if SIMT_TSAN
  __tsan_acquire(place);
#endif
}

// ---- a block -------------------------------------------------------------------------------------

enum class State { kReady, kWaiting, kDone };

struct Fiber {
  Stack stack;
  State state = State::kDone;
  const uint64_t* waits_for = nullptr;  // a generation,
  uint64_t seen = 0;                    // to become another than this
  const char* waits_at = nullptr;
  uint3 thread = {0, 0, 0};
  int index = 0;
};

// Where threads meet: all of a block, or the lanes of one mask.
struct Meeting {
  unsigned mask = 0;
  unsigned arrived = 0;
  int count = 0;
  const char* name = nullptr;
  uint64_t generation = 0;
  uint64_t in[kWarpSize], out[kWarpSize];
};

// The meetings of a warp, one for each mask in use.
struct Warp {
  Meeting meetings[4];
};

SIMT_OWN inline bool same(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

struct Worker;
inline thread_local Worker* worker = nullptr;
inline thread_local uint3 block_index, block_size, grid_size;

struct Worker {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> all_warps;
  Warp* warps = nullptr;  // fibers use bare memory: TSan watches what containers do
  int warp_count = 0;
  Meeting barrier;
  Stack home;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  std::string error;
  std::vector<unsigned char> dynamic_shared;
  std::mt19937 random;
  char begins = 0, ends = 0;  // places at which blocks are ordered for TSan

  ~Worker() {
    for (auto& fiber : fibers) {
#if SIMT_TSAN
      __tsan_destroy_fiber(fiber->stack.tsan);
#endif
      munmap(const_cast<void*>(fiber->stack.bottom), kStackBytes);
    }
  }

  // A fiber that begins at `main` when it is switched to.
  SIMT_OWN void reset(Fiber& fiber) {
    void** top = reinterpret_cast<void**>(
        static_cast<char*>(const_cast<void*>(fiber.stack.bottom)) + kStackBytes);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(&Worker::main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack.top = top;
    fiber.stack.fake = nullptr;
  }

  SIMT_OWN void grow(size_t count) {
    while (fibers.size() < count) {
      auto fiber = std::make_unique<Fiber>();
      fiber->stack.bottom = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fiber->stack.bottom == MAP_FAILED) throw std::bad_alloc();
      fiber->stack.bytes = kStackBytes;
#if SIMT_TSAN
      fiber->stack.tsan = __tsan_create_fiber(0);
#endif
      reset(*fiber);
      fibers.push_back(std::move(fiber));
    }
  }

  // The life of a fiber: the kernel, again and again. Each round finds its worker anew, since the
  // next launch may run it on another thread of the CPU.
  SIMT_OWN static void main() {
#if SIMT_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &worker->home.bottom, &worker->home.bytes);
#endif
    for (;;) round();
  }

  SIMT_OWN __attribute__((noinline)) static void round() {
    Worker* const mine = worker;
    observe(&mine->begins);
    (*mine->body)();
    publish(&mine->ends);
    mine->current->state = State::kDone;
    mine->leave();
  }

  SIMT_OWN void leave() { switch_stacks(current->stack, home); }

  SIMT_OWN void enter(Fiber& fiber) {
    current = &fiber;
    switch_stacks(home, fiber.stack);
  }

  SIMT_OWN void fail(const std::string& what) {
    error = what;
    leave();  // never comes back: the block is abandoned
  }

  SIMT_OWN bool can_run(const Fiber& fiber) const {
    return fiber.state == State::kReady ||
           (fiber.state == State::kWaiting && *fiber.waits_for != fiber.seen);
  }

  SIMT_OWN void wait_for(Meeting& meeting) {
    current->state = State::kWaiting;
    current->waits_for = &meeting.generation;
    current->seen = meeting.generation;
    current->waits_at = meeting.name;
    leave();
    current->state = State::kReady;
  }

  SIMT_OWN void meet_block(const char* name) {
    publish(&barrier);
    barrier.name = name;
    if (++barrier.count == static_cast<int>(block_size.x)) {
      barrier.count = 0;
      ++barrier.generation;
      if (watcher) {
        for (int w = 0; w < warp_count; ++w) watcher->collective(w);
      }
    } else {
      wait_for(barrier);
    }
    observe(&barrier);
  }

  // Returns the meeting with what every lane of the mask brought.
  SIMT_OWN const Meeting& meet_warp(unsigned mask, const char* name, uint64_t brought,
                                    bool orders_memory) {
    const int lane = current->index % kWarpSize;
    if (!(mask >> lane & 1)) {
      fail(std::string(name) + ": lane " + std::to_string(lane) + " is not in its own mask");
    }
    Meeting* place = warps[current->index / kWarpSize].meetings;
    const Meeting* const end = place + sizeof(Warp) / sizeof(Meeting);
    while (place != end && place->mask != mask && place->mask) ++place;
    if (place == end) fail(std::string(name) + ": more masks in a kernel than the emulator has");
    Meeting& meeting = *place;
    if (meeting.arrived && !same(meeting.name, name)) {
      fail(std::string("divergent barrier: lane ") + std::to_string(lane) + " is at " + name +
           " while lanes of its mask wait at " + meeting.name);
    }
    meeting.mask = mask;
    meeting.name = name;
    if (orders_memory) publish(&meeting);
    meeting.in[lane] = brought;
    meeting.arrived |= 1u << lane;
    if (meeting.arrived == mask) {
      for (int i = 0; i < kWarpSize; ++i) meeting.out[i] = meeting.in[i];
      meeting.arrived = 0;
      ++meeting.generation;
      if (watcher) watcher->collective(current->index / kWarpSize);
    } else {
      wait_for(meeting);
    }
    if (orders_memory) observe(&meeting);
    return meeting;
  }

  SIMT_OWN void arrange(std::vector<int>& order) {
    if (options.order == Order::kReversed) std::reverse(order.begin(), order.end());
    if (options.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
  }

  // False: an error is in `error`.
  SIMT_OWN bool run_block(int threads) {
    grow(static_cast<size_t>(threads));
    warp_count = (threads + kWarpSize - 1) / kWarpSize;
    all_warps.resize(static_cast<size_t>(warp_count));
    warps = all_warps.data();
    for (Warp& warp : all_warps) {
      for (Meeting& meeting : warp.meetings) meeting.arrived = meeting.mask = 0;
    }
    barrier.count = 0;
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers[static_cast<size_t>(i)];
      fiber.state = State::kReady;
      fiber.index = i;
      fiber.thread = {static_cast<unsigned>(i), 0, 0};
    }
    observe(&ends);  // of the block before
    publish(&begins);
    std::vector<int> warp_order(static_cast<size_t>(warp_count));
    for (int w = 0; w < warp_count; ++w) warp_order[static_cast<size_t>(w)] = w;
    std::vector<int> lanes;
    for (bool progress = true; progress;) {
      progress = false;
      arrange(warp_order);
      for (const int w : warp_order) {
        lanes.clear();
        for (int i = w * kWarpSize; i < std::min(threads, (w + 1) * kWarpSize); ++i) {
          lanes.push_back(i);
        }
        for (bool again = true; again;) {
          again = false;
          arrange(lanes);
          for (const int i : lanes) {
            Fiber& fiber = *fibers[static_cast<size_t>(i)];
            if (!can_run(fiber)) continue;
            enter(fiber);
            if (!error.empty()) return abandon(threads);
            again = progress = true;
          }
        }
      }
    }
    for (int i = 0; i < threads; ++i) {
      const Fiber& fiber = *fibers[static_cast<size_t>(i)];
      if (fiber.state == State::kDone) continue;
      error = "divergent barrier: thread " + std::to_string(i) + " waits at " + fiber.waits_at +
              " for threads that never come";
      return abandon(threads);
    }
    if (watcher) {
      for (int w = 0; w < warp_count; ++w) watcher->collective(w);
    }
    observe(&ends);
    return true;
  }

  SIMT_OWN bool abandon(int threads) {
    for (int i = 0; i < threads; ++i) reset(*fibers[static_cast<size_t>(i)]);
    return false;
  }
};

inline std::string name_of(void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "kernel without a name";
  int status = 0;
  char* text = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? text : info.dli_sname;
  std::free(text);
  const size_t end = name.rfind('(');
  return name.substr(0, end);
}

// Blocks are dealt out in turn, so that neighbours run on different workers and TSan sees a race
// between them.
inline void launch(void* kernel, unsigned grid, unsigned block, size_t dynamic_shared, void* stream,
                   const std::function<void()>& body) {
  if (planted_error != cudaSuccess) return;
  const std::string name = name_of(kernel);
  {
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    ++launches()[name];
  }
  if (on_launch) on_launch(name, stream);
  if (watcher) watcher->kernel(name, grid, static_cast<int>(block));
  static thread_local std::vector<std::unique_ptr<Worker>> kept;
  auto& workers = kept;  // of this thread, in the others too
  const unsigned count = watcher ? 1 : static_cast<unsigned>(options.workers);
  while (workers.size() < count) workers.push_back(std::make_unique<Worker>());
  const auto work = [&](unsigned which) SIMT_OWN {
    worker = workers[which].get();
    worker->error.clear();
    worker->body = &body;
    worker->random.seed(options.seed + which);
    worker->dynamic_shared.assign(dynamic_shared, 0xcd);
    worker->dynamic_shared.shrink_to_fit();
#if SIMT_TSAN
    worker->home.tsan = __tsan_get_current_fiber();
#endif
    block_size = {block, 1, 1};
    grid_size = {grid, 1, 1};
    for (unsigned b = which; b < grid; b += count) {
      block_index = {b, 0, 0};
      if (watcher && !watcher->block(b)) continue;
      if (!worker->run_block(static_cast<int>(block))) break;
    }
    worker = nullptr;
  };
  std::vector<std::thread> threads;
  for (unsigned which = 1; which < count && which < grid; ++which)
    threads.emplace_back(work, which);
  work(0);
  for (std::thread& thread : threads) thread.join();
  for (const auto& each : workers) {
    if (!each->error.empty()) {
      const std::string error = name + ": " + each->error;
      each->error.clear();
      throw std::runtime_error(error);
    }
  }
}

SIMT_OWN inline const uint3& thread_index() { return worker->current->thread; }

template <typename T>
SIMT_OWN uint64_t packed(T number) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &number, sizeof(T));
  return bits;
}
template <typename T>
SIMT_OWN T unpacked(uint64_t bits) {
  T number;
  std::memcpy(&number, &bits, sizeof(T));
  return number;
}

// What lane `from` brought.
template <typename T>
SIMT_OWN T shuffle(unsigned mask, const char* name, T number, int from) {
  const int lane = worker->current->index % kWarpSize;
  const Meeting& meeting = worker->meet_warp(mask, name, packed(number), false);
  if (from < 0 || from >= kWarpSize) return unpacked<T>(meeting.out[lane]);
  if (!(mask >> from & 1)) {
    worker->fail(std::string(name) + ": reads lane " + std::to_string(from) +
                 ", which takes no part");
  }
  return unpacked<T>(meeting.out[from]);
}

SIMT_OWN inline unsigned vote(unsigned mask, const char* name, bool yes) {
  const Meeting& meeting = worker->meet_warp(mask, name, yes, false);
  unsigned votes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) && meeting.out[lane]) votes |= 1u << lane;
  }
  return votes;
}

// The registers of every lane, for an instruction of the whole warp. Each lane calls it twice: with its own
// registers, and when it has read those of the others.
template <typename Registers>
SIMT_OWN const Registers* const* registers_of_warp(const char* name, const Registers* own) {
  static thread_local const Registers* found[kWarpSize];
  const Meeting& meeting = worker->meet_warp(~0u, name, packed(own), false);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    found[lane] = unpacked<const Registers*>(meeting.out[lane]);
  }
  return found;
}

#if defined( \
    SIMT_TRAFFIC)  // one worker, and the access is watched as an atomic, not as a load and a store
template <typename T, typename Bits>
SIMT_OWN void add(T* to, T term) {
  *to = *to + term;
}
#else
template <typename T, typename Bits>
void add(T* to, T term) {
  Bits* const place = reinterpret_cast<Bits*>(to);
  Bits before = __atomic_load_n(place, __ATOMIC_RELAXED), after;
  do {
    T sum;
    std::memcpy(static_cast<void*>(&sum), &before, sizeof(T));
    sum = sum + term;
    std::memcpy(static_cast<void*>(&after), &sum, sizeof(T));
  } while (!__atomic_compare_exchange_n(place, &before, after, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
}
#endif

SIMT_OWN inline void watch_atomic(const void* address, int bytes) {
  if (watcher) watcher->atomic(address, bytes);
}

}  // namespace simt

// ---- built-ins -----------------------------------------------------------------------------------

using std::max;
using std::min;

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index)
#define blockDim (::simt::block_size)
#define gridDim (::simt::grid_size)

inline void __syncthreads() { simt::worker->meet_block("__syncthreads"); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  simt::worker->meet_warp(mask, "__syncwarp", 0, true);
}
template <typename T>
T __shfl_sync(unsigned mask, T number, int lane) {
  return simt::shuffle(mask, "__shfl_sync", number, lane & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T number, int bits) {
  return simt::shuffle(mask, "__shfl_xor_sync", number,
                       static_cast<int>(threadIdx.x % simt::kWarpSize) ^ bits);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T number, int by) {
  const int from = static_cast<int>(threadIdx.x % simt::kWarpSize) - by;
  return simt::shuffle(mask, "__shfl_up_sync", number, from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T number, int by) {
  const int from = static_cast<int>(threadIdx.x % simt::kWarpSize) + by;
  return simt::shuffle(mask, "__shfl_down_sync", number, from < simt::kWarpSize ? from : -1);
}
// PTX's mma.m16n8k16, with sums in float and elements T of 16 bits: sum += a b. How the matrices are distributed
// is the table of that instruction in the PTX manual.
template <typename T>
SIMT_OWN void multiply_in_warp(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Registers {
    uint32_t a[4], b[2];
  };
  const Registers own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto* const warp = simt::registers_of_warp("mma", &own);
  const auto element = [](uint32_t word, int half) {
    const auto bits = static_cast<uint16_t>(half ? word >> 16 : word);
    T number;
    std::memcpy(static_cast<void*>(&number), &bits, sizeof(bits));
    return static_cast<float>(number);
  };
  const int lane = static_cast<int>(threadIdx.x % simt::kWarpSize);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i & 2 ? 8 : 0), column = lane % 4 * 2 + (i & 1);
    for (int k = 0; k < 16; ++k) {
      // Of a: lane 4 * (row % 8) + k % 8 / 2, register (row / 8) + 2 * (k / 8), half k % 2.
      const uint32_t left = warp[row % 8 * 4 + k % 8 / 2]->a[row / 8 + k / 8 * 2];
      const uint32_t right = warp[column * 4 + k % 8 / 2]->b[k / 8];
      sum[i] += element(left, k & 1) * element(right, k & 1);
    }
  }
  simt::registers_of_warp("mma", &own);
}
inline unsigned __ballot_sync(unsigned mask, bool yes) {
  return simt::vote(mask, "__ballot_sync", yes);
}
inline bool __all_sync(unsigned mask, bool yes) {
  return simt::vote(mask, "__all_sync", yes) == mask;
}
inline bool __any_sync(unsigned mask, bool yes) { return simt::vote(mask, "__any_sync", yes) != 0; }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline void atomicAdd(float* to, float term) {
  simt::watch_atomic(to, 4);
  simt::add<float, uint32_t>(to, term);
}
inline void atomicAdd(double* to, double term) {
  simt::watch_atomic(to, 8);
  simt::add<double, uint64_t>(to, term);
}
inline int atomicAdd(int* to, int term) {
  simt::watch_atomic(to, 4);
  return __atomic_fetch_add(to, term, __ATOMIC_RELAXED);
}
inline void atomicAdd(unsigned long long* to, unsigned long long term) {
  simt::watch_atomic(to, 8);
  __atomic_fetch_add(to, term, __ATOMIC_RELAXED);
}
inline void atomicMax(unsigned* to, unsigned number) {
  simt::watch_atomic(to, 4);
  unsigned old = 0;
  while (old < number && !__atomic_compare_exchange_n(to, &old, number, false, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
  }
}
inline int atomicCAS(int* to, int expected, int desired) {
  simt::watch_atomic(to, 4);
  __atomic_compare_exchange_n(to, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
inline void atomicAdd(float2* to, float2 term) {
  simt::watch_atomic(to, 8);
  simt::add<float, uint32_t>(&to->x, term.x);
  simt::add<float, uint32_t>(&to->y, term.y);
}
inline void atomicAdd(float4* to, float4 term) {
  simt::watch_atomic(to, 16);
  simt::add<float, uint32_t>(&to->x, term.x);
  simt::add<float, uint32_t>(&to->y, term.y);
  simt::add<float, uint32_t>(&to->z, term.z);
  simt::add<float, uint32_t>(&to->w, term.w);
}
inline void atomicAdd(__half2* to, __half2 term) {
  simt::watch_atomic(to, 4);
  simt::add<__half2, uint32_t>(to, term);
}
inline void atomicAdd(__nv_bfloat162* to, __nv_bfloat162 term) {
  simt::watch_atomic(to, 4);
  simt::add<__nv_bfloat162, uint32_t>(to, term);
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = simt::planted_error;
  simt::planted_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t) { return "planted by a test"; }

#define LAUNCH(kernel, grid, block, stream, ...)                                 \
  ::simt::launch(reinterpret_cast<void*>(+kernel), (grid), (block), 0, (stream), \
                 [&] { kernel(__VA_ARGS__); })
