// The CPU library: registers the CPU kernels through torch's stable ABI.
//
//   usable_kernels, chosen_kernels   the kernels for this processor (X86 reads its features)
//   Scratch                          a thread's working memory
//   inputs_of                        from a Call to the kernels' Inputs
//   kept_blocks, .., empty, clear    memory kept between calls, new tensors, zeros
//   WorkArrays                       copies of pixels, and zeros to which gradients are added
//   sort_queries                     the order of visits of queries that are not pixels
//   run_forward                      a forward pass on all threads
//   plan_of, run_backward            a backward pass on all threads
//   forward, backward, fused_forward, fused_backward, build   the operators

#include <torch/csrc/stable/library.h>

#if defined(__linux__)
#include <dlfcn.h>
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <tuple>
#include <utility>

#include "../boxed.h"
#include "../checks.h"
#include "blocks.h"
#include "clear.h"
#include "kernels.h"

namespace deform_attn {
namespace {

using cpu::Kernels;

#if defined(__x86_64__)
// What the processor has and the operating system saves. CPUID is read here because
// __builtin_cpu_supports needs a runtime library that Zig and clang-cl lack.
struct X86 {
  bool avx2 = false, avx512 = false;
  bool fetches_pairs = false;  // Inputs; of Intel's processors only

  X86() {
    constexpr unsigned kFma = 1u << 12, kXsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
    constexpr unsigned kBasic = kFma | kXsave | kAvx | kF16c;
    constexpr unsigned kAvx2 = 1u << 5;
    constexpr unsigned kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    constexpr unsigned kYmmSaved = 0x6, kZmmSaved = 0xe6;
    unsigned a = 0, b = 0, c = 0, d = 0;
    fetches_pairs = __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kBasic) != kBasic) return;
    unsigned saved = 0, upper = 0;
    asm volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = (b & kAvx2) && (saved & kYmmSaved) == kYmmSaved;
    avx512 = avx2 && (b & kAvx512) == kAvx512 && (saved & kZmmSaved) == kZmmSaved;
  }
};

const X86& x86() {
  static const X86 processor;
  return processor;
}
#endif

// The kernels that run on this processor, the fastest first.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#if defined(__x86_64__)
  const X86& processor = x86();
  if (processor.avx512) usable.push_back(&cpu::kAvx512);
  if (processor.avx2) usable.push_back(&cpu::kAvx2);
#endif
  usable.push_back(&cpu::kPortable);
  return usable;
}

