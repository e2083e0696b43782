// What the hardware does for several numbers or several lanes at once.
//
//   AccOf            what a dtype is summed in: float, or double for double
//   Pack             kVec neighbouring numbers, one load or store of up to 16 bytes
//   atomic_add       kWidth neighbouring numbers, one atomic where the architecture has it
//   sum_four_ways    four sums over the lanes of a group in fewer shuffles than four sums take
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

template <typename T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
  T at[kVec];
};

// The most numbers of a dtype that one load moves.
template <typename T>
constexpr int kWidest = 16 / static_cast<int>(sizeof(T));

template <int kVec, typename T>
__device__ Pack<T, kVec> load(const T* from) {
  return *reinterpret_cast<const Pack<T, kVec>*>(from);
}

// Zeros where there is nothing to load.
template <int kVec, typename T>
__device__ Pack<T, kVec> load_if(bool there, const T* from) {
  using Word = std::conditional_t<sizeof(T) * kVec % 4 == 0, uint32_t, uint16_t>;
  constexpr int kWords = sizeof(T) * kVec / sizeof(Word);
  union {
    Word words[kWords];
    Pack<Word, kWords> all;
  } bits = {};
  if (there) bits.all = *reinterpret_cast<const Pack<Word, kWords>*>(from);
  Pack<T, kVec> pack;
  memcpy(&pack, &bits, sizeof(pack));
  return pack;
}

// Floats that one atomic adds to: 4 since sm_90, 1 before it.
#if defined(ATOMIC_FLOATS)
constexpr int kAtomicFloats = ATOMIC_FLOATS;  // the emulator runs both
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kAtomicFloats = 1;
#else
constexpr int kAtomicFloats = 4;
#endif

// How many of the kVec numbers of a lane one atomic adds.
template <typename Acc, int kVec>
constexpr int kAtomicWidth =
    std::is_same_v<Acc, float> && kVec % kAtomicFloats == 0 ? kAtomicFloats : 1;

template <int kWidth, typename Acc>
__device__ void atomic_add(Acc* to, const Acc* term) {
  if constexpr (kWidth == 4) {
    atomicAdd(reinterpret_cast<float4*>(to), make_float4(term[0], term[1], term[2], term[3]));
  } else {
    atomicAdd(to, *term);
  }
}

// Sums of term[0..3] over the `lanes` lanes of a group (a power of two, 4 to 32). Lane j < 4 of
// the group gets the sum of term[j]; the other lanes' results are of no use. Each step of the
// first two halves how many sums a lane still carries.
template <typename Acc>
__device__ Acc sum_four_ways(const Acc (&term)[4], int lane, int lanes) {
  const bool odd = lane & 1, high = lane & 2;
  Acc low_pair = odd ? term[1] : term[0];
  Acc high_pair = odd ? term[3] : term[2];
  low_pair += __shfl_xor_sync(kAllLanes, odd ? term[0] : term[1], 1);
  high_pair += __shfl_xor_sync(kAllLanes, odd ? term[2] : term[3], 1);
  Acc sum = high ? high_pair : low_pair;
  sum += __shfl_xor_sync(kAllLanes, high ? low_pair : high_pair, 2);
  for (int step = 4; step < lanes; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

}  // namespace deform_attn
