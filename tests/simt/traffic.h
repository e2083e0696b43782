// What the kernels read, write and add to, in 32-byte sectors, counted exactly.
//
// The module is compiled with -fsanitize=thread, which calls a function before each access; those
// functions are here in place of the sanitizer's. Lanes of a warp run one after the other between
// two meetings: the n-th access that each makes at one place of the code is one instruction of the
// warp. Sectors of an instruction are counted once, as the hardware does.
//
// The L1 model: blocks are dealt to the multiprocessors in turn and run one after the other there;
// a cache of 128 KB holds sectors, the least recently read goes first. Only reads go through it.
#pragma once

#include <list>
#include <tuple>
#include <unordered_map>

#include "simt.h"

namespace traffic {

constexpr int kSector = 32;
constexpr size_t kCacheSectors = 128 * 1024 / kSector;

enum class Kind { kRead, kWrite, kAtomic };

struct Range {
  std::string name;
  uintptr_t begin, end;
};

struct Figures {
  int64_t instructions = 0, accesses = 0, sectors = 0, misses = 0;
};

struct Cache {
  std::list<uintptr_t> order;
  std::unordered_map<uintptr_t, std::list<uintptr_t>::iterator> places;

  SIMT_OWN bool hit(uintptr_t sector) {
    const auto found = places.find(sector);
    if (found != places.end()) {
      order.splice(order.begin(), order, found->second);
      return true;
    }
    order.push_front(sector);
    places[sector] = order.begin();
    if (places.size() > kCacheSectors) {
      places.erase(order.back());
      order.pop_back();
    }
    return false;
  }
};

struct Instruction {
  Kind kind = Kind::kRead;
  int range = 0;
  int accesses = 0;
  std::vector<uintptr_t> sectors;
};

struct Counter : simt::Watcher {
  std::vector<Range> ranges;
  std::map<std::tuple<std::string, std::string, std::string>, Figures> figures;
  std::vector<Cache> caches;
  std::string name;
  size_t processor = 0;
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
    for (uintptr_t s = address / kSector; s <= (address + bytes - 1) / kSector; ++s) {
      instruction.sectors.push_back(s);
    }
  }

  SIMT_OWN void atomic(const void* address, int bytes) override {
    access(Kind::kAtomic, __builtin_return_address(0), address, static_cast<size_t>(bytes));
  }

  SIMT_OWN void collective(int warp) override {
    if (warps.size() <= static_cast<size_t>(warp)) return;
    Open& open = warps[static_cast<size_t>(warp)];
    static const char* const kinds[] = {"read", "write", "atomic"};
    for (const auto& [here, time] : open.order) {
      Place& place = open.places[static_cast<size_t>(here)];
      Instruction& instruction = place.instructions[static_cast<size_t>(time)];
      std::sort(instruction.sectors.begin(), instruction.sectors.end());
      const auto end = std::unique(instruction.sectors.begin(), instruction.sectors.end());
      instruction.sectors.erase(end, instruction.sectors.end());
      Figures& sum = figures[{name, ranges[static_cast<size_t>(instruction.range)].name,
                              kinds[static_cast<int>(instruction.kind)]}];
      ++sum.instructions;
      sum.accesses += instruction.accesses;
      sum.sectors += static_cast<int64_t>(instruction.sectors.size());
      for (const uintptr_t sector : instruction.sectors) {
        if (instruction.kind == Kind::kRead && !caches[processor].hit(sector)) ++sum.misses;
      }
      instruction.accesses = 0;
      instruction.sectors.clear();
      std::fill(std::begin(place.times), std::end(place.times), 0);
    }
    open.order.clear();
  }

  SIMT_OWN void block(int64_t index) override {
    processor = static_cast<size_t>(index) % caches.size();
  }

  SIMT_OWN void kernel(const std::string& full_name, int64_t) override {
    const size_t end = full_name.find('<');
    const size_t begin = full_name.rfind(':', end);
    name = full_name.substr(begin + 1, end - begin - 1);
    for (Cache& cache : caches) cache = Cache();
  }
};

inline std::unique_ptr<Counter> counter;
inline Counter* active = nullptr;  // null while the counter works

SIMT_OWN inline void start(const std::vector<std::tuple<std::string, uintptr_t, size_t>>& ranges,
                           int processors) {
  counter = std::make_unique<Counter>();
  for (const auto& [name, begin, bytes] : ranges) {
    counter->ranges.push_back({name, begin, begin + bytes});
  }
  counter->caches.resize(static_cast<size_t>(processors));
  simt::watcher = active = counter.get();
}

SIMT_OWN inline std::map<std::tuple<std::string, std::string, std::string>,
                         std::tuple<int64_t, int64_t, int64_t, int64_t>>
stop() {
  simt::watcher = active = nullptr;
  std::map<std::tuple<std::string, std::string, std::string>,
           std::tuple<int64_t, int64_t, int64_t, int64_t>>
      all;
  for (const auto& [key, sum] : counter->figures) {
    all[key] = {sum.instructions, sum.accesses, sum.sectors, sum.misses};
  }
  counter.reset();
  return all;
}

SIMT_OWN inline void watch(Kind kind, const void* place, const void* address, size_t bytes) {
  Counter* const mine = active;
  if (!mine) return;
  active = nullptr;  // what the containers of the counter access is watched too
  mine->access(kind, place, address, bytes);
  active = mine;
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
SIMT_OWN uint8_t __tsan_atomic8_load(const volatile uint8_t* place, int) { return *place; }
SIMT_OWN uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* place, uint32_t term, int) {
  return __atomic_fetch_add(place, term, __ATOMIC_SEQ_CST);
}
SIMT_OWN void __tsan_init() {}
SIMT_OWN void __tsan_func_entry(void*) {}
SIMT_OWN void __tsan_func_exit(void*) {}
SIMT_OWN void __tsan_vptr_read(void**) {}
SIMT_OWN void __tsan_vptr_update(void**, void*) {}
}