std::string names_of(const std::vector<const Kernels*>& usable) {
  std::string names;
  for (const Kernels* kernels : usable) {
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  return names;
}

// A name without its hyphens, in lower case: "avx512" names "AVX-512".
std::string plain_name(const char* name) {
  std::string plain;
  for (; *name; ++name) {
    if (*name != '-') plain += static_cast<char>(*name >= 'A' && *name <= 'Z' ? *name + 32 : *name);
  }
  return plain;
}

// The fastest kernels for this processor, or those that DEFORM_ATTN_CPU names.
const Kernels& choose_kernels() {
  const std::vector<const Kernels*> usable = usable_kernels();
  const char* forced = std::getenv("DEFORM_ATTN_CPU");
  if (forced == nullptr || *forced == '\0') return *usable.front();
  for (const Kernels* kernels : usable) {
    if (plain_name(kernels->name) == plain_name(forced)) return *kernels;
  }
  throw std::runtime_error("DEFORM_ATTN_CPU: expected one of " + names_of(usable) +
                           " on this processor, got " + forced);
}

const Kernels& chosen_kernels() {
  static const Kernels& kernels = choose_kernels();
  return kernels;
}

class Scratch {
 public:
  explicit Scratch(size_t bytes) : bytes_(::operator new(bytes, std::align_val_t{64})) {}
  ~Scratch() { ::operator delete(bytes_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return bytes_; }

 private:
  void* bytes_;
};

// Whether query i is pixel i of the concatenated levels.
bool queries_are_pixels(const Problem& problem, const std::vector<Level>& levels) {
  int64_t next = 0;
  for (const Level& level : levels) {
    if (level.start != next) return false;
    next += int64_t{level.height} * level.width;
  }
  return next == problem.queries && levels.size() > 0;
}

cpu::Inputs inputs_of(const Call& call, const std::vector<Level>& levels, double offset_scale = 0) {
  const int64_t numbers = call.problem.rows * call.problem.row_stride();  // of an image
  DEFORM_ATTN_REQUIRE(numbers <= std::numeric_limits<int32_t>::max(),
                      "value: expected fewer than 2**31 numbers in an image on a CPU, got ",
                      numbers, "; divide the heads among several calls");
  cpu::Inputs in;
  in.problem = call.problem;
  in.levels = levels.data();
  in.first_point = call.first_point.data();
  in.queries_are_pixels = queries_are_pixels(call.problem, levels);
  in.value_type = type_of(call.type);
  in.weights_are_acc = call.weights_are_acc;
  in.value = call.value.const_data_ptr();
  in.locations = call.locations.const_data_ptr();
  in.weights = call.weights.const_data_ptr();
  in.mask = call.mask ? static_cast<const uint8_t*>(call.mask->const_data_ptr()) : nullptr;
  in.fused = {};
  in.order = nullptr;
  in.copy = nullptr;
  in.first_head = 0;
  in.heads = call.problem.heads;
#if defined(__x86_64__)
  in.fetches_pairs = x86().fetches_pairs;
#else
  in.fetches_pairs = false;
#endif
  if (call.reference) {
    in.fused = {call.reference->const_data_ptr(), static_cast<int>(call.reference->size(2)),
                static_cast<int>(call.reference->size(3)), offset_scale};
  }
  return in;
}

// The system maps fresh memory page by page when it is first written. For large tensors this asks for
// pages of 2 MB instead of 4 kB: fewer page faults and TLB misses. With several threads, each maps a
// part in advance: two threads that fault on the same page both clear a page, and one is discarded.
void ask_for_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (first >= last) return;
  // a hint: its failure changes nothing
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#if defined(MADV_POPULATE_WRITE)
  if (torch::stable::get_num_threads() == 1) return;
  const auto pages = static_cast<int64_t>((last - first) / kHuge);
  torch::stable::parallel_for(0, pages, 1, [&](int64_t from, int64_t to) {
    madvise(reinterpret_cast<void*>(first + static_cast<uintptr_t>(from) * kHuge),
            static_cast<size_t>(to - from) * kHuge, MADV_POPULATE_WRITE);
  });
#endif
#else
  (void)data, (void)bytes;
#endif
}

// Bytes of freed results that are kept for later calls; DEFORM_ATTN_KEEP_MB is in units of 2^20 bytes.
size_t read_bytes_to_keep() {
  const char* given = std::getenv("DEFORM_ATTN_KEEP_MB");
  if (given == nullptr || *given == '\0') return size_t{128} << 20;
  char* end = nullptr;
  const long count = std::strtol(given, &end, 10);
  DEFORM_ATTN_REQUIRE(*end == '\0' && count >= 0 && count < 1 << 20,
                      "DEFORM_ATTN_KEEP_MB: expected a number from 0 to 1048575, got ", given);
  return static_cast<size_t>(count) << 20;
}

size_t bytes_to_keep() {
  static const size_t bytes = read_bytes_to_keep();
  return bytes;
}

// Never destroyed: tensors may live longer than this library's variables.
cpu::KeptBlocks& kept_blocks() {
  static auto& blocks =
      *new cpu::KeptBlocks(bytes_to_keep(), cpu::KeptBlocks::Use::kResults, ask_for_pages);
  return blocks;
}

// A call gives them back as zeros.
cpu::KeptBlocks& kept_zeros() {
  static auto& blocks = *new cpu::KeptBlocks(std::min(size_t{64} << 20, bytes_to_keep()),
                                             cpu::KeptBlocks::Use::kWork, ask_for_pages);
  return blocks;
}

cpu::KeptBlocks& kept_copies() {
  static auto& blocks = *new cpu::KeptBlocks(std::min(size_t{64} << 20, bytes_to_keep()),
                                             cpu::KeptBlocks::Use::kWork, ask_for_pages);
  return blocks;
}

// Makes a tensor of a block and calls `deleter` when the tensor is freed: a function of torch 2.11 and
// later, hence looked up by its name.
using TensorOfBlock = AOTITorchError (*)(void* data, int64_t dimensions, const int64_t* sizes,
                                         const int64_t* strides, int64_t offset, int32_t dtype,
                                         int32_t device_type, int32_t device_index,
                                         AtenTensorHandle* tensor, int32_t layout,
                                         const uint8_t* metadata, int64_t metadata_size,
                                         void (*deleter)(void* data, void* context), void* context);

// Null where torch lacks it, and where blocks are not kept: that was measured on Linux alone.
TensorOfBlock tensor_of_block() {
#if defined(__linux__)
  static const auto function =
      reinterpret_cast<TensorOfBlock>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return function;
#else
  return nullptr;
#endif
}

// An uninitialised tensor, straight from the allocator: torch's dispatched at::empty takes longer
// than a small forward pass. Large ones take their memory from the kept blocks.
template <typename Shape>
Tensor empty(const Shape& shape, ScalarType type) {
  std::vector<int64_t> sizes(shape.begin(), shape.end()), strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  }
  const auto dimensions = static_cast<int64_t>(sizes.size());
  const size_t numbers = static_cast<size_t>(dimensions > 0 ? sizes[0] * strides[0] : 1);
  const size_t bytes = numbers * bytes_of(type);
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const auto device = aoti_torch_device_type_cpu();
  AtenTensorHandle handle;
  bool fresh = false;
  void* block = nullptr;
  if (tensor_of_block() != nullptr && kept_blocks().keeps(bytes)) {
    block = kept_blocks().take(bytes, fresh);
  }
  if (block != nullptr) {
    const auto give_back = [](void* data, void*) { kept_blocks().give(data); };
    const AOTITorchError error =
        tensor_of_block()(block, dimensions, sizes.data(), strides.data(), 0, dtype, device, -1,
                          &handle, aoti_torch_layout_strided(), nullptr, 0, give_back, nullptr);
    if (error != AOTI_TORCH_SUCCESS) kept_blocks().give(block);
    TORCH_ERROR_CODE_CHECK(error);
  } else {  // without memory this raises torch's error
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, sizes.data(), strides.data(), dtype,
                                                    device, 0, &handle));
  }
  const Tensor tensor(handle);
  if (block == nullptr) ask_for_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

