// csrc/cpu/blocks.h and clear.h without torch, for the sanitizers.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/clear.h"

namespace {

using deform_attn::cpu::KeptBlocks;

int failures = 0;

void expect(bool right, const char* what) {
  if (right) return;
  std::printf("expected: %s\n", what);
  ++failures;
}

constexpr size_t kMega = size_t{1} << 20, kMost = 64 * kMega;

thread_local void* new_memory = nullptr;
thread_local size_t new_bytes = 0;

void prepare(void* memory, size_t bytes) {
  new_memory = memory;
  new_bytes = bytes;
}

void* take(KeptBlocks& blocks, size_t bytes, bool expected_fresh, const char* what) {
  bool fresh = false;
  void* data = blocks.take(bytes, fresh);
  expect(fresh == expected_fresh, what);
  std::memset(data, 1, bytes);  // a sanitizer finds what is too small or freed
  return data;
}

void sizes() {
  KeptBlocks blocks(kMost, KeptBlocks::Use::kResults, prepare);
  void* four = take(blocks, 4 * kMega, true, "nothing is kept at the start");
  void* five = take(blocks, 5 * kMega, true, "a block in use is not given again");
  blocks.give(four);
  blocks.give(five);
  void* again = take(blocks, 4 * kMega, false, "a kept block of this size");
  expect(again == four, "the smallest that suffices");
  void* larger = take(blocks, 4 * kMega + 1, false, "a larger block that suffices");
  expect(larger == five, "the block of 5 MB");
  blocks.give(four);
  void* small = take(blocks, 3 * kMega, true, "no block that is larger than 5/4");
  void* large = take(blocks, 4 * kMega + 1, true, "no block that is too small");
  for (void* data : {five, small, large}) blocks.give(data);
}

void limit() {
  KeptBlocks blocks(kMost, KeptBlocks::Use::kResults, prepare);
  constexpr size_t kThird = kMost / 3;
  void* first = take(blocks, kThird, true, "a new block");
  void* second = take(blocks, 2 * kThird, true, "a new block");
  void* third = take(blocks, kThird / 2, true, "a new block");
  void* huge = take(blocks, kMost + 1, true, "a new block");
  blocks.give(first);
  blocks.give(second);
  blocks.give(third);  // more than kMost with the two before it
  blocks.give(huge);   // more than kMost alone
  void* new_first = take(blocks, kThird, true, "the oldest is freed");
  void* old_second = take(blocks, 2 * kThird, false, "the second is kept");
  void* old_third = take(blocks, kThird / 2, false, "the newest is kept");
  void* new_huge = take(blocks, kMost + 1, true, "the largest is not kept");
  for (void* data : {new_first, old_second, old_third, new_huge}) blocks.give(data);
}

void any_size_to_work_in() {
  KeptBlocks blocks(kMost, KeptBlocks::Use::kWork, prepare);
  void* large = take(blocks, 8 * kMega, true, "nothing is kept at the start");
  void* small = take(blocks, 100, true, "a block in use is not given again");
  blocks.give(small);
  blocks.give(large);
  expect(take(blocks, 50, false, "a small one is kept") == small, "the smallest that suffices");
  expect(take(blocks, 101, false, "a larger one suffices") == large, "the block of 8 MB");
  blocks.give(small);
  KeptBlocks::drop(large);
  KeptBlocks::drop(take(blocks, 101, true, "what was dropped is not given again"));
}

// A large block to work in begins and ends with a huge page, so that the system can map it with such pages.
void huge_pages() {
  constexpr size_t kHuge = KeptBlocks::kHuge;
  for (const size_t bytes : {kHuge / 2, kHuge, 3 * kHuge + 1}) {
    KeptBlocks blocks(kMost, KeptBlocks::Use::kWork, prepare);
    void* data = take(blocks, bytes, true, "nothing is kept at the start");
    const auto before =
        static_cast<size_t>(static_cast<char*>(data) - static_cast<char*>(new_memory));
    expect(reinterpret_cast<uintptr_t>(new_memory) % kHuge == 0, "the start of a huge page");
    expect(new_bytes % kHuge == 0, "whole huge pages");
    expect(before < new_bytes && new_bytes - before >= bytes, "room for the array");
    expect(new_bytes - before - bytes < kHuge, "no page more than needed");
    expect(KeptBlocks::size_of(data) == new_bytes - before,
           "the bytes from the start of the block");
    blocks.give(data);
    expect(take(blocks, bytes, false, "a kept block of this size") == data, "the same block");
    blocks.give(data);
  }
}

void without_memory() {
  KeptBlocks blocks(kMost, KeptBlocks::Use::kResults, prepare);
  bool fresh = false;
  expect(blocks.take(PTRDIFF_MAX - 2 * kMega, fresh) == nullptr, "null, no exception");
}

// Enough rounds that threads meet in a call, so that the sanitizer finds what is not under the lock.
void threads() {
  KeptBlocks blocks(kMost, KeptBlocks::Use::kResults, prepare);
  std::vector<std::thread> all;
  std::vector<int> wrong(4, 0);
  for (int i = 0; i < 4; ++i) {
    all.emplace_back([&blocks, &wrong, i] {
      for (int round = 0; round < 3000; ++round) {
        const size_t bytes = kMega + static_cast<size_t>(round % 3) * 1000;
        bool fresh = false;
        auto* data = static_cast<unsigned char*>(blocks.take(bytes, fresh));
        std::memset(data, i, 64);
        data[bytes - 1] = static_cast<unsigned char>(i);
        wrong[static_cast<size_t>(i)] += data[63] != i || data[bytes - 1] != i;
        blocks.give(data);
      }
    });
  }
  for (std::thread& thread : all) thread.join();
  for (const int count : wrong) expect(count == 0, "each thread has a block of its own");
}

// Nothing but the array is written, also where it is no whole number of cache lines.
void zeros() {
  for (const size_t bytes : {0, 1, 63, 64, 511, 512, 513, 4096, 20001}) {
    for (const size_t start : {0, 1, 40}) {
      std::vector<char> numbers(start + bytes + 1, 7);  // a sanitizer finds what is behind them
      deform_attn::cpu::clear_bytes(numbers.data() + start, bytes);
      bool right = true;
      for (size_t i = 0; i < numbers.size(); ++i) {
        right &= numbers[i] == (i >= start && i < start + bytes ? 0 : 7);
      }
      expect(right, "zeros in the array, and nothing beside it");
    }
  }
}

}  // namespace

int main() {
  sizes();
  limit();
  any_size_to_work_in();
  huge_pages();
  without_memory();
  threads();
  zeros();
  return failures ? 1 : 0;
}
