// Memory that is kept from one call to the next: that of large results, and that which a call works in.
//
// Linux maps fresh memory page by page when it is first written, which can take longer than the pass that
// writes it, and the C library returns freed memory to the system. Blocks are kept instead.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace deform_attn::cpu {

class KeptBlocks {
 public:
  enum class Use {
    kResults,  // in use for long: small ones are cheap to map, large ones would be wasted on small results
    kWork,  // in use for a call: a larger block is as good. Passes read and write them in no order, which
            // takes longer where pages are small: large ones consist of huge pages
  };
  static constexpr size_t kSmallest = size_t{1} << 20;  // bytes of a result
  static constexpr size_t kHuge = size_t{1} << 21;      // bytes of a huge page

  // Called with new memory before anything is written to it: the first write to a page decides its size.
  using Prepare = void (*)(void* memory, size_t bytes);

  // Keeps at most `most` bytes.
  KeptBlocks(size_t most, Use use, Prepare prepare)
      : most_(most), of_work_(use == Use::kWork), prepare_(prepare) {}
  ~KeptBlocks() {
    for (void* data : kept_) drop(data);
  }

  // Whether a block of this size is kept when it is given back.
  bool keeps(size_t bytes) const { return (of_work_ || bytes >= kSmallest) && bytes <= most_; }

  // A block of `bytes` or more; null where there is no memory. `fresh`: it is new, of unknown contents.
  void* take(size_t bytes, bool& fresh) {
    const bool huge = of_work_ && bytes >= kHuge / 2;
    if (huge) bytes = (kOffset + bytes + kHuge - 1) / kHuge * kHuge - kOffset;
    fresh = false;
    if (void* data = kept(bytes)) return data;
    fresh = true;
    const std::align_val_t alignment{huge ? kHuge : kPage};
    void* memory = ::operator new(kOffset + bytes, alignment, std::nothrow);
    if (memory == nullptr) return nullptr;
    prepare_(memory, kOffset + bytes);
    ::new (memory) Header{bytes, alignment};
    return static_cast<char*>(memory) + kOffset;
  }

  // The bytes of a block: as many as `take` was asked for, or more.
  static size_t size_of(void* data) { return header_of(data).bytes; }

  // A block that is not used any more. It is kept, and the oldest are freed. Where another thread is
  // in here, it is freed: a lock that was held when the process was forked stays locked.
  void give(void* data) noexcept {
    if (!keep(data)) drop(data);
  }

  // Frees a block.
  static void drop(void* data) noexcept {
    Header& header = header_of(data);
    ::operator delete(&header, header.alignment);
  }

 private:
  // Where an array is read and another one written in turn, a read waits for a write to the same place of
  // another page. Large arrays of torch begin 0 or 64 bytes after the start of a page, and the pixels of a
  // head are often 1024 bytes apart: a block begins about half of that away from all of them.
  static constexpr size_t kPage = 4096, kOffset = kPage / 2 + 512;

  // At the start of the memory of a block.
  struct Header {
    size_t bytes;  // of the block
    std::align_val_t alignment;
  };
  static Header& header_of(void* data) {
    return *reinterpret_cast<Header*>(static_cast<char*>(data) - kOffset);
  }

  // Reads and changes nothing where another thread is in here.
  void* kept(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    size_t best = kept_.size();
    for (size_t i = kept_.size(); i-- > 0;) {  // the newest of the smallest
      const size_t size = size_of(kept_[i]);
      if (size < bytes || (!of_work_ && size > bytes + bytes / 4)) continue;
      if (best == kept_.size() || size < size_of(kept_[best])) best = i;
    }
    if (best == kept_.size()) return nullptr;
    void* data = kept_[best];
    kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(best));
    bytes_ -= size_of(data);
    return data;
  }

  bool keep(void* data) noexcept {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || !keeps(size_of(data))) return false;
    try {
      kept_.push_back(data);
    } catch (const std::bad_alloc&) {
      return false;
    }
    bytes_ += size_of(data);
    while (bytes_ > most_) {
      bytes_ -= size_of(kept_.front());
      drop(kept_.front());
      kept_.erase(kept_.begin());
    }
    return true;
  }

  const size_t most_;
  const bool of_work_;
  const Prepare prepare_;
  std::mutex mutex_;
  std::vector<void*> kept_;  // the newest last
  size_t bytes_ = 0;         // of all that are kept
};

}  // namespace deform_attn::cpu
