// The model of one multiprocessor: when each instruction issues, and how long its accesses take.
//
//   Machine          the constants of the model, for one generation of GPUs
//   Report           what a launch took
//   Multiprocessor   runs its share of the blocks of a launch
//
// Modelled: four schedulers, each with the warps of a quarter of the multiprocessor; stalls and barriers as
// ptxas wrote them; an issue interval for each unit; one path to shared memory and the first-level cache,
// which passes a line or a conflict-free group of banks a cycle; a first-level cache of sectors; latency
// and bandwidth of the second level; the cost of a sector that an atomic reduces. Not modelled: DRAM, other
// multiprocessors, clocks, the instruction cache. Figures order designs; they are not times.
#pragma once

#include <cstdint>
#include <list>
#include <queue>
#include <unordered_map>
#include <vector>

#include "execute.h"

namespace cycles {

// Sources:
//   [1] CUDA C++ Programming Guide: arithmetic throughput and limits of each compute capability
//   [2] Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, arXiv:2402.13499: latencies
//       of A100 and H100
//   not measured: an assumption of this model
// The project has measured none of them.
struct Machine {
  int capability = 90;
  int processors =
      132;  // multiprocessors of an H100; of an A100 too, so that shares of the work are equal

  // Limits of a multiprocessor [1].
  int registers = 65536;
  int warps = 64;
  int blocks = 32;
  int shared_bytes = 228 * 1024;
  int reserved_shared_bytes = 1024;  // of each block, by the system
  int shared_start = 1024;           // first address of shared memory that a kernel uses
  int cache_bytes = 256 * 1024;      // first-level cache and shared memory together

  // Cycles between two instructions of a scheduler to the same unit: 32 lanes / lanes of the unit [1].
  int intervals[static_cast<int>(Unit::kCount)] = {
      1,  // kFma
      2,  // kIntMultiply
      2,  // kAlu
      8,  // kSpecial
      2,  // kLoadStore; not measured
      2,  // kUniform; not measured
      1,  // kControl; not measured
      4,  // kConstant; not measured
      8,  // kMatrix; not measured
  };
  int conversion_interval = 4;  // float to integer and back, on kSpecial; not measured

  // Cycles until a result is there.
  int cache_hit = 33;         // [2] states about 40 from issue to use
  int second_level = 250;     // [2] states about 260
  int shared_load = 29;       // [2]
  int shuffle = 26;           // not measured
  int special = 22;           // not measured
  int constant = 28;          // not measured
  int special_register = 30;  // not measured
  int uniform = 12;           // not measured
  int matrix = 34;            // not measured
  int other = 8;              // not measured; most results are covered by a stall

  // Cycles of the second level for each sector of 32 bytes: 24 bytes a cycle and multiprocessor, which is
  // 5.6 TB/s for 132 of them at 1.75 GHz. Not measured.
  double sector = 1.31;
  // The same for a sector that an atomic reduces. Not measured; 0.66 to 2.62 are plausible.
  double reduced_sector = 1.31;

  // Cycles of work in the path to memory beyond which warps wait. Not measured.
  int queued_accesses = 12;
  int block_launch = 60;  // between two blocks; not measured
  int block_start = 10;   // until its warps may issue; not measured
  int barrier = 8;        // until warps continue behind a barrier; not measured
  int taken_branch = 8;   // not measured
};

// Of an H100 (90) or A100 (80); throws an Error for another capability.
Machine machine_of(int capability);

struct Report {
  uint64_t cycles = 0;
  uint64_t instructions = 0;     // of warps
  uint64_t reduced_sectors = 0;  // that atomics added to
  uint64_t read_sectors = 0;     // of loads
  uint64_t missed_sectors = 0;   // of these, not in the first-level cache
  uint64_t written_sectors = 0;
  double cache_busy = 0;  // share of the cycles in which the path to memory passes something
  double warps = 0;       // resident, on average
  int blocks = 0;         // that ran
};

// Blocks that a multiprocessor holds at once.
int resident_blocks(const Machine& machine, const Kernel& kernel, int warps_of_block);

class Multiprocessor {
 public:
  Multiprocessor(const Machine& machine, Executor& executor);

  // Runs the blocks in this order.
  Report run(const std::vector<uint32_t>& blocks);

 private:
  struct Resident;
  struct Slot {  // a warp
    Warp* warp;
    Resident* resident;
    int scheduler;
    uint64_t ready = 0;   // when it may issue
    int pending[6] = {};  // results and reads that each barrier awaits
  };
  struct Resident {  // a block
    std::unique_ptr<Block> block;
    std::vector<Slot> slots;

    bool is_finished() const;
  };
  struct Line {
    uint64_t tag;
    uint64_t ready[4];
    bool there[4];
  };
  struct Event {
    uint64_t time;
    Slot* slot;
    int barrier;
    bool operator>(const Event& other) const { return time > other.time; }
  };

  void place_block(uint32_t index);
  bool can_issue(Slot& slot);
  void issue(Slot& slot);
  uint64_t access(const Access& access);
  void load(const std::vector<uint64_t>& sectors, double start, double& done);
  void remove_finished();

  const Machine& machine_;
  Executor& executor_;
  Report report_;

  uint64_t now_ = 0;
  uint64_t wake_ = 0;     // earliest time at which a warp that waits may issue
  double path_free_ = 0;  // of the path to shared memory and first-level cache
  double second_level_free_ = 0;
  double busy_ = 0;
  uint64_t unit_free_[4][static_cast<int>(Unit::kCount)] = {};
  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events_;
  std::vector<std::unique_ptr<Resident>> residents_;
  std::vector<Slot*> slots_[4];  // of each scheduler
  Slot* last_[4] = {};           // that issued last
  int placed_warps_ = 0;

  size_t cache_lines_ = 0;
  std::list<Line> lines_;  // the one used last is in front
  std::unordered_map<uint64_t, std::list<Line>::iterator> found_lines_;
};

}  // namespace cycles
