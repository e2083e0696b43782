// What the kernels read, write and add to, in 32-byte sectors, counted exactly.
//
// The module is compiled with -fsanitize=thread, which calls a function before each access; those
// functions are here in place of the sanitizer's. Lanes of a warp run one after the other between
// two meetings: the n-th access that each makes at one place of the code is one instruction of the
// warp. Sectors of an instruction are counted once, as the hardware does.
//
// Of a large call only the blocks of some multiprocessors run: blocks are dealt to the
// multiprocessors in turn, and what is counted is scaled up to all blocks of the launch.
//
// The L1 model: each multiprocessor holds as many blocks as kResidentThreads make and takes the next
// when one is done; the warps of its blocks take turns, a load each. 128 KB in lines of four sectors,
// of which those are fetched that are read; the line that was read longest ago goes first. Only reads
// go through it.
#pragma once

#include <cmath>
#include <list>
#include <set>
#include <tuple>
#include <unordered_map>
#include <unordered_set>

#include "simt.h"

namespace traffic {

constexpr int kSector = 32;
constexpr int kLineSectors = 4;
constexpr size_t kLines = 128 * 1024 / kSector / kLineSectors;
constexpr int kResidentThreads = 1024;  // half of what an H100 holds

enum class Kind { kRead, kWrite, kAtomic };

struct Range {
  std::string name;
  uintptr_t begin, end;
};

struct Figures {
  double instructions = 0;  // of a warp
  double accesses = 0;      // of a lane
  double sectors = 0;       // of an instruction, each once
  double misses = 0;        // sectors that miss the modelled L1
  double distinct = 0;      // sectors of a kernel, each once
};

struct Cache {
  struct Line {
    std::list<uintptr_t>::iterator place;
    unsigned sectors = 0;
  };
  std::list<uintptr_t> order;
  std::unordered_map<uintptr_t, Line> lines;

  SIMT_OWN bool hit(uintptr_t sector) {
    const uintptr_t at = sector / kLineSectors;
    const unsigned bit = 1u << sector % kLineSectors;
    const auto found = lines.find(at);
    if (found != lines.end()) {
      order.splice(order.begin(), order, found->second.place);
      const bool there = found->second.sectors & bit;
      found->second.sectors |= bit;
      return there;
    }
    order.push_front(at);
    lines[at] = {order.begin(), bit};
    if (lines.size() > kLines) {
      lines.erase(order.back());
      order.pop_back();
    }
    return false;
  }
};

// The loads of a warp, one behind the other.
struct Loads {
  struct Load {
    int range;
    size_t begin, end;  // its sectors
  };
  std::vector<Load> loads;
  std::vector<uintptr_t> sectors;
};

struct Instruction {
  Kind kind = Kind::kRead;
  int range = 0;
  int accesses = 0;
  std::vector<uintptr_t> sectors;
};

struct Counter : simt::Watcher {
  std::vector<Range> ranges;
  uintptr_t lowest = UINTPTR_MAX, highest = 0;  // of all ranges
  std::map<std::tuple<std::string, std::string, std::string>, Figures> figures;
  int64_t processors = 1;      // of the GPU
  std::set<int64_t> modelled;  // those that run
  // the current kernel
  std::string name;
  int64_t blocks = 0, counted_blocks = 0;
  size_t resident = 1;                              // blocks of a multiprocessor
  std::map<std::pair<int, Kind>, Figures> counted;  // of a range
  std::map<std::pair<int, Kind>, std::unordered_set<uintptr_t>> touched;
  std::map<int64_t, std::vector<std::vector<Loads>>>
      queues;  // of each multiprocessor: blocks, warps
  std::vector<Loads>* block_loads = nullptr;
  // A place of the code, as a number; what each warp has done there since its lanes last met.
  std::unordered_map<const void*, int> places;
  struct Place {
    std::vector<Instruction> instructions;
    int times[simt::kWarpSize] = {};
  };
  struct Open {
    std::vector<Place> places;
    std::vector<std::pair<int, int>> order;  // (place, time), as they first happened
  };
  std::vector<Open> warps;

  SIMT_OWN int range_of(uintptr_t address) const {
    if (address < lowest || address >= highest) return -1;
    for (size_t i = 0; i < ranges.size(); ++i) {
      if (address >= ranges[i].begin && address < ranges[i].end) return static_cast<int>(i);
    }
    return -1;
  }

  SIMT_OWN void access(Kind kind, const void* place, const void* pointer, size_t bytes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    const int range = range_of(address);
    if (range < 0 || !simt::worker || !simt::worker->current) return;
    const int thread = simt::worker->current->index;
    const size_t warp = static_cast<size_t>(thread / simt::kWarpSize);
    const int here = places.try_emplace(place, static_cast<int>(places.size())).first->second;
    if (warps.size() <= warp) warps.resize(warp + 1);
    Open& open = warps[warp];
    if (open.places.size() <= static_cast<size_t>(here)) open.places.resize(places.size());
    Place& at = open.places[static_cast<size_t>(here)];
    const int time = at.times[thread % simt::kWarpSize]++;
    if (at.instructions.size() <= static_cast<size_t>(time)) at.instructions.resize(time + 1);
    Instruction& instruction = at.instructions[static_cast<size_t>(time)];
    if (instruction.accesses++ == 0) open.order.emplace_back(here, time);
    instruction.kind = kind;
    instruction.range = range;
    // as if each tensor began a line, as a GPU's do: a CPU's may begin anywhere, and counts would
    // differ from run to run
    const uintptr_t first = (static_cast<uintptr_t>(range + 1) << 40) + address -
                            ranges[static_cast<size_t>(range)].begin;
    for (uintptr_t s = first / kSector; s <= (first + bytes - 1) / kSector; ++s) {
      instruction.sectors.push_back(s);
    }
  }

