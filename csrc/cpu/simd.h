// SIMD vectors: one source for AVX-512, AVX2, SSE2, NEON and any other instruction set.
//
// Arithmetic uses the vector extensions of GCC and clang. Intrinsics appear where the extensions have
// no operation for it: 16-bit floats, fused multiply-adds, streaming stores.
//
// In this order:
//
//   Vec<Acc, kLanes>          a vector
//   BFloat16, Half, AccOf     16-bit floats; the accumulation type of a dtype
//   each                      a loop that is unrolled at compile time
//   splat, bits_as            a scalar in every lane; a bit cast
//   to_acc, from_acc          one element to and from the accumulation type
//   load, store               kLanes elements of T to and from a vector of Acc
//   load_some, store_some     the first `count` of them
//   load_pair, store_pair     2 * kLanes of them as two vectors, in the cheapest order
//   store_quads, load_quads   four vectors to and from memory, transposed
//   VectorNumbers             Numbers and pixel_of (bilinear.h) for vectors
//   four_sums                 the horizontal sums of four vectors
//   stream, finish_streams    whole cache lines to memory, bypassing the caches
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#define DEFORM_ATTN_NEON 1
#endif

#include "../bilinear.h"

#define DEFORM_ATTN_INLINED __attribute__((always_inline))  // of a lambda
#define DEFORM_ATTN_INLINE inline DEFORM_ATTN_INLINED