// On all threads: the first write to a page maps it.
void clear(void* data, int64_t bytes) {
  torch::stable::parallel_for(0, bytes, int64_t{1} << 18, [&](int64_t first, int64_t last) {
    cpu::clear_bytes(static_cast<char*>(data) + first, static_cast<size_t>(last - first));
  });
}

// Arrays that a call works in, kept for later calls.
class WorkArrays {
 public:
  enum class Use {
    kCopies,  // of any contents
    kSums,  // zeros, kept because clearing takes long. A call that has written to them must clear what it
            // wrote and call restored(); otherwise they are freed
  };

  // `count` arrays of `numbers` numbers of `size` bytes. On the caller's thread, which does not compete for
  // the lock of the kept blocks. It delegates, so that the destructor frees the first blocks where there is
  // no memory for all.
  WorkArrays(Use use, int64_t count, int64_t numbers, size_t size) : WorkArrays(use) {
    const auto bytes = static_cast<size_t>(std::max<int64_t>(numbers, 1)) * size;
    for (int64_t i = 0; i < count; ++i) {
      bool fresh = false;
      blocks_.push_back(kept_.take(bytes, fresh));
      if (blocks_.back() == nullptr) throw std::bad_alloc();
      if (fresh && use == Use::kSums) {  // the whole block: a later call may need more of it
        clear(blocks_.back(), static_cast<int64_t>(cpu::KeptBlocks::size_of(blocks_.back())));
      }
    }
  }
  ~WorkArrays() {
    for (void* block : blocks_) {
      if (block != nullptr) restored_ ? kept_.give(block) : cpu::KeptBlocks::drop(block);
    }
  }
  WorkArrays(const WorkArrays&) = delete;
  WorkArrays& operator=(const WorkArrays&) = delete;