  SIMT_OWN void atomic(const void* address, int bytes) override {
    access(Kind::kAtomic, __builtin_return_address(0), address, static_cast<size_t>(bytes));
  }

  SIMT_OWN void collective(int warp) override;
  SIMT_OWN bool block(int64_t index) override;
  SIMT_OWN void kernel(const std::string& full_name, int64_t grid, int threads) override;
  SIMT_OWN void end_kernel();
  SIMT_OWN void replay(std::vector<std::vector<Loads>>& queue);
};

inline std::unique_ptr<Counter> counter;
inline Counter* active = nullptr;  // null while the counter works

// What the counter's own containers access is watched too, unless it pauses.
struct Pause {
  Counter* const before = active;
  SIMT_OWN Pause() { active = nullptr; }
  SIMT_OWN ~Pause() { active = before; }
};

SIMT_OWN inline void Counter::collective(int warp) {
  const Pause pause;
  if (warps.size() <= static_cast<size_t>(warp)) return;
  Open& open = warps[static_cast<size_t>(warp)];
  for (const auto& [here, time] : open.order) {
    Place& place = open.places[static_cast<size_t>(here)];
    Instruction& instruction = place.instructions[static_cast<size_t>(time)];
    auto& sectors = instruction.sectors;
    std::sort(sectors.begin(), sectors.end());
    sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
    const std::pair<int, Kind> key = {instruction.range, instruction.kind};
    Figures& sum = counted[key];
    sum.instructions += 1;
    sum.accesses += instruction.accesses;
    sum.sectors += static_cast<double>(sectors.size());
    touched[key].insert(sectors.begin(), sectors.end());
    if (instruction.kind == Kind::kRead) {
      if (block_loads->size() <= static_cast<size_t>(warp)) block_loads->resize(warp + 1);
      Loads& to = (*block_loads)[static_cast<size_t>(warp)];
      to.loads.push_back(
          {instruction.range, to.sectors.size(), to.sectors.size() + sectors.size()});
      to.sectors.insert(to.sectors.end(), sectors.begin(), sectors.end());
    }
    instruction.accesses = 0;
    sectors.clear();
    std::fill(std::begin(place.times), std::end(place.times), 0);
  }
  open.order.clear();
}

SIMT_OWN inline bool Counter::block(int64_t index) {
  const Pause pause;
  const int64_t processor = index % processors;
  if (modelled.count(processor) == 0) return false;
  auto& queue = queues[processor];
  queue.emplace_back();
  block_loads = &queue.back();
  ++counted_blocks;
  return true;
}

SIMT_OWN inline void Counter::kernel(const std::string& full_name, int64_t grid, int threads) {
  const Pause pause;
  end_kernel();
  const size_t end = full_name.find('<');
  const size_t begin = full_name.rfind(':', end);
  name = full_name.substr(begin + 1, end - begin - 1);
  blocks = grid;
  resident = static_cast<size_t>(std::max(1, kResidentThreads / threads));
}

SIMT_OWN inline void Counter::end_kernel() {
  for (auto& [processor, queue] : queues) replay(queue);
  static const char* const kinds[] = {"read", "write", "atomic"};
  const double scale =
      static_cast<double>(blocks) / static_cast<double>(std::max<int64_t>(1, counted_blocks));
  for (const auto& [key, sum] : counted) {
    const auto& range = ranges[static_cast<size_t>(key.first)];
    Figures& to = figures[{name, range.name, kinds[static_cast<int>(key.second)]}];
    to.instructions += scale * sum.instructions;
    to.accesses += scale * sum.accesses;
    to.sectors += scale * sum.sectors;
    to.misses += scale * sum.misses;
    to.distinct += std::min(scale * static_cast<double>(touched[key].size()),
                            std::ceil(static_cast<double>(range.end - range.begin) / kSector));
  }
  counted.clear();
  touched.clear();
  queues.clear();
  counted_blocks = 0;
}

SIMT_OWN inline void Counter::replay(std::vector<std::vector<Loads>>& queue) {
  struct Running {
    const std::vector<Loads>* warps;
    std::vector<size_t> next;  // load of each warp
  };
  Cache cache;
  std::vector<Running> running;
  size_t next_block = 0;
  for (;;) {
    while (running.size() < resident && next_block < queue.size()) {
      const auto& block = queue[next_block++];
      running.push_back({&block, std::vector<size_t>(block.size())});
    }
    if (running.empty()) return;
    for (size_t r = 0; r < running.size();) {
      bool done = true;
      for (size_t w = 0; w < running[r].warps->size(); ++w) {
        const Loads& warp = (*running[r].warps)[w];
        size_t& at = running[r].next[w];
        if (at == warp.loads.size()) continue;
        const Loads::Load& load = warp.loads[at++];
        Figures& sum = counted[{load.range, Kind::kRead}];
        for (size_t s = load.begin; s < load.end; ++s) sum.misses += !cache.hit(warp.sectors[s]);
        done = false;
      }
      if (done) {
        running.erase(running.begin() + static_cast<std::ptrdiff_t>(r));
      } else {
        ++r;
      }
    }
  }
}

SIMT_OWN inline void start(const std::vector<std::tuple<std::string, uintptr_t, size_t>>& ranges,
                           int processors, const std::vector<int64_t>& modelled) {
  counter = std::make_unique<Counter>();
  for (const auto& [name, begin, bytes] : ranges) {
    counter->ranges.push_back({name, begin, begin + bytes});
    counter->lowest = std::min(counter->lowest, begin);
    counter->highest = std::max(counter->highest, begin + bytes);
  }
  counter->processors = processors;
  counter->modelled.insert(modelled.begin(), modelled.end());
  simt::watcher = active = counter.get();
}

SIMT_OWN inline std::map<std::tuple<std::string, std::string, std::string>,
                         std::tuple<double, double, double, double, double>>
stop() {
  simt::watcher = active = nullptr;
  counter->end_kernel();
  std::map<std::tuple<std::string, std::string, std::string>,
           std::tuple<double, double, double, double, double>>
      all;
  for (const auto& [key, sum] : counter->figures) {
    all[key] = {sum.instructions, sum.accesses, sum.sectors, sum.misses, sum.distinct};
  }
  counter.reset();
  return all;
}

SIMT_OWN inline void watch(Kind kind, const void* place, const void* address, size_t bytes) {
  if (!active) return;
  Counter* const mine = active;
  const Pause pause;
  mine->access(kind, place, address, bytes);
}

}  // namespace traffic