namespace deform_attn::cpu {

#if defined(DEFORM_ATTN_VECTOR_BYTES)  // for tests that compare instruction sets at the same width
constexpr int kVectorBytes = DEFORM_ATTN_VECTOR_BYTES;
#elif defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr size_t kCacheLine = 64;  // bytes

template <typename Acc>
constexpr int kNativeLanes = kVectorBytes / static_cast<int>(sizeof(Acc));

// The most vectors of channels that a pass over the points of a head works on. A pixel of 32 channels
// takes 8 NEON vectors, and NEON has registers for their sums; SSE2 has not.
#if defined(DEFORM_ATTN_NEON)
constexpr int kMostVecs = 8;
#else
constexpr int kMostVecs = 4;
#endif

template <typename Acc, int kLanes>
struct VecOf {
  typedef Acc type __attribute__((vector_size(kLanes * sizeof(Acc))));
};
template <typename Acc, int kLanes>
using Vec = typename VecOf<Acc, kLanes>::type;

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
constexpr bool kLittleEndian = true;
#else
constexpr bool kLittleEndian = false;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The accumulation type of a dtype.
template <typename T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls `body` with 0 .. kCount - 1 as compile-time numbers. Arrays that are indexed only by
// compile-time numbers stay in registers; in a loop, GCC can unroll too late for that.
template <typename Body, int... kIndex>
DEFORM_ATTN_INLINE void each_of(const Body& body, std::integer_sequence<int, kIndex...>) {
  (body(std::integral_constant<int, kIndex>()), ...);
}
template <int kCount, typename Body>
DEFORM_ATTN_INLINE void each(const Body& body) {
  each_of(body, std::make_integer_sequence<int, kCount>());
}

// x in every lane. The compiler drops the subtraction: x - 0 is x, also for -0.
template <typename V, typename Acc>
DEFORM_ATTN_INLINE V splat(Acc x) {
  return x - V{};
}

template <typename To, typename From>
DEFORM_ATTN_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// One element.

DEFORM_ATTN_INLINE double to_acc(double x) { return x; }
DEFORM_ATTN_INLINE float to_acc(float x) { return x; }
DEFORM_ATTN_INLINE float to_acc(BFloat16 x) {
  return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}
DEFORM_ATTN_INLINE float to_acc(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(DEFORM_ATTN_NEON)
  return bits_as<__fp16>(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) {  // infinity or NaN
    return bits_as<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  }
  // subnormal: multiples of 2^-24; normal: the exponent is rebased to that of float
  const float magnitude = rest < 0x400u
                              ? static_cast<float>(rest) * 0x1p-24f
                              : bits_as<float>(static_cast<uint32_t>((rest << 13) + (112u << 23)));
  return bits_as<float>(sign | bits_as<uint32_t>(magnitude));
#endif
}

DEFORM_ATTN_INLINE void from_acc(double x, double& to) { to = x; }
DEFORM_ATTN_INLINE void from_acc(float x, float& to) { to = x; }
DEFORM_ATTN_INLINE void from_acc(float x, BFloat16& to) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // round to nearest even
  const uint32_t nan = (bits >> 16) | 0x40u;
  to.bits = static_cast<uint16_t>(x != x ? nan : even);
}
DEFORM_ATTN_INLINE void from_acc(float x, Half& to) {
#if defined(__F16C__)
  to.bits = _cvtss_sh(x, 0);
#elif defined(DEFORM_ATTN_NEON)
  to.bits = bits_as<uint16_t>(static_cast<__fp16>(x));
#else
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (rest >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and more round to infinity
  } else if (rest < 0x38800000u) {
    // subnormal: the addition of 1/2 rounds to multiples of 2^-24, in the last bits of the sum
    half = bits_as<uint32_t>(bits_as<float>(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | half);
#endif
}

// kLanes elements.

template <int kLanes, typename T>
DEFORM_ATTN_INLINE Vec<AccOf<T>, kLanes> load(const T* from) {
  using Acc = AccOf<T>;
  Vec<Acc, kLanes> to = {};
  if constexpr (std::is_same_v<T, Acc>) {
    std::memcpy(&to, from, sizeof(to));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    Vec<uint16_t, kLanes> bits;
    std::memcpy(&bits, from, sizeof(bits));
    const auto wide = __builtin_convertvector(bits, Vec<uint32_t, kLanes>) << 16;
    std::memcpy(&to, &wide, sizeof(to));
  } else {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      const __m512 wide = _mm512_maskz_cvtph_ps(0xffff, half);
      std::memcpy(&to, &wide, sizeof(to));
      return to;
    }
#endif
#if defined(__F16C__)
    if constexpr (kLanes == 8) {
      const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      std::memcpy(&to, &wide, sizeof(to));
      return to;
    }
#endif
#if defined(__F16C__)
    if constexpr (kLanes == 4) {
      __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
      return bits_as<Vec<Acc, kLanes>>(_mm_cvtph_ps(half));
    }
#elif defined(DEFORM_ATTN_NEON)
    if constexpr (kLanes == 4) {
      uint16x4_t half;
      std::memcpy(&half, from, sizeof(half));
      return bits_as<Vec<Acc, kLanes>>(vcvt_f32_f16(vreinterpret_f16_u16(half)));
    }
#endif
    for (int i = 0; i < kLanes; ++i) to[i] = to_acc(from[i]);
  }
  return to;
}

// The bits of float32 numbers, the upper 16 of which are those of the nearest bfloat16, as in from_acc.
template <int kLanes>
DEFORM_ATTN_INLINE Vec<uint32_t, kLanes> bfloat16_bits(Vec<float, kLanes> from) {
  using Bits = Vec<uint32_t, kLanes>;
  const Bits bits = bits_as<Bits>(from);
  const Bits even = bits + 0x7fffu + ((bits >> 16) & 1u);
  return from == from ? even : bits | 0x400000u;
}

template <int kLanes, typename T>
DEFORM_ATTN_INLINE void store(T* to, Vec<AccOf<T>, kLanes> from) {
  using Acc = AccOf<T>;
  if constexpr (std::is_same_v<T, Acc>) {
    std::memcpy(to, &from, sizeof(from));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const auto rounded = bfloat16_bits<kLanes>(from) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (kLanes == 8) {  // GCC narrows in more steps
      const __m256i wide = bits_as<__m256i>(rounded);
      const __m128i narrow =
          _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
      std::memcpy(to, &narrow, sizeof(narrow));
      return;
    }
#endif
    const auto narrow = __builtin_convertvector(rounded, Vec<uint16_t, kLanes>);
    std::memcpy(to, &narrow, sizeof(narrow));
  } else {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) {
      const __m256i narrow = _mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(from), 0);
      std::memcpy(to, &narrow, sizeof(narrow));
      return;
    }
#endif
#if defined(__F16C__)
    if constexpr (kLanes == 8) {
      const __m128i narrow = _mm256_cvtps_ph(bits_as<__m256>(from), 0);
      std::memcpy(to, &narrow, sizeof(narrow));
      return;
    }
#endif
#if defined(__F16C__)
    if constexpr (kLanes == 4) {
      const __m128i narrow = _mm_cvtps_ph(bits_as<__m128>(from), 0);
      std::memcpy(to, &narrow, kLanes * sizeof(T));
      return;
    }
#elif defined(DEFORM_ATTN_NEON)
    if constexpr (kLanes == 4) {
      const uint16x4_t narrow = vreinterpret_u16_f16(vcvt_f16_f32(bits_as<float32x4_t>(from)));
      std::memcpy(to, &narrow, sizeof(narrow));
      return;
    }
#endif
    for (int i = 0; i < kLanes; ++i) from_acc(from[i], to[i]);
  }
}

