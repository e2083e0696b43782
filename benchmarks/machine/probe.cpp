// What this machine can do. Compiled by probe.py at run time, for this very processor; plain C
// functions, all return seconds.
//
//   multiply_add  fused multiply-adds in registers
//   stream        reads memory from its beginning to its end
//   gather        reads rows in a given order and sums them, weighted, as the operator does
//   handover      gives a cache line to another core and gets it back
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / sizeof(float);
typedef float Vector __attribute__((vector_size(kBytes)));

constexpr int kChains = 12;  // enough independent sums to hide the latency of an addition
constexpr int kRow = 32;     // floats: head_dim of most models
constexpr int kParts = kRow / kLanes;

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

void keep(Vector& v) { asm volatile("" : "+m"(v)); }  // the compiler may not drop its computation

// kAhead: rows between a prefetch and its use.
template <int kAhead>
double gather_ahead(const float* data, const int32_t* rows, const float* weights, int64_t count,
                    int64_t repeats) {
  Vector sums[2][kParts] = {};
  const double start = now();
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t i = 0; i < count; i += 2) {
      for (int k = 0; k < 2; ++k) {
        if (kAhead > 0) {
          const char* later = reinterpret_cast<const char*>(
              data + int64_t{rows[i + k + kAhead < count ? i + k + kAhead : i + k]} * kRow);
          __builtin_prefetch(later, 0, kAhead > 64 ? 2 : 3);
          __builtin_prefetch(later + 64, 0, kAhead > 64 ? 2 : 3);
        }
        const float* row = data + int64_t{rows[i + k]} * kRow;
        for (int p = 0; p < kParts; ++p) sums[k][p] += weights[i + k] * load(row + p * kLanes);
      }
    }
    asm volatile("" ::: "memory");
  }
  const double seconds = now() - start;
  for (auto& half : sums)
    for (Vector& sum : half) keep(sum);
  return seconds;
}

}  // namespace

extern "C" {

int lanes() { return kLanes; }

double multiply_add(int64_t count) {  // of vectors
  Vector sums[kChains] = {};
  Vector a = Vector{} + 1.0f, b = Vector{} + 0.5f;
  keep(a), keep(b);
  const double start = now();
  for (int64_t i = 0; i < count; i += kChains)
    for (Vector& sum : sums) sum = a * sum + b;
  const double seconds = now() - start;
  for (Vector& sum : sums) keep(sum);
  return seconds;
}

double stream(const float* data, int64_t size, int64_t repeats) {  // size: floats
  Vector sums[kChains] = {};
  const int64_t step = int64_t{kChains} * kLanes;
  const double start = now();
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t i = 0; i + step <= size; i += step)
      for (int j = 0; j < kChains; ++j) sums[j] += load(data + i + j * kLanes);
    asm volatile("" ::: "memory");
  }
  const double seconds = now() - start;
  for (Vector& sum : sums) keep(sum);
  return seconds;
}

// Prefetching: 0 none, 1 into the first-level cache, 2 into the second-level cache, farther ahead.
// Which is fastest depends on the level that holds the rows; the caller takes the fastest of the three.
double gather(const float* data, const int32_t* rows, const float* weights, int64_t count,
              int64_t repeats, int prefetching) {
  switch (prefetching) {
    case 0:
      return gather_ahead<0>(data, rows, weights, count, repeats);
    case 1:
      return gather_ahead<24>(data, rows, weights, count, repeats);
    default:
      return gather_ahead<384>(data, rows, weights, count, repeats);
  }
}

double handover(int64_t count) {
  alignas(64) std::atomic<int64_t> turn{0};
  std::atomic<bool> ready{false};
  std::thread other([&] {
    ready = true;
    for (int64_t i = 0; i < count; ++i) {
      while (turn.load(std::memory_order_acquire) != 2 * i + 1) {
      }
      turn.store(2 * i + 2, std::memory_order_release);
    }
  });
  while (!ready) std::this_thread::yield();
  const double start = now();
  for (int64_t i = 0; i < count; ++i) {
    turn.store(2 * i + 1, std::memory_order_release);
    while (turn.load(std::memory_order_acquire) != 2 * i + 2) {
    }
  }
  const double seconds = now() - start;
  other.join();
  return seconds;
}

}  // extern "C"
