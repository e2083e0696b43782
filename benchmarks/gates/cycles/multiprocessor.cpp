#include "multiprocessor.h"

#include <algorithm>
#include <functional>

namespace cycles {

namespace {

constexpr int kSchedulers = 4;
constexpr int kBarriers = 6;
constexpr int kSectorBytes = 32;
constexpr int kLineBytes = 128;
constexpr int kBanks = 32;
constexpr uint64_t kNever = ~uint64_t{0};

template <typename Body>
void each_lane(const Access& access, const Body& body) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (access.lanes >> lane & 1) body(access.addresses[lane]);
  }
}

// The pieces of `bytes` bytes that an access touches, each once, in order.
std::vector<uint64_t> pieces_of(const Access& access, uint64_t bytes) {
  std::vector<uint64_t> pieces;
  each_lane(access, [&](uint64_t address) {
    const uint64_t last = (address + static_cast<uint64_t>(access.bytes) - 1) / bytes;
    for (uint64_t piece = address / bytes; piece <= last; ++piece) pieces.push_back(piece);
  });
  std::sort(pieces.begin(), pieces.end());
  pieces.erase(std::unique(pieces.begin(), pieces.end()), pieces.end());
  return pieces;
}

// Passes through shared memory: the most different words that lie in one bank.
int bank_passes(const Access& access) {
  std::vector<uint64_t> words[kBanks];
  size_t most = 1;
  each_lane(access, [&](uint64_t address) {
    for (int i = 0; i < std::max(1, access.bytes / 4); ++i) {
      const uint64_t word = address / 4 + static_cast<uint64_t>(i);
      std::vector<uint64_t>& bank = words[word % kBanks];
      if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
      most = std::max(most, bank.size());
    }
  });
  return static_cast<int>(most);
}

// An atomic takes two passes for each lane that shares a bank.
int atomic_passes(const Access& access) {
  int lanes[kBanks] = {};
  int most = 1;
  each_lane(access,
            [&](uint64_t address) { most = std::max(most, ++lanes[address / 4 % kBanks]); });
  return 2 * most;
}

// An access whose guard is false for all lanes takes one too.
int passes(const Access& access) {
  if (access.lanes == 0) return 1;
  switch (access.kind) {
    case AccessKind::kSharedLoad:
    case AccessKind::kSharedStore:
      return bank_passes(access);
    case AccessKind::kSharedAtomic:
      return atomic_passes(access);
    case AccessKind::kLocal:
      return access.bytes / 4;
    case AccessKind::kLoad:
    case AccessKind::kStore:
    case AccessKind::kReduction:
      return static_cast<int>(pieces_of(access, kLineBytes).size());
    default:
      return 1;
  }
}

}  // namespace

bool Multiprocessor::Resident::is_finished() const {
  return std::all_of(slots.begin(), slots.end(), [](const Slot& slot) {
    return slot.warp->done && std::all_of(slot.pending, slot.pending + kBarriers,
                                          [](int pending) { return pending == 0; });
  });
}

Machine machine_of(int capability) {
  Machine machine;
  if (capability == 90) return machine;
  if (capability != 80) {
    throw Error("capability: expected 80 or 90, got " + std::to_string(capability));
  }
  machine.capability = 80;
  machine.shared_bytes = 164 * 1024;
  machine.shared_start = 0;
  machine.cache_bytes = 192 * 1024;
  machine.intervals[static_cast<int>(Unit::kFma)] = 2;  // 16 lanes of a quarter [1]
  machine.second_level = 220;
  machine.sector = 1.23;
  machine.reduced_sector = 2.46;  // not measured
  return machine;
}

// Shared memory of a block as its kernel declares it.
static int declared_shared(const Machine& machine, const Kernel& kernel) {
  return std::max(0, kernel.shared_bytes - machine.shared_start);
}

int resident_blocks(const Machine& machine, const Kernel& kernel, int warps_of_block) {
  const int registers = (kernel.registers * kLanes + 255) / 256 * 256;  // of a warp
  const int by_registers =
      machine.registers / kSchedulers / registers * kSchedulers / warps_of_block;
  const int shared = declared_shared(machine, kernel);
  const int by_shared = shared == 0
                            ? machine.blocks
                            : machine.shared_bytes / (shared + machine.reserved_shared_bytes);
  return std::min({by_registers, by_shared, machine.warps / warps_of_block, machine.blocks});
}

Multiprocessor::Multiprocessor(const Machine& machine, Executor& executor)
    : machine_(machine), executor_(executor) {}

void Multiprocessor::place_block(uint32_t index) {
  auto resident = std::make_unique<Resident>();
  resident->block = executor_.open_block(index);
  resident->slots.reserve(resident->block->warps.size());
  for (const auto& warp : resident->block->warps) {
    const int scheduler = placed_warps_++ % kSchedulers;
    resident->slots.push_back({warp.get(), resident.get(), scheduler});
    Slot& slot = resident->slots.back();
    slot.ready = now_ + static_cast<uint64_t>(machine_.block_start);
    slots_[scheduler].push_back(&slot);
  }
  residents_.push_back(std::move(resident));
  ++report_.blocks;
}