template <int kLanes, typename T>
DEFORM_ATTN_INLINE Vec<AccOf<T>, kLanes> load_some(const T* from, int count) {
  Vec<AccOf<T>, kLanes> to = {};
  for (int i = 0; i < count; ++i) to[i] = to_acc(from[i]);
  return to;
}

template <int kLanes, typename T>
DEFORM_ATTN_INLINE void store_some(T* to, Vec<AccOf<T>, kLanes> from, int count) {
  for (int i = 0; i < count; ++i) from_acc(from[i], to[i]);
}

// Lanes kFirst, kFirst + 2, kFirst + 4 .. of the concatenation of a and b.
template <int kFirst, typename Acc, int kLanes, int... kIndex>
DEFORM_ATTN_INLINE Vec<Acc, kLanes> every_second(Vec<Acc, kLanes> a, Vec<Acc, kLanes> b,
                                                 std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(a, b, (2 * kIndex + kFirst)...);
}

// The lower halves of a and b interleaved, or the upper halves.
template <bool kUpper, typename V, int... kIndex>
DEFORM_ATTN_INLINE V zipped(V a, V b, std::integer_sequence<int, kIndex...>) {
  constexpr int kLanes = sizeof...(kIndex);
  return __builtin_shufflevector(a, b,
                                 (kIndex / 2 + (kUpper ? kLanes / 2 : 0) + kIndex % 2 * kLanes)...);
}

// x and y of kLanes locations, which hold them alternately.
template <int kLanes, typename Acc>
DEFORM_ATTN_INLINE void load_xy(const Acc* from, Vec<Acc, kLanes>& x, Vec<Acc, kLanes>& y) {
#if defined(__AVX__)
  if constexpr (kLanes == 8 && sizeof(x) == 32) {  // from memory to the upper half: no shuffle
    const auto halves = [](const Acc* lower, const Acc* upper) DEFORM_ATTN_INLINED {
      return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(lower)), _mm_loadu_ps(upper),
                                  1);
    };
    const __m256 even = halves(from, from + 8), odd = halves(from + 4, from + 12);
    x = _mm256_shuffle_ps(even, odd, 0x88);
    y = _mm256_shuffle_ps(even, odd, 0xdd);
    return;
  }
#endif
  constexpr auto kIndices = std::make_integer_sequence<int, kLanes>();
  const auto first = load<kLanes>(from), second = load<kLanes>(from + kLanes);
  x = every_second<0, Acc, kLanes>(first, second, kIndices);
  y = every_second<1, Acc, kLanes>(first, second, kIndices);
}