  void* at(size_t index) const { return blocks_.at(index); }
  // All sums are zeros again.
  void restored() { restored_ = true; }

 private:
  explicit WorkArrays(Use use)
      : kept_(use == Use::kSums ? kept_zeros() : kept_copies()), restored_(use == Use::kCopies) {}

  cpu::KeptBlocks& kept_;
  std::vector<void*> blocks_;
  bool restored_;
};

// Sorts the queries of each image and keeps the order in `order`, where that is worth it: `value` is
// larger than a cache, and the queries have no order of their own.
void sort_queries(cpu::Inputs& in, const Tensor& value, std::vector<int32_t>& order) {
  constexpr int64_t kCache = int64_t{1} << 20;  // bytes
  const Problem& p = in.problem;
  if (in.queries_are_pixels || p.points == 0 || p.heads == 0 || p.queries < 2 ||
      p.queries > std::numeric_limits<int32_t>::max() ||
      p.rows * p.row_stride() * static_cast<int64_t>(value.element_size()) <= kCache) {
    return;
  }
  order.resize(static_cast<size_t>(p.batch * p.queries));
  torch::stable::parallel_for(0, p.batch, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      chosen_kernels().sort(in, b, order.data() + b * p.queries);
    }
  });
  in.order = order.data();
}

void run_forward(const Call& call, cpu::Inputs in, const Tensor& output) {
  if (output.numel() == 0) return;
  std::vector<int32_t> order;
  sort_queries(in, call.value, order);
  const Kernels& kernels = chosen_kernels();
  void* to = output.mutable_data_ptr();
  // Computes the blocks of images first .. last - 1.
  const auto run = [&](int64_t first, int64_t last) {
    const int64_t per_image = kernels.blocks(in), count = (last - first) * per_image;
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
    // Neighbouring blocks share pixels, so a thread takes several at a time: a sixteenth of an equal
    // part, so that threads finish at about the same time.
    cpu::Blocks blocks{
        {first * per_image}, last * per_image, std::max<int64_t>(1, count / (16 * threads))};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      const Scratch scratch(kernels.scratch_bytes(in, 0));
      kernels.forward(in, to, blocks, scratch.get());
    });
  };
  const Problem& p = call.problem;
  const int at_once = kernels.division(in, false).at_once;
  if (at_once == 0) return run(0, p.batch);
  in.heads = at_once;
  const WorkArrays copy(WorkArrays::Use::kCopies, 1, p.rows * at_once * p.head_dim,
                        bytes_of(call.type));
  in.copy = copy.at(0);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (in.first_head = 0; in.first_head < p.heads; in.first_head += at_once) {
      torch::stable::parallel_for(0, p.rows, 1024, [&](int64_t first, int64_t last) {
        kernels.copy(in, b, first, last, copy.at(0));
      });
      run(b, b + 1);
    }
  }
}

// Whether two levels share rows of value.
bool overlapping(const std::vector<Level>& levels) {
  for (const Level& a : levels) {
    for (const Level& b : levels) {
      if (&a != &b && a.start <= b.start && b.start < a.start + int64_t{a.height} * a.width) {
        return true;
      }
    }
  }
  return false;
}