bool Multiprocessor::can_issue(Slot& slot) {
  Warp& warp = *slot.warp;
  if (warp.done || warp.at_barrier || !executor_.select_path(warp)) return false;
  const auto wait_until = [&](uint64_t time) {
    wake_ = std::min(wake_, time);
    return false;
  };
  if (slot.ready > now_) return wait_until(slot.ready);
  const Instruction& instruction = executor_.instruction_of(warp);
  for (int barrier = 0; barrier < kBarriers; ++barrier) {
    if (instruction.waits >> barrier & 1 && slot.pending[barrier]) return false;
  }
  const uint64_t unit_free = unit_free_[slot.scheduler][static_cast<int>(instruction.unit)];
  if (unit_free > now_) return wait_until(unit_free);
  if (instruction.unit == Unit::kLoadStore &&
      path_free_ - static_cast<double>(now_) > machine_.queued_accesses) {
    const double room = path_free_ - machine_.queued_accesses;
    return wait_until(static_cast<uint64_t>(std::max(static_cast<double>(now_) + 1, room)));
  }
  return true;
}

void Multiprocessor::issue(Slot& slot) {
  Warp& warp = *slot.warp;
  const Instruction& instruction = executor_.instruction_of(warp);
  const bool converts =
      instruction.unit == Unit::kSpecial &&
      (instruction.opcode == Opcode::kFloatToInt || instruction.opcode == Opcode::kIntToFloat ||
       instruction.opcode == Opcode::kRound);
  const int unit = static_cast<int>(instruction.unit);
  unit_free_[slot.scheduler][unit] =
      now_ +
      static_cast<uint64_t>(converts ? machine_.conversion_interval : machine_.intervals[unit]);
  executor_.step(*slot.resident->block, warp);
  ++report_.instructions;

  int latency = machine_.other;
  switch (instruction.unit) {
    case Unit::kSpecial:
      latency = machine_.special;
      break;
    case Unit::kConstant:
      latency = instruction.opcode == Opcode::kLoadConstant ? machine_.constant
                                                            : machine_.special_register;
      break;
    case Unit::kUniform:
      latency = machine_.uniform;
      break;
    case Unit::kMatrix:
      latency = machine_.matrix;
      break;
    default:
      break;
  }
  uint64_t written = now_ + static_cast<uint64_t>(latency);
  uint64_t read = now_ + 6;
  if (executor_.access().kind != AccessKind::kNone) {
    written = access(executor_.access());
    read = std::min(written, static_cast<uint64_t>(path_free_) + 2);
  }
  const auto set_barrier = [&](int barrier, uint64_t until) {
    if (barrier >= kBarriers) return;
    ++slot.pending[barrier];
    events_.push({until, &slot, barrier});
  };
  set_barrier(instruction.write_barrier, written);
  set_barrier(instruction.read_barrier, read);

  int stall = std::max(1, instruction.stall);
  const bool goes_on = warp.current >= 0;
  if (goes_on && instruction.opcode == Opcode::kBranch &&
      warp.paths[static_cast<size_t>(warp.current)].address !=
          instruction.address + kBytesPerInstruction) {
    stall = std::max(stall, machine_.taken_branch);
  }
  slot.ready = now_ + static_cast<uint64_t>(stall);
  if (!goes_on) executor_.select_path(warp);
  if (!warp.at_barrier) return;
  if (!executor_.open_barrier(*slot.resident->block)) return;
  for (Slot& each : slot.resident->slots) {
    if (each.warp->done) continue;
    each.ready = std::max(each.ready, now_ + static_cast<uint64_t>(machine_.barrier));
  }
}

// When the access is done; moves the times from which the memories are free.
uint64_t Multiprocessor::access(const Access& access) {
  const int passed = passes(access);
  const double start = std::max(static_cast<double>(now_ + 4), path_free_);
  path_free_ = start + passed;
  busy_ += passed;
  double done = start + passed;
  const auto occupy_second_level = [&](size_t sectors, double cost) {
    for (size_t i = 0; i < sectors; ++i) {
      second_level_free_ = std::max(second_level_free_, start) + cost;
    }
  };
  switch (access.kind) {
    case AccessKind::kShuffle:
      return static_cast<uint64_t>(start + machine_.shuffle);
    case AccessKind::kSharedLoad:
      return static_cast<uint64_t>(done + machine_.shared_load - 1);
    case AccessKind::kSharedAtomic:
      return static_cast<uint64_t>(done + 2 * machine_.shared_load);
    case AccessKind::kLocal:
      return static_cast<uint64_t>(done + machine_.cache_hit);
    case AccessKind::kStore: {
      const size_t sectors = pieces_of(access, kSectorBytes).size();
      report_.written_sectors += sectors;
      occupy_second_level(sectors, machine_.sector);
      break;
    }
    case AccessKind::kReduction: {
      const size_t sectors = pieces_of(access, kSectorBytes).size();
      report_.reduced_sectors += sectors;
      occupy_second_level(sectors, machine_.reduced_sector);
      break;
    }
    case AccessKind::kLoad:
      if (access.lanes == 0) return static_cast<uint64_t>(start + machine_.other);
      done += machine_.cache_hit;
      load(pieces_of(access, kSectorBytes), start, done);
      return static_cast<uint64_t>(done);
    default:
      break;
  }
  return static_cast<uint64_t>(done + 4);
}