// 2 * kLanes elements as two vectors. bfloat16: a 32-bit number holds two elements, which a shift
// and a mask separate; elements 0, 2, 4 .. are in the first vector and 1, 3, 5 .. in the second. AVX2
// interleaves elements with zeros, which is faster; 0 .. 3 and 8 .. 11 are in the first vector.
template <int kLanes, typename T>
DEFORM_ATTN_INLINE void load_pair(const T* from, Vec<AccOf<T>, kLanes>& first,
                                  Vec<AccOf<T>, kLanes>& second) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (std::is_same_v<T, BFloat16> && kLanes == 8) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i zeros = _mm256_setzero_si256();
    first = bits_as<Vec<float, kLanes>>(_mm256_unpacklo_epi16(zeros, both));
    second = bits_as<Vec<float, kLanes>>(_mm256_unpackhi_epi16(zeros, both));
    return;
  }
#endif
  if constexpr (std::is_same_v<T, BFloat16> && kLittleEndian) {
    Vec<uint32_t, kLanes> both;
    std::memcpy(&both, from, sizeof(both));
    first = bits_as<Vec<float, kLanes>>(both << 16);
    second = bits_as<Vec<float, kLanes>>(both & 0xffff0000u);
    return;
  }
#if defined(DEFORM_ATTN_NEON)
  if constexpr (std::is_same_v<T, Half> && kLanes == 4) {
    uint16x8_t both;
    std::memcpy(&both, from, sizeof(both));
    const float16x8_t halves = vreinterpretq_f16_u16(both);
    first = bits_as<Vec<float, kLanes>>(vcvt_f32_f16(vget_low_f16(halves)));
    second = bits_as<Vec<float, kLanes>>(vcvt_high_f32_f16(halves));
    return;
  }
#endif
  if constexpr (!std::is_same_v<T, BFloat16> || !kLittleEndian) {
    first = load<kLanes>(from);
    second = load<kLanes>(from + kLanes);
  }
}

template <int kLanes, typename T>
DEFORM_ATTN_INLINE void store_pair(T* to, Vec<AccOf<T>, kLanes> first,
                                   Vec<AccOf<T>, kLanes> second) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (std::is_same_v<T, BFloat16> && kLanes == 8) {
    const __m256i both = _mm256_packus_epi32(bits_as<__m256i>(bfloat16_bits<kLanes>(first) >> 16),
                                             bits_as<__m256i>(bfloat16_bits<kLanes>(second) >> 16));
    std::memcpy(to, &both, sizeof(both));
    return;
  }
#endif
  if constexpr (std::is_same_v<T, BFloat16> && kLittleEndian) {
    const auto both =
        bfloat16_bits<kLanes>(first) >> 16 | (bfloat16_bits<kLanes>(second) & 0xffff0000u);
    std::memcpy(to, &both, sizeof(both));
  } else {
    store<kLanes>(to, first);
    store<kLanes>(to + kLanes, second);
  }
}