// ---- what the compiler calls

#define SIMT_HOOK(name, kind, bytes)                                                  \
  extern "C" SIMT_OWN void name(void* address) {                                      \
    traffic::watch(traffic::Kind::kind, __builtin_return_address(0), address, bytes); \
  }
#define SIMT_HOOKS(bytes)                                 \
  SIMT_HOOK(__tsan_read##bytes, kRead, bytes)             \
  SIMT_HOOK(__tsan_write##bytes, kWrite, bytes)           \
  SIMT_HOOK(__tsan_unaligned_read##bytes, kRead, bytes)   \
  SIMT_HOOK(__tsan_unaligned_write##bytes, kWrite, bytes) \
  SIMT_HOOK(__tsan_volatile_read##bytes, kRead, bytes)    \
  SIMT_HOOK(__tsan_volatile_write##bytes, kWrite, bytes)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
extern "C" {
SIMT_OWN void __tsan_read_range(void* address, size_t bytes) {
  traffic::watch(traffic::Kind::kRead, __builtin_return_address(0), address, bytes);
}
SIMT_OWN void __tsan_write_range(void* address, size_t bytes) {
  traffic::watch(traffic::Kind::kWrite, __builtin_return_address(0), address, bytes);
}
// The atomics of the emulator itself, which are not counted. Which ones a compiler passes to the
// sanitizer depends on its version.
#define SIMT_ATOMIC(bits)                                                                         \
  SIMT_OWN uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* place, int) { \
    return __atomic_load_n(place, __ATOMIC_SEQ_CST);                                              \
  }                                                                                               \
  SIMT_OWN void __tsan_atomic##bits##_store(volatile uint##bits##_t* place, uint##bits##_t x,     \
                                            int) {                                                \
    __atomic_store_n(place, x, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                               \
  SIMT_OWN uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* place,          \
                                                         uint##bits##_t x, int) {                 \
    return __atomic_exchange_n(place, x, __ATOMIC_SEQ_CST);                                       \
  }                                                                                               \
  SIMT_OWN uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* place,         \
                                                          uint##bits##_t x, int) {                \
    return __atomic_fetch_add(place, x, __ATOMIC_SEQ_CST);                                        \
  }                                                                                               \
  SIMT_OWN int __tsan_atomic##bits##_compare_exchange_strong(                                     \
      volatile uint##bits##_t* place, uint##bits##_t* expected, uint##bits##_t x, int, int) {     \
    return __atomic_compare_exchange_n(place, expected, x, false, __ATOMIC_SEQ_CST,               \
                                       __ATOMIC_SEQ_CST);                                         \
  }
SIMT_ATOMIC(8)
SIMT_ATOMIC(16)
SIMT_ATOMIC(32)
SIMT_ATOMIC(64)
SIMT_OWN void __tsan_init() {}
SIMT_OWN void __tsan_func_entry(void*) {}
SIMT_OWN void __tsan_func_exit(void*) {}
SIMT_OWN void __tsan_vptr_read(void**) {}
SIMT_OWN void __tsan_vptr_update(void**, void*) {}
}