// A backward pass, divided among threads.
struct Plan {
  std::vector<cpu::Share> shares;
  cpu::Sums sums = cpu::Sums::kNone;  // of all shares
  int at_once = 0;                    // heads of a visit, with copies
  int most_heads = 0;                 // of a share
};

// At least one share per thread, and as few as possible, since every share visits all queries: first
// images, then groups of heads, then bands of rows. Overlapping levels have one band: a row in two
// levels would belong to two shares. `rounds`: the gradient of value is requested and has 16 bits; it is
// summed in float32.
Plan plan_of(const cpu::Inputs& in, const std::vector<Level>& levels, int64_t threads,
             bool rounds) {
  const Problem& p = in.problem;
  Plan plan;
  plan.sums = rounds ? cpu::Sums::kWhole : cpu::Sums::kNone;
  if (p.batch == 0) return plan;
  const Kernels& kernels = chosen_kernels();
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  int64_t groups = std::min<int64_t>(up(threads, p.batch), p.heads);
  const int bands = overlapping(levels) ? 1 : static_cast<int>(up(threads, p.batch * groups));
  const cpu::Division division = kernels.division(in, true);
  if (bands == 1 && division.at_once > 0) {
    plan.sums = cpu::Sums::kCopied;
    plan.at_once = division.at_once;
    // the most heads that a thread computes
    const auto of_thread = [&](int heads) {
      return up(p.batch * (p.heads / heads), threads) * heads;
    };
    const bool balanced = of_thread(division.of_share) <= of_thread(division.at_once);
    const int of_share = balanced ? division.of_share : division.at_once;
    groups = std::max<int64_t>(groups, p.heads / of_share);
  } else if (bands == 1 && rounds && kernels.narrow(in)) {
    plan.sums = cpu::Sums::kNarrow;
    groups = std::max<int64_t>(groups, cpu::kNarrow);
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t group = 0; group < groups; ++group) {
      const auto first = static_cast<int>(p.heads * group / groups);
      const auto last = static_cast<int>(p.heads * (group + 1) / groups);
      plan.most_heads = std::max(plan.most_heads, last - first);
      for (int band = 0; band < bands; ++band) {
        plan.shares.push_back({b, first, last, band, bands, plan.sums});
      }
    }
  }
  return plan;
}

// Gradients of points from this size on are written with streaming stores: they would have left the
// caches before they are read.
constexpr int64_t kPastCaches = int64_t{8} << 20;