// to[4 * lane + i] = from[i][lane]
template <int kLanes, typename Lane>
DEFORM_ATTN_INLINE void store_quads(Lane* to, const Vec<Lane, kLanes> (&from)[4]) {
  using V = Vec<Lane, kLanes>;
  if constexpr (kLanes == 8 && sizeof(V) == 32) {
    // AVX2 moves numbers between the halves of a vector slowly: within halves, then stored by halves
    const V low[2] = {__builtin_shufflevector(from[0], from[1], 0, 8, 1, 9, 4, 12, 5, 13),
                      __builtin_shufflevector(from[2], from[3], 0, 8, 1, 9, 4, 12, 5, 13)};
    const V high[2] = {__builtin_shufflevector(from[0], from[1], 2, 10, 3, 11, 6, 14, 7, 15),
                       __builtin_shufflevector(from[2], from[3], 2, 10, 3, 11, 6, 14, 7, 15)};
    const V quads[4] = {__builtin_shufflevector(low[0], low[1], 0, 1, 8, 9, 4, 5, 12, 13),
                        __builtin_shufflevector(low[0], low[1], 2, 3, 10, 11, 6, 7, 14, 15),
                        __builtin_shufflevector(high[0], high[1], 0, 1, 8, 9, 4, 5, 12, 13),
                        __builtin_shufflevector(high[0], high[1], 2, 3, 10, 11, 6, 7, 14, 15)};
    each<4>([&](auto i) DEFORM_ATTN_INLINED {
#if defined(__AVX__)
      // GCC would move the upper half before it stores it
      const __m256 quad = bits_as<__m256>(quads[i]);
      _mm_storeu_ps(reinterpret_cast<float*>(to + 4 * i), _mm256_castps256_ps128(quad));
      _mm_storeu_ps(reinterpret_cast<float*>(to + 4 * (i + 4)), _mm256_extractf128_ps(quad, 1));
#else
      const auto lower = __builtin_shufflevector(quads[i], quads[i], 0, 1, 2, 3);
      const auto upper = __builtin_shufflevector(quads[i], quads[i], 4, 5, 6, 7);
      std::memcpy(to + 4 * i, &lower, sizeof(lower));
      std::memcpy(to + 4 * (i + 4), &upper, sizeof(upper));
#endif
    });
    return;
  }
  constexpr auto kIndices = std::make_integer_sequence<int, kLanes>();
  const V even[2] = {zipped<false>(from[0], from[2], kIndices),
                     zipped<true>(from[0], from[2], kIndices)};
  const V odd[2] = {zipped<false>(from[1], from[3], kIndices),
                    zipped<true>(from[1], from[3], kIndices)};
  const V quads[4] = {
      zipped<false>(even[0], odd[0], kIndices), zipped<true>(even[0], odd[0], kIndices),
      zipped<false>(even[1], odd[1], kIndices), zipped<true>(even[1], odd[1], kIndices)};
  // one by one: GCC copies the array through memory
  each<4>([&](auto i) DEFORM_ATTN_INLINED { std::memcpy(to + i * kLanes, &quads[i], sizeof(V)); });
}

// to[i][lane] = from[4 * lane + i]
template <int kLanes, typename Lane>
DEFORM_ATTN_INLINE void load_quads(const Lane* from, Vec<Lane, kLanes> (&to)[4]) {
  using V = Vec<Lane, kLanes>;
  if constexpr (kLanes == 8 && sizeof(V) == 32) {  // as in store_quads
    V quads[4];
    each<4>([&](auto i) DEFORM_ATTN_INLINED {
      Vec<Lane, 4> lower, upper;
      std::memcpy(&lower, from + 4 * i, sizeof(lower));
      std::memcpy(&upper, from + 4 * (i + 4), sizeof(upper));
      quads[i] = __builtin_shufflevector(lower, upper, 0, 1, 2, 3, 4, 5, 6, 7);
    });
    const V low[2] = {__builtin_shufflevector(quads[0], quads[1], 0, 8, 1, 9, 4, 12, 5, 13),
                      __builtin_shufflevector(quads[2], quads[3], 0, 8, 1, 9, 4, 12, 5, 13)};
    const V high[2] = {__builtin_shufflevector(quads[0], quads[1], 2, 10, 3, 11, 6, 14, 7, 15),
                       __builtin_shufflevector(quads[2], quads[3], 2, 10, 3, 11, 6, 14, 7, 15)};
    to[0] = __builtin_shufflevector(low[0], low[1], 0, 1, 8, 9, 4, 5, 12, 13);
    to[1] = __builtin_shufflevector(low[0], low[1], 2, 3, 10, 11, 6, 7, 14, 15);
    to[2] = __builtin_shufflevector(high[0], high[1], 0, 1, 8, 9, 4, 5, 12, 13);
    to[3] = __builtin_shufflevector(high[0], high[1], 2, 3, 10, 11, 6, 7, 14, 15);
    return;
  }
  constexpr auto kIndices = std::make_integer_sequence<int, kLanes>();
  V quads[4];
  each<4>([&](auto i)
              DEFORM_ATTN_INLINED { std::memcpy(&quads[i], from + i * kLanes, sizeof(V)); });
  const V even[2] = {every_second<0, Lane, kLanes>(quads[0], quads[1], kIndices),
                     every_second<0, Lane, kLanes>(quads[2], quads[3], kIndices)};
  const V odd[2] = {every_second<1, Lane, kLanes>(quads[0], quads[1], kIndices),
                    every_second<1, Lane, kLanes>(quads[2], quads[3], kIndices)};
  to[0] = every_second<0, Lane, kLanes>(even[0], even[1], kIndices);
  to[1] = every_second<0, Lane, kLanes>(odd[0], odd[1], kIndices);
  to[2] = every_second<1, Lane, kLanes>(even[0], even[1], kIndices);
  to[3] = every_second<1, Lane, kLanes>(odd[0], odd[1], kIndices);
}

