// Execution of machine code: what instructions compute, without a model of how long they take.
//
//   Memory     the tensors of a call; an access outside of them is an Error
//   Path       lanes of a warp that are at the same instruction
//   Warp       registers, predicates and paths of 32 threads
//   Block      the warps of a block, and its shared memory
//   Access     what an instruction reads or writes of a memory, for the model
//   Executor   executes the instructions of one launch
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "code.h"

namespace cycles {

// Addresses are those of the host.
class Memory {
 public:
  // A copy that the kernels read and write; aligned as cudaMalloc does.
  void* add(const void* from, size_t bytes);
  template <typename T>
  T* add(const std::vector<T>& from) {
    return static_cast<T*>(add(from.data(), from.size() * sizeof(T)));
  }
  // The bytes at an address, or null where they are not those of a tensor.
  uint8_t* find(uint64_t address, int bytes);
  std::vector<std::vector<uint8_t>> saved() const;
  void restore(const std::vector<std::vector<uint8_t>>& saved);

 private:
  struct Tensor {
    std::unique_ptr<uint8_t, void (*)(void*)> bytes;
    uint64_t begin, end;
  };
  std::vector<Tensor> tensors_;
  size_t last_ = 0;  // found last
};

// A number for each lane.
struct Row {
  uint32_t at[kLanes];
};

enum class PathState {
  kRuns,
  kJoins,      // at a BSYNC
  kMeets,      // at a WARPSYNC, or at a branch that all lanes take together
  kAtBarrier,  // of the block
  kExited,
};

struct Path {
  uint32_t address;
  uint32_t lanes;  // a bit each
  PathState state = PathState::kRuns;
  int join = 0;          // kJoins: the register with the lanes that are awaited
  uint32_t awaited = 0;  // kMeets: the lanes
};

struct Warp {
  std::array<Row, 256> registers;
  uint32_t predicates[8] = {};  // a bit for each lane
  uint32_t uniforms[kZeroUniform + 1] = {};
  bool uniform_predicates[8] = {};
  uint32_t joins[16] = {};  // B0 ...: the lanes that a BSYNC awaits
  std::vector<uint8_t> local;

  int index = 0;      // in the block
  uint32_t live = 0;  // lanes that have not exited
  std::vector<Path> paths;
  int current = -1;  // the path that runs; -1: to be selected
  bool at_barrier = false;
  bool done = false;
};

struct Block {
  uint32_t index;
  std::vector<uint8_t> shared;
  std::vector<std::unique_ptr<Warp>> warps;
};

enum class AccessKind {
  kNone,
  kLoad,
  kStore,
  kReduction,
  kSharedLoad,
  kSharedStore,
  kSharedAtomic,
  kShuffle,
  kLocal,
};

struct Access {
  AccessKind kind = AccessKind::kNone;
  uint32_t lanes = 0;  // none where its guard is false for all
  int bytes = 0;       // of a lane
  uint64_t addresses[kLanes];
};

struct LaunchShape {
  uint32_t blocks, threads;
};

class Executor {
 public:
  // `parameters`: as the kernel's constant bank holds them.
  Executor(const Kernel& kernel, const std::vector<uint8_t>& parameters, LaunchShape shape,
           Memory& memory);

  std::unique_ptr<Block> open_block(uint32_t index) const;
  // Makes the path that runs next the current one; false where the warp waits at a barrier or is done.
  bool select_path(Warp& warp) const;
  // Executes one instruction of the current path, after select_path.
  void step(Block& block, Warp& warp);
  // What the last step read or wrote.
  const Access& access() const { return access_; }
  // Lets the warps of a block continue where all of them are at a barrier; true if so.
  bool open_barrier(Block& block) const;
  void run_block(uint32_t index);

  const Instruction& instruction_of(const Warp& warp) const {
    return kernel_.instructions[warp.paths[warp.current].address / kBytesPerInstruction];
  }
  const LaunchShape& shape() const { return shape_; }
  const Kernel& kernel() const { return kernel_; }
  int warps_of_block() const { return (static_cast<int>(shape_.threads) + kLanes - 1) / kLanes; }

 private:
  Error fail(const std::string& what) const;
  bool must_meet(const Warp& warp, const Path& path) const;
  bool branch(const Instruction& instruction, Warp& warp, uint32_t active);

  uint32_t constant(int bank, int64_t offset) const;
  uint64_t address(const Warp& warp, const Operand& operand, int lane, bool global) const;
  uint8_t* shared_at(Block& block, uint64_t address, int bytes);
  Row bits(const Warp& warp, const Operand& operand, int word = 0) const;
  Row ints(const Warp& warp, const Operand& operand) const;
  std::array<uint64_t, kLanes> longs(const Warp& warp, const Operand& operand) const;
  std::array<uint64_t, kLanes> terms(const Warp& warp, const Operand& operand) const;
  std::array<float, kLanes> floats(const Warp& warp, const Operand& operand) const;
  uint32_t predicate(const Warp& warp, const Operand& operand) const;
  void set(Warp& warp, const Operand& operand, uint32_t active, const Row& row, int word = 0) const;
  void set_longs(Warp& warp, const Operand& operand, uint32_t active,
                 const std::array<uint64_t, kLanes>& numbers) const;
  void set_floats(Warp& warp, const Operand& operand, uint32_t active,
                  const std::array<float, kLanes>& numbers) const;
  void set_predicate(Warp& warp, const Operand& operand, uint32_t active, uint32_t lanes) const;

  void compute(const Instruction& instruction, Block& block, Warp& warp, uint32_t active);
  void add_three(const Instruction& instruction, Warp& warp, uint32_t active);
  void multiply_add(const Instruction& instruction, Warp& warp, uint32_t active);
  void shifted_add(const Instruction& instruction, Warp& warp, uint32_t active);
  void shift(const Instruction& instruction, Warp& warp, uint32_t active);
  void logic(const Instruction& instruction, Warp& warp, uint32_t active);
  void compare(const Instruction& instruction, Warp& warp, uint32_t active);
  void minimum(const Instruction& instruction, Warp& warp, uint32_t active);
  void float_multiply_add(const Instruction& instruction, Warp& warp, uint32_t active);
  void convert(const Instruction& instruction, Warp& warp, uint32_t active);
  void function(const Instruction& instruction, Warp& warp, uint32_t active);
  void multiply_matrices(const Instruction& instruction, Warp& warp, uint32_t active);
  void special_register(const Instruction& instruction, const Block& block, Warp& warp,
                        uint32_t active);
  void exchange(const Instruction& instruction, Warp& warp, uint32_t active);
  void access_memory(const Instruction& instruction, Block& block, Warp& warp, uint32_t active);

  const Kernel& kernel_;
  LaunchShape shape_;
  Memory& memory_;
  std::vector<uint8_t> constants_;        // bank 0
  const Instruction* current_ = nullptr;  // for messages
  Access access_;
};

}  // namespace cycles