// Returns the gradient of value, undefined where it is not requested. Writes the gradients of
// locations and weights to `locations` and `weights`.
Tensor run_backward(const Call& call, cpu::Inputs in, const std::vector<Level>& levels,
                    const Tensor& grad_output, const Flags& output_mask, const Tensor& locations,
                    const Tensor& weights) {
  const Tensor gradient = call.checked_gradient(grad_output, output_mask);
  std::vector<int32_t> order;
  sort_queries(in, call.value, order);
  const Kernels& kernels = chosen_kernels();
  const int64_t threads = torch::stable::get_num_threads();
  const Problem& p = call.problem;
  const bool adds = output_mask[0];
  const Plan plan = plan_of(in, levels, threads, adds && call.acc_dtype() != call.type);
  const std::vector<cpu::Share>& shares = plan.shares;
  const bool copies = plan.sums == cpu::Sums::kCopied, narrow = plan.sums == cpu::Sums::kNarrow;
  const int64_t workers = std::min(threads, static_cast<int64_t>(shares.size()));
  const int64_t of_copy = p.rows * plan.most_heads * p.head_dim;  // numbers
  Tensor grad_value;
  std::optional<WorkArrays> sums, copy;
  if (adds) {
    grad_value = empty(call.value.sizes(), call.type);
    const size_t size = bytes_of(call.acc_dtype());
    const auto arrays = [&](int64_t count, int64_t numbers) {
      sums.emplace(WorkArrays::Use::kSums, count, numbers, size);
    };
    if (copies) {
      arrays(workers, of_copy);
    } else if (narrow) {
      arrays(workers, p.rows * p.row_stride() / cpu::kNarrow);
    } else if (plan.sums == cpu::Sums::kWhole) {
      arrays(1, grad_value.numel());
    }
    if (narrow || !sums) {
      clear(grad_value.mutable_data_ptr(), grad_value.numel() * grad_value.element_size());
    }
  }
  if (copies) {
    copy.emplace(WorkArrays::Use::kCopies, workers, of_copy, bytes_of(call.type));
  }
  const int64_t bytes =
      locations.numel() * locations.element_size() + weights.numel() * weights.element_size();
  const cpu::Gradients grads{gradient.const_data_ptr(),    data_of(grad_value),
                             sums ? sums->at(0) : nullptr, locations.mutable_data_ptr(),
                             weights.mutable_data_ptr(),   bytes >= kPastCaches};
  std::atomic<size_t> next_worker{0};
  torch::stable::parallel_for(
      0, static_cast<int64_t>(shares.size()), 1, [&](int64_t first, int64_t last) {
        const Scratch scratch(kernels.scratch_bytes(in, copies ? plan.most_heads : 0));
        const size_t worker = next_worker++;
        cpu::Inputs own_in = in;
        cpu::Gradients own = grads;
        if (sums && (copies || narrow)) own.sums = sums->at(worker);
        for (int64_t i = first; i < last; ++i) {
          const cpu::Share& share = shares[static_cast<size_t>(i)];
          if (copies) {
            char* const to = static_cast<char*>(copy->at(worker));
            const int heads = share.last_head - share.first_head;
            own_in.copy = to;
            // with more threads than groups of heads, shares are smaller
            own_in.heads = heads % plan.at_once == 0 ? plan.at_once : heads;
            for (int part = 0; part < heads; part += own_in.heads) {
              own_in.first_head = share.first_head + part;
              kernels.copy(own_in, share.batch, 0, p.rows,
                           to + p.rows * part * p.head_dim * bytes_of(call.type));
            }
            own_in.first_head = share.first_head;
          }
          kernels.backward(own_in, own, share, scratch.get());
        }
      });
  if (sums) sums->restored();
  return grad_value;
}

Tensor forward(const Tensor value, const MaybeTensor spatial_shapes,
               const MaybeTensor level_start_index, const Tensor sampling_locations,
               const Tensor attention_weights, const MaybeSizes level_sizes,
               const MaybeSizes num_points, const MaybeTensor value_mask) {
  const Call call(value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
                  level_sizes, num_points, value_mask);
  const std::vector<Level> levels = levels_on_host(call);
  const Tensor output = empty(call.output_shape(), call.type);
  run_forward(call, inputs_of(call, levels), output);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor grad_output, const Tensor value, const MaybeTensor spatial_shapes,
    const MaybeTensor level_start_index, const Tensor sampling_locations,
    const Tensor attention_weights, const MaybeSizes level_sizes, const MaybeSizes num_points,
    bool /*deterministic: always*/, const Flags output_mask, const MaybeTensor value_mask) {
  const Call call(value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
                  level_sizes, num_points, value_mask);
  const std::vector<Level> levels = levels_on_host(call);
  const Tensor locations = empty(call.locations.sizes(), call.acc_dtype());
  const Tensor weights = empty(call.weights.sizes(), call.weights.scalar_type());
  const Tensor grad_value = run_backward(call, inputs_of(call, levels), levels, grad_output,
                                         output_mask, locations, weights);
  return {grad_value, if_requested(output_mask[1], locations),
          if_requested(output_mask[2], weights)};
}