template <typename Acc_, int kLanes>
struct VectorNumbers {
  using Lane = Acc_;
  using Acc = Vec<Lane, kLanes>;
  using IntLane = std::conditional_t<sizeof(Lane) == 4, int32_t, int64_t>;
  using Int = Vec<IntLane, kLanes>;
  using Mask = Int;

  static DEFORM_ATTN_INLINE Acc multiply_add(Acc a, Acc b, Acc c) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Lane, float> && kLanes == 16) return _mm512_fmadd_ps(a, b, c);
    if constexpr (std::is_same_v<Lane, double> && kLanes == 8) return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
    if constexpr (std::is_same_v<Lane, float> && kLanes == 8) return _mm256_fmadd_ps(a, b, c);
    if constexpr (std::is_same_v<Lane, float> && kLanes == 4) return _mm_fmadd_ps(a, b, c);
    if constexpr (std::is_same_v<Lane, double> && kLanes == 4) return _mm256_fmadd_pd(a, b, c);
#elif defined(DEFORM_ATTN_NEON)
    if constexpr (std::is_same_v<Acc, Vec<float, 4>>) {
      return bits_as<Acc>(
          vfmaq_f32(bits_as<float32x4_t>(c), bits_as<float32x4_t>(a), bits_as<float32x4_t>(b)));
    }
    if constexpr (std::is_same_v<Acc, Vec<double, 2>>) {
      return bits_as<Acc>(
          vfmaq_f64(bits_as<float64x2_t>(c), bits_as<float64x2_t>(a), bits_as<float64x2_t>(b)));
    }
#endif
    Acc sum;
    for (int i = 0; i < kLanes; ++i) sum[i] = Numbers<Lane>::multiply_add(a[i], b[i], c[i]);
    return sum;
  }
  // Beyond the range of integers, and for NaN, a number that is off every map, or NaN. x86 converts
  // NaN to the lowest integer, other processors to 0.
  static DEFORM_ATTN_INLINE Acc round_down(Acc x) {
#if defined(DEFORM_ATTN_NEON)
    if constexpr (std::is_same_v<Acc, Vec<float, 4>>) {
      return bits_as<Acc>(vrndmq_f32(bits_as<float32x4_t>(x)));
    }
    if constexpr (std::is_same_v<Acc, Vec<double, 2>>) {
      return bits_as<Acc>(vrndmq_f64(bits_as<float64x2_t>(x)));
    }
#endif
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Lane, float> && kLanes == 16) return _mm512_floor_ps(x);
    if constexpr (std::is_same_v<Lane, double> && kLanes == 8) return _mm512_floor_pd(x);
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<Lane, float> && kLanes == 8) return _mm256_floor_ps(x);
    if constexpr (std::is_same_v<Lane, float> && kLanes == 4) return _mm_floor_ps(x);
    if constexpr (std::is_same_v<Lane, double> && kLanes == 4) return _mm256_floor_pd(x);
#endif
    const Acc towards_zero = to_acc(to_int(x));
    const Acc whole = towards_zero > x ? towards_zero - 1 : towards_zero;
#if defined(__x86_64__)
    return whole;
#else
    return x == x ? whole : x;