// Sectors that are not in the first-level cache come from the second level. The line used longest ago makes
// room.
void Multiprocessor::load(const std::vector<uint64_t>& sectors, double start, double& done) {
  constexpr uint64_t kSectors = kLineBytes / kSectorBytes;
  report_.read_sectors += sectors.size();
  for (const uint64_t sector : sectors) {
    const uint64_t tag = sector / kSectors, which = sector % kSectors;
    const auto found = found_lines_.find(tag);
    if (found != found_lines_.end()) {
      lines_.splice(lines_.begin(), lines_, found->second);
    } else {
      if (found_lines_.size() >= cache_lines_) {
        found_lines_.erase(lines_.back().tag);
        lines_.pop_back();
      }
      lines_.push_front({tag, {}, {}});
      found_lines_[tag] = lines_.begin();
    }
    Line& line = lines_.front();
    if (!line.there[which]) {
      ++report_.missed_sectors;
      second_level_free_ = std::max(second_level_free_, start + 8) + machine_.sector;
      line.there[which] = true;
      line.ready[which] = static_cast<uint64_t>(second_level_free_ + machine_.second_level);
    }
    done = std::max(done, static_cast<double>(line.ready[which]));
  }
}

// Removes blocks whose warps are done and whose accesses have ended.
void Multiprocessor::remove_finished() {
  const auto is_of = [](const Resident* resident) {
    return [resident](const Slot* slot) { return slot && slot->resident == resident; };
  };
  for (size_t i = 0; i < residents_.size();) {
    const Resident* const resident = residents_[i].get();
    if (!resident->is_finished()) {
      ++i;
      continue;
    }
    for (int s = 0; s < kSchedulers; ++s) {
      std::vector<Slot*>& slots = slots_[s];
      slots.erase(std::remove_if(slots.begin(), slots.end(), is_of(resident)), slots.end());
      if (is_of(resident)(last_[s])) last_[s] = nullptr;
    }
    residents_.erase(residents_.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

Report Multiprocessor::run(const std::vector<uint32_t>& blocks) {
  const Kernel& kernel = executor_.kernel();
  const int resident = resident_blocks(machine_, kernel, executor_.warps_of_block());
  if (resident < 1) throw Error("kernel " + kernel.name + ": a block does not fit");
  // The first-level cache is what shared memory leaves, which has one of these sizes [1].
  const int shared =
      resident * (declared_shared(machine_, kernel) + machine_.reserved_shared_bytes);
  int carved = 228;
  for (const int kilobytes : {196, 164, 132, 100, 64, 32, 16, 8, 0}) {
    if (kilobytes * 1024 >= shared) carved = kilobytes;
  }
  cache_lines_ = static_cast<size_t>((machine_.cache_bytes - carved * 1024) / kLineBytes);

  size_t next = 0;
  uint64_t next_launch = 0;
  while (!residents_.empty() || next < blocks.size()) {
    while (!events_.empty() && events_.top().time <= now_) {
      --events_.top().slot->pending[events_.top().barrier];
      events_.pop();
    }
    if (static_cast<int>(residents_.size()) < resident && next < blocks.size() &&
        now_ >= next_launch) {
      place_block(blocks[next++]);
      next_launch = now_ + static_cast<uint64_t>(machine_.block_launch);
    }
    wake_ = kNever;
    bool issued = false;
    for (int s = 0; s < kSchedulers; ++s) {
      Slot* chosen = last_[s] && can_issue(*last_[s]) ? last_[s] : nullptr;
      for (size_t i = 0; !chosen && i < slots_[s].size(); ++i) {
        if (can_issue(*slots_[s][i])) chosen = slots_[s][i];
      }
      if (!chosen) continue;
      issued = true;
      last_[s] = chosen;
      issue(*chosen);
    }
    int live = 0;
    for (const auto& each : residents_) {
      for (const Slot& slot : each->slots) live += !slot.warp->done;
    }
    uint64_t then = now_ + 1;
    if (!issued) {
      uint64_t until = wake_;
      if (!events_.empty()) until = std::min(until, events_.top().time);
      if (next < blocks.size() && static_cast<int>(residents_.size()) < resident) {
        until = std::min(until, std::max(next_launch, now_ + 1));
      }
      if (until != kNever && until > now_) then = until;
    }
    report_.warps += live * static_cast<double>(then - now_);
    now_ = then;
    remove_finished();
  }
  report_.cycles = std::max(now_, static_cast<uint64_t>(second_level_free_));
  const double cycles = static_cast<double>(std::max<uint64_t>(report_.cycles, 1));
  report_.warps /= cycles;
  report_.cache_busy = busy_ / cycles;
  return report_;
}

}  // namespace cycles