Tensor fused_forward(const Tensor value, const MaybeTensor spatial_shapes,
                     const MaybeTensor level_start_index, const Tensor reference_points,
                     const Tensor sampling_offsets, const Tensor attention_logits,
                     const MaybeSizes level_sizes, const MaybeSizes num_points, double offset_scale,
                     const MaybeTensor value_mask) {
  const Call call(value, spatial_shapes, level_start_index, reference_points, sampling_offsets,
                  attention_logits, level_sizes, num_points, value_mask);
  const std::vector<Level> levels = levels_on_host(call);
  const Tensor output = empty(call.output_shape(), call.type);
  run_forward(call, inputs_of(call, levels, offset_scale), output);
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(
    const Tensor grad_output, const Tensor value, const MaybeTensor spatial_shapes,
    const MaybeTensor level_start_index, const Tensor reference_points,
    const Tensor sampling_offsets, const Tensor attention_logits, const MaybeSizes level_sizes,
    const MaybeSizes num_points, double offset_scale, bool /*deterministic: always*/,
    const Flags output_mask, const MaybeTensor value_mask) {
  const Call call(value, spatial_shapes, level_start_index, reference_points, sampling_offsets,
                  attention_logits, level_sizes, num_points, value_mask);
  const std::vector<Level> levels = levels_on_host(call);
  const cpu::Inputs in = inputs_of(call, levels, offset_scale);
  // The backward pass computes the gradients of locations and weights; `finish` converts them to
  // those of offsets and logits, in place where the dtypes are equal.
  const ScalarType acc = call.acc_dtype();
  const Tensor locations = empty(call.locations.sizes(), acc);
  const Tensor weights = empty(call.weights.sizes(), acc);
  const Tensor grad_value =
      run_backward(call, in, levels, grad_output, output_mask, locations, weights);
  const Tensor grad_reference = output_mask[1] ? empty(call.reference->sizes(), acc) : Tensor();
  Tensor grad_offsets = locations, grad_logits = weights;
  if (!call.weights_are_acc) {
    grad_offsets = empty(call.locations.sizes(), call.type);
    grad_logits = empty(call.weights.sizes(), call.type);
  }
  const cpu::FusedGradients grads{locations.const_data_ptr(), weights.const_data_ptr(),
                                  data_of(grad_reference), grad_offsets.mutable_data_ptr(),
                                  grad_logits.mutable_data_ptr()};
  const Kernels& kernels = chosen_kernels();
  const int64_t queries = call.problem.batch * call.problem.queries;
  torch::stable::parallel_for(0, queries, 64, [&](int64_t first, int64_t last) {
    const Scratch scratch(kernels.scratch_bytes(in, 0));
    kernels.finish(in, grads, first, last, scratch.get());
  });
  return {grad_value, grad_reference, if_requested(output_mask[2], grad_offsets),
          if_requested(output_mask[3], grad_logits)};
}

std::string build() {
  return joined("{\"version\": \"", DEFORM_ATTN_VERSION, "\", \"torch\": \"", DEFORM_ATTN_TORCH,
                "\", \"compiler\": \"", __VERSION__, "\", \"instruction_set\": \"",
                chosen_kernels().name, "\", \"instruction_sets\": \"", names_of(usable_kernels()),
                "\"}");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deform_attn, CPU, library) {
  library.impl("ms_deform_attn", DEFORM_ATTN_BOX(&forward));
  library.impl("ms_deform_attn_backward", DEFORM_ATTN_BOX(&backward));
  library.impl("ms_deform_attn_fused", DEFORM_ATTN_BOX(&fused_forward));
  library.impl("ms_deform_attn_fused_backward", DEFORM_ATTN_BOX(&fused_backward));
}

STABLE_TORCH_LIBRARY_IMPL(deform_attn, CompositeExplicitAutograd, library) {
  library.impl("cpu_build", DEFORM_ATTN_BOX(&build));
}

}  // namespace deform_attn