#endif
  }
  static DEFORM_ATTN_INLINE Int to_int(Acc x) { return __builtin_convertvector(x, Int); }
  static DEFORM_ATTN_INLINE Acc to_acc(Int x) { return __builtin_convertvector(x, Acc); }
  static DEFORM_ATTN_INLINE Mask mask(Mask compared) {
    // Hides from GCC that this is a comparison: it would combine AVX-512 masks bit by bit.
#if defined(__x86_64__) && !defined(__clang__)
    asm("" : "+v"(compared));
#endif
    return compared;
  }
  static DEFORM_ATTN_INLINE Acc where(Mask mask, Acc x) {
    return bits_as<Acc>(bits_as<Mask>(x) & mask);
  }

  // Of locations along one axis.
  struct Axis {
    Int pixel;     // at or before the location; its lowest numbers and NaN: off every map
    Acc fraction;  // towards the next pixel; any number, or NaN, where neither pixel is on the map
    Mask on, next_on;
  };
  // As pixel_of (bilinear.h), with integers instead of floating-point numbers. `last`: size - 1.
  static DEFORM_ATTN_INLINE Axis axis(Acc location, Acc size, Int last) {
    using Bits = Vec<std::make_unsigned_t<IntLane>, kLanes>;
    const Acc half = Acc{} + Lane(0.5);
    // Towards zero is down wherever a pixel is on the map. Rounding can make this one too large.
    Int next = to_index(multiply_add(location, size, half));
    Acc fraction = multiply_add(location, size, half - to_acc(next));
    const auto before = fraction < Acc{};
    fraction += where(before, Acc{} + 1);
    // unsigned: the lowest integer minus one is off every map, too
    const Bits end = bits_as<Bits>(last), after = bits_as<Bits>(next) + bits_as<Bits>(before);
    const Bits pixel = after - 1;
    return {bits_as<Int>(pixel), fraction, mask(pixel <= end), mask(after <= end)};
  }

 private:
  // An integer that is off every map for NaN, and beyond the range of integers.
  static DEFORM_ATTN_INLINE Int to_index(Acc x) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Lane, float> && kLanes == 16) {
      return bits_as<Int>(_mm512_maskz_cvttps_epi32(0xffff, x));  // the lowest integer
    }
#elif defined(__AVX__)
    if constexpr (std::is_same_v<Lane, float> && kLanes == 8) {
      return bits_as<Int>(_mm256_cvttps_epi32(x));
    }
#elif defined(__SSE2__)
    if constexpr (std::is_same_v<Lane, float> && kLanes == 4) {
      return bits_as<Int>(_mm_cvttps_epi32(x));
    }
#endif
    return to_int(x) | ~(x == x);
  }
};

