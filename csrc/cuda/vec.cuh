// Operations on several elements or by several lanes at once.
//
//   AccOf            the dtype that sums of a dtype are accumulated in: float, or double for double
//   Pack, Loaded     kVec neighbouring elements, one load or store of up to 16 bytes
//   load_if          zeros where there is nothing to load; load_where: what was there before
//   atomic_add       adds to kWidth neighbouring elements, in one atomic where the architecture has it
//   sum_four_ways    four sums over four lanes, in fewer shuffles than four separate sums
//   kMultipliesMatrices, add_product   products of small matrices in the registers of a warp
//
// After any edit: make kernels traffic
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../host_device.h"
#include "simt.cuh"

namespace deform_attn {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kBlock = 256;  // the most threads of a block

// Blocks that must fit on a multiprocessor at once, for __launch_bounds__: half of its threads or more.
// Two of the 1024 threads of sm_75, three of 1536: the shared memory leaves no room for a fourth block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kLeastBlocks = 2;
#elif defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kLeastBlocks = 3;
#else
constexpr int kLeastBlocks = 4;
#endif

template <typename T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Pack {
  T at[kVec];
};

// The most elements of a dtype that one load moves.
template <typename T>
constexpr int kWidest = 16 / static_cast<int>(sizeof(T));

template <int kVec, typename T>
__device__ Pack<T, kVec> load(const T* from) {
  return *reinterpret_cast<const Pack<T, kVec>*>(from);
}

template <int kVec, typename T>
__device__ void store(T* to, const Pack<T, kVec>& numbers) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<Pack<T, kVec>*>(to) = numbers;
#else
  memcpy(to, &numbers, sizeof(numbers));  // one access, which a compiler for CPUs would divide
#endif
}

// kVec neighbouring elements as loaded, in words: converting them from here takes fewer instructions than
// from an array of 16-bit elements.
template <typename T, int kVec>
struct Loaded {
  using Word = std::conditional_t<sizeof(T) * kVec % 4 == 0, uint32_t, uint16_t>;
  static constexpr int kWords = sizeof(T) * kVec / sizeof(Word);
  Pack<Word, kWords> words;

  // Element c, in the dtype of sums.
  __device__ AccOf<T> operator[](int c) const {
    if constexpr (sizeof(T) == 8) {
      double number;
      memcpy(&number, &words.at[2 * c], sizeof(number));
      return number;
    } else if constexpr (sizeof(T) == 4 || sizeof(Word) == 2) {
      T number;
      memcpy(&number, &words.at[c], sizeof(number));
      return static_cast<AccOf<T>>(number);
    } else if constexpr (std::is_same_v<T, __half>) {
      __half2 pair;
      memcpy(&pair, &words.at[c / 2], sizeof(pair));
      return c & 1 ? __high2float(pair) : __low2float(pair);
    } else {
      const uint32_t pair = words.at[c / 2], bits = c & 1 ? pair & 0xffff0000u : pair << 16;
      float number;
      memcpy(&number, &bits, sizeof(number));
      return number;
    }
  }
};

// Zeros where `there` is false.
template <typename T, int kVec>
__device__ Loaded<T, kVec> load_if(bool there, const Pack<T, kVec>* from) {
  Loaded<T, kVec> loaded = {};
  if (there) loaded.words = *reinterpret_cast<const decltype(loaded.words)*>(from);
  return loaded;
}
template <int kVec, typename T>
__device__ Loaded<T, kVec> load_if(bool there, const T* from) {
  return load_if(there, reinterpret_cast<const Pack<T, kVec>*>(from));
}

// Loads where `there` is not 0, and otherwise leaves `loaded` as it is: no instructions make zeros. Reads through the
// cache of constant data.
template <typename T, int kVec>
__device__ void load_where(int there, const Pack<T, kVec>* from, Loaded<T, kVec>& loaded) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) * kVec == 16) {
    auto& words = loaded.words.at;
    asm("{.reg .pred p; setp.ne.s32 p, %5, 0;"
        " @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
        : "l"(__cvta_generic_to_global(from)), "r"(there));
    return;
  }
#endif
  if (there) loaded = load_if(true, from);
}

// sum += a * b where `there`, without a branch.
template <typename Acc>
__device__ void add_where(bool there, Acc& sum, Acc a, Acc b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Acc) == 4) {
    asm("{.reg .pred p; setp.ne.s32 p, %3, 0; @p fma.rn.f32 %0, %1, %2, %0;}"
        : "+f"(sum)
        : "f"(a), "f"(b), "r"(static_cast<int>(there)));
    return;
  }
#endif
  if (there) sum += a * b;
}

// Floats that one atomic adds to: 4 from sm_90 on, 1 before.
#if defined(ATOMIC_FLOATS)
constexpr int kAtomicFloats = ATOMIC_FLOATS;  // set by the emulator, which runs both
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kAtomicFloats = 1;
#else
constexpr int kAtomicFloats = 4;
#endif