// Horizontal sums of four vectors, in three steps: `paired` halves the lanes of two vectors into one,
// `quartered` those of two such results, `rotated` adds the lanes within each quarter.
template <typename Acc, int kLanes, int... kIndex>
DEFORM_ATTN_INLINE Vec<Acc, kLanes> paired(Vec<Acc, kLanes> a, Vec<Acc, kLanes> b,
                                           std::integer_sequence<int, kIndex...>) {
  // a's upper half onto its lower half, b's lower half onto its upper half
  constexpr int kHalf = kLanes / 2;
  return __builtin_shufflevector(a, b, (kIndex < kHalf ? kIndex : kLanes + kIndex)...) +
         __builtin_shufflevector(a, b, (kIndex + kHalf)...);
}
template <typename Acc, int kLanes, int... kIndex>
DEFORM_ATTN_INLINE Vec<Acc, kLanes> quartered(Vec<Acc, kLanes> a, Vec<Acc, kLanes> b,
                                              std::integer_sequence<int, kIndex...>) {
  // a and b hold two sums each, a half a sum; the result holds four, a quarter a sum
  constexpr int kQuarter = kLanes / 4;
  return __builtin_shufflevector(a, b,
                                 ((kIndex / kQuarter / 2) * kLanes +
                                  (kIndex / kQuarter % 2) * 2 * kQuarter + kIndex % kQuarter)...) +
         __builtin_shufflevector(
             a, b,
             ((kIndex / kQuarter / 2) * kLanes + (kIndex / kQuarter % 2) * 2 * kQuarter + kQuarter +
              kIndex % kQuarter)...);
}
template <typename Acc, int kLanes, int... kIndex>
DEFORM_ATTN_INLINE Vec<Acc, kLanes> rotated(Vec<Acc, kLanes> a, int by,
                                            std::integer_sequence<int, kIndex...>) {
  // within quarters
  constexpr int kQuarter = kLanes / 4;
  if (by == 1) {
    return __builtin_shufflevector(a, a,
                                   (kIndex / kQuarter * kQuarter + (kIndex + 1) % kQuarter)...);
  }
  return __builtin_shufflevector(a, a, (kIndex / kQuarter * kQuarter + (kIndex + 2) % kQuarter)...);
}
template <typename Acc, int kLanes>
DEFORM_ATTN_INLINE void four_sums(const Vec<Acc, kLanes> (&from)[4], Vec<Acc, 4>& to) {
  if constexpr (kLanes == 8 && sizeof(from[0]) == 32) {  // as in store_quads: within halves
    using V = Vec<Acc, kLanes>;
    const auto halved = [](V a, V b) DEFORM_ATTN_INLINED {
      return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
             __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    };
    const V one = halved(from[0], from[1]), other = halved(from[2], from[3]);
    const V sums = __builtin_shufflevector(one, other, 0, 1, 8, 9, 4, 5, 12, 13) +
                   __builtin_shufflevector(one, other, 2, 3, 10, 11, 6, 7, 14, 15);
    to = __builtin_shufflevector(sums, sums, 0, 1, 2, 3) +
         __builtin_shufflevector(sums, sums, 4, 5, 6, 7);
  } else if constexpr (kLanes >= 4) {
    constexpr auto kIndices = std::make_integer_sequence<int, kLanes>();
    auto sums = quartered<Acc, kLanes>(paired<Acc, kLanes>(from[0], from[1], kIndices),
                                       paired<Acc, kLanes>(from[2], from[3], kIndices), kIndices);
    if constexpr (kLanes >= 16) sums += rotated<Acc, kLanes>(sums, 2, kIndices);
    if constexpr (kLanes >= 8) sums += rotated<Acc, kLanes>(sums, 1, kIndices);
    constexpr int kQuarter = kLanes / 4;
    to = __builtin_shufflevector(sums, sums, 0, kQuarter, 2 * kQuarter, 3 * kQuarter);
  } else {
    for (int i = 0; i < 4; ++i) {
      to[i] = from[i][0];
      for (int j = 1; j < kLanes; ++j) to[i] += from[i][j];
    }
  }
}

// Copies whole cache lines to memory with streaming stores: the line is not read first, and evicts
// no other from the caches. Both sides are aligned to cache lines. finish_streams() must follow
// before another thread reads the memory.
DEFORM_ATTN_INLINE void stream(void* to, const void* from, size_t bytes) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
  using Part = __m512i;
  const auto put = [](Part* at, Part part) DEFORM_ATTN_INLINED { _mm512_stream_si512(at, part); };
#elif defined(__AVX__)
  using Part = __m256i;
  const auto put = [](Part* at, Part part) DEFORM_ATTN_INLINED { _mm256_stream_si256(at, part); };
#else
  using Part = __m128i;
  const auto put = [](Part* at, Part part) DEFORM_ATTN_INLINED { _mm_stream_si128(at, part); };
#endif
  auto* parts = static_cast<Part*>(to);
  const auto* source = static_cast<const Part*>(from);
  for (size_t i = 0; i < bytes / sizeof(Part); ++i) put(parts + i, source[i]);
#else
  std::memcpy(to, from, bytes);
#endif
}
DEFORM_ATTN_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace deform_attn::cpu