// How many of the kVec elements of a lane one atomic adds.
template <typename Acc, int kVec>
constexpr int kAtomicWidth =
    std::is_same_v<Acc, float> && kVec % kAtomicFloats == 0 ? kAtomicFloats : 1;

template <int kWidth, typename Acc>
__device__ void atomic_add(Acc* to, const Acc* term) {
  if constexpr (std::is_integral_v<Acc>) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(*term));
  } else if constexpr (kWidth == 4) {
    atomicAdd(reinterpret_cast<float4*>(to), make_float4(term[0], term[1], term[2], term[3]));
  } else {
    atomicAdd(to, *term);
  }
}

// The number itself, hidden from the compiler, which then computes again what depends on it instead of
// keeping it in registers.
template <typename Int>
__device__ Int recomputed(Int number) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(number));
#endif
  return number;
}

// a * b in one instruction, also where the compiler would extend b before a loop.
__device__ inline int64_t wide_product(int a, int b) {
#if defined(__CUDA_ARCH__)
  int64_t product;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return int64_t{a} * b;
#endif
}

// The same pointer into shared memory, whose address the compiler keeps in a register instead of computing it
// again.
template <typename X>
__device__ X* pinned(X* shared) {
#if defined(__CUDA_ARCH__)
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("" : "+r"(address));
  return static_cast<X*>(__cvta_shared_to_generic(address));
#else
  return shared;
#endif
}

// The address of `shared` in shared memory, in 32 bits; in the emulator 0.
template <typename X>
__device__ unsigned shared_address(const X* shared) {
#if defined(__CUDA_ARCH__)
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
#else
  static_cast<void>(shared);
  return 0;
#endif
}
// What lies at an address that was computed from that of `shared`.
template <typename Y, typename X>
__device__ const Y* at_address(const X* shared, unsigned address) {
#if defined(__CUDA_ARCH__)
  static_cast<void>(shared);
  return static_cast<const Y*>(__cvta_shared_to_generic(address));
#else
  return reinterpret_cast<const Y*>(reinterpret_cast<const char*>(shared) + address);
#endif
}

// The sum of the numbers of a warp's lanes up to this one.
__device__ inline int sum_up_to_lane(int number) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
#if defined(__CUDA_ARCH__)
    asm volatile(
        "{.reg .pred p; .reg .s32 before; shfl.sync.up.b32 before|p, %0, %1, 0, 0xffffffff;"
        " @p add.s32 %0, %0, before;}"
        : "+r"(number)
        : "r"(step));
#else
    const int before = __shfl_up_sync(kAllLanes, number, step);
    if (static_cast<int>(threadIdx.x % kWarp) >= step) number += before;
#endif
  }
  return number;
}

// Sums of term[0..3] over the four lanes of a group. Lane j of the four gets the sum of term[j]. Each of
// the two steps halves the number of sums that a lane carries.
template <typename Acc>
__device__ Acc sum_four_ways(const Acc (&term)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  Acc low_pair = odd ? term[1] : term[0];
  Acc high_pair = odd ? term[3] : term[2];
  low_pair += __shfl_xor_sync(kAllLanes, odd ? term[0] : term[1], 1);
  high_pair += __shfl_xor_sync(kAllLanes, odd ? term[2] : term[3], 1);
  Acc sum = high ? high_pair : low_pair;
  return sum + __shfl_xor_sync(kAllLanes, high ? low_pair : high_pair, 2);
}

// Whether a warp has instructions for matrices of T: of 16 bits, from sm_80 on.
#if defined(ATOMIC_FLOATS)
template <typename T>
constexpr bool kMultipliesMatrices = sizeof(T) == 2 && ATOMIC_FLOATS > 1;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <typename T>
constexpr bool kMultipliesMatrices = false;
#else
template <typename T>
constexpr bool kMultipliesMatrices = sizeof(T) == 2;
#endif

// sum += a b, for a of 16 x 16, b of 16 x 8 and sum of 16 x 8 elements, all distributed over the lanes of the
// warp as in PTX's mma.m16n8k16. With lane = 4 * g + t, a lane has of a, in pairs: row g, columns 2 t, 2 t + 1;
// row g + 8, the same; row g, columns 2 t + 8, 2 t + 9; row g + 8, the same. Of b: column g, rows as the
// columns of a. Of sum: row g, columns 2 t, 2 t + 1; row g + 8, the same.
template <typename T>
__device__ void add_product(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__)
#define DEFORM_ATTN_MMA(TYPE)                                                         \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __half>) {
    DEFORM_ATTN_MMA("f16");
  } else {
    DEFORM_ATTN_MMA("bf16");
  }
#undef DEFORM_ATTN_MMA
#elif !defined(__CUDACC__)
  multiply_in_warp<T>(sum, a, b);  // the emulator's
#endif
}

}  // namespace deform_attn
