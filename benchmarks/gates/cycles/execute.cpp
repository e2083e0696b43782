#include "execute.h"

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace cycles {

namespace {

using Kind = Operand::Kind;
using Longs = std::array<uint64_t, kLanes>;
using Floats = std::array<float, kLanes>;

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kUnsetRegister = 0xdeadbeefu;
constexpr int kLocalBytes = 4096;  // of a lane
constexpr size_t kAlignment = 256;

float float_of(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

uint32_t bits_of(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits;
}

float float_of_half(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

uint32_t half_bits(float number) {
  const uint32_t sign = bits_of(number) >> 16 & 0x8000;
  const float magnitude = std::fabs(number);
  if (std::isnan(number)) return 0x7fff;
  if (magnitude >= 65520) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | static_cast<uint32_t>(std::rint(magnitude * 0x1p24f));
  const uint32_t bits = bits_of(magnitude);
  return sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10));
}

uint32_t bfloat_bits(float number) {
  if (std::isnan(number)) return 0x7fff;
  const uint32_t bits = bits_of(number);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

bool is_on(uint32_t lanes, int lane) { return lanes >> lane & 1; }

// Calls body with each active lane.
template <typename Body>
void each(uint32_t active, const Body& body) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (is_on(active, lane)) body(lane);
  }
}

// A predicate for each lane.
template <typename Body>
uint32_t lanes_where(const Body& body) {
  uint32_t lanes = 0;
  for (int lane = 0; lane < kLanes; ++lane) lanes |= uint32_t{body(lane)} << lane;
  return lanes;
}

template <typename Body>
Row row_of(const Body& body) {
  Row row;
  for (int lane = 0; lane < kLanes; ++lane) row.at[lane] = body(lane);
  return row;
}

template <typename T>
bool holds(Comparison comparison, T a, T b) {
  bool ordered = true;
  if constexpr (std::is_floating_point_v<T>) ordered = !std::isnan(a) && !std::isnan(b);
  switch (comparison) {
    case Comparison::kLess:
      return a < b;
    case Comparison::kEqual:
      return a == b;
    case Comparison::kLessEqual:
      return a <= b;
    case Comparison::kGreater:
      return a > b;
    case Comparison::kNotEqual:
      return ordered && a != b;
    case Comparison::kGreaterEqual:
      return a >= b;
    case Comparison::kOrdered:
      return ordered;
    case Comparison::kUnordered:
      return !ordered;
    case Comparison::kLessUnordered:
      return !ordered || a < b;
    case Comparison::kEqualUnordered:
      return !ordered || a == b;
    case Comparison::kLessEqualUnordered:
      return !ordered || a <= b;
    case Comparison::kGreaterUnordered:
      return !ordered || a > b;
    case Comparison::kNotEqualUnordered:
      return !ordered || a != b;
    case Comparison::kGreaterEqualUnordered:
      return !ordered || a >= b;
    case Comparison::kNone:
      break;
  }
  throw Error("a comparison without an operator");
}

// The function of three bits whose table is `table`.
uint32_t looked_up(uint32_t table, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t found = 0;
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) found |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return found;
}

AccessKind access_of(Opcode opcode) {
  switch (opcode) {
    case Opcode::kLoadGlobal:
      return AccessKind::kLoad;
    case Opcode::kStoreGlobal:
      return AccessKind::kStore;
    case Opcode::kReduceGlobal:
      return AccessKind::kReduction;
    case Opcode::kLoadShared:
      return AccessKind::kSharedLoad;
    case Opcode::kStoreShared:
      return AccessKind::kSharedStore;
    case Opcode::kAtomicShared:
      return AccessKind::kSharedAtomic;
    case Opcode::kLoadLocal:
    case Opcode::kStoreLocal:
      return AccessKind::kLocal;
    case Opcode::kShuffle:
      return AccessKind::kShuffle;
    default:
      return AccessKind::kNone;
  }
}

// Computes under the rounding mode of a modifier.
template <typename Body>
float rounded(const Instruction& instruction, const Body& body) {
  const int mode = instruction.has(kRM)   ? FE_DOWNWARD
                   : instruction.has(kRP) ? FE_UPWARD
                   : instruction.has(kRZ) ? FE_TOWARDZERO
                                          : FE_TONEAREST;
  if (mode == FE_TONEAREST) return body();
  std::fesetround(mode);
  const volatile float result = body();
  std::fesetround(FE_TONEAREST);
  return result;
}

}  // namespace

// ---- memory --------------------------------------------------------------------------------------

void* Memory::add(const void* from, size_t bytes) {
  const size_t whole = (bytes / kAlignment + 2) * kAlignment;
  Tensor tensor = {{static_cast<uint8_t*>(std::aligned_alloc(kAlignment, whole)), std::free}, 0, 0};
  if (bytes > 0) std::memcpy(tensor.bytes.get(), from, bytes);
  tensor.begin = reinterpret_cast<uint64_t>(tensor.bytes.get());
  tensor.end = tensor.begin + bytes;
  tensors_.push_back(std::move(tensor));
  return tensors_.back().bytes.get();
}

uint8_t* Memory::find(uint64_t address, int bytes) {
  const auto holds_it = [&](const Tensor& tensor) {
    return address >= tensor.begin && address + bytes <= tensor.end;
  };
  if (last_ >= tensors_.size() || !holds_it(tensors_[last_])) {
    last_ = 0;
    while (last_ < tensors_.size() && !holds_it(tensors_[last_])) ++last_;
    if (last_ == tensors_.size()) return nullptr;
  }
  return reinterpret_cast<uint8_t*>(address);
}

std::vector<std::vector<uint8_t>> Memory::saved() const {
  std::vector<std::vector<uint8_t>> copies;
  for (const Tensor& tensor : tensors_) {
    copies.emplace_back(tensor.bytes.get(), tensor.bytes.get() + (tensor.end - tensor.begin));
  }
  return copies;
}

void Memory::restore(const std::vector<std::vector<uint8_t>>& saved) {
  for (size_t i = 0; i < saved.size(); ++i) {
    std::copy(saved[i].begin(), saved[i].end(), tensors_[i].bytes.get());
  }
}

// ---- blocks, paths and barriers ------------------------------------------------------------------

Executor::Executor(const Kernel& kernel, const std::vector<uint8_t>& parameters, LaunchShape shape,
                   Memory& memory)
    : kernel_(kernel), shape_(shape), memory_(memory) {
  if (static_cast<int>(parameters.size()) != kernel.parameter_bytes) {
    throw Error("kernel " + kernel.name + ": expected " + std::to_string(kernel.parameter_bytes) +
                " bytes of parameters, as its machine code has, got " +
                std::to_string(parameters.size()));
  }
  constants_.assign(static_cast<size_t>(kernel.parameter_base), 0);
  const uint32_t sizes[6] = {shape.threads, 1, 1, shape.blocks, 1, 1};
  std::memcpy(constants_.data(), sizes, sizeof(sizes));
  const uint32_t stack = kLocalBytes;
  std::memcpy(constants_.data() + 0x28, &stack, sizeof(stack));
  constants_.insert(constants_.end(), parameters.begin(), parameters.end());
  constants_.resize(constants_.size() + 8);  // a wide load of the last parameter
}

Error Executor::fail(const std::string& what) const {
  return Error("kernel " + kernel_.name + ": " + what +
               (current_ ? " in the instruction `" + current_->text + "`" : ""));
}

std::unique_ptr<Block> Executor::open_block(uint32_t index) const {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->shared.assign(static_cast<size_t>(kernel_.shared_bytes), 0);
  for (int w = 0; w < warps_of_block(); ++w) {
    auto warp = std::make_unique<Warp>();
    for (Row& row : warp->registers) std::fill(row.at, row.at + kLanes, kUnsetRegister);
    const int threads = static_cast<int>(shape_.threads) - w * kLanes;
    warp->live = threads >= kLanes ? kAllLanes : (1u << threads) - 1;
    warp->index = w;
    warp->paths.push_back({0, warp->live});
    block->warps.push_back(std::move(warp));
  }
  return block;
}

// Whether the path is at a branch that all lanes of the warp take together, and others are elsewhere.
bool Executor::must_meet(const Warp& warp, const Path& path) const {
  const Instruction& next = kernel_.instructions[path.address / kBytesPerInstruction];
  return next.opcode == Opcode::kBranch && (next.has(kDIV) || next.has(kCONV)) &&
         path.lanes != warp.live;
}

bool Executor::select_path(Warp& warp) const {
  std::vector<Path>& paths = warp.paths;
  if (warp.current >= 0) {
    Path& path = paths[static_cast<size_t>(warp.current)];
    if (!must_meet(warp, path)) return true;
    path.state = PathState::kMeets;
    path.awaited = warp.live;
    warp.current = -1;
  }
  const auto erase_if = [&](const auto& condition) {
    paths.erase(std::remove_if(paths.begin(), paths.end(), condition), paths.end());
  };
  erase_if([](const Path& path) { return path.state == PathState::kExited; });
  if (paths.empty()) {
    warp.done = true;
    return false;
  }
  // Joins the paths that all awaited lanes have reached, until there are none.
  for (size_t i = 0; i < paths.size();) {
    const Path first = paths[i++];
    if (first.state != PathState::kJoins && first.state != PathState::kMeets) continue;
    const auto together = [&](const Path& path) {
      return path.state == first.state && path.address == first.address &&
             (first.state == PathState::kMeets || path.join == first.join);
    };
    const uint32_t awaited =
        first.state == PathState::kJoins ? warp.joins[first.join] : first.awaited;
    uint32_t there = 0;
    for (const Path& path : paths) {
      if (together(path)) there |= path.lanes;
    }
    if (awaited & warp.live & ~there) continue;
    erase_if(together);
    paths.push_back({first.address + kBytesPerInstruction, there});
    i = 0;
  }
  int best = -1;
  for (size_t i = 0; i < paths.size(); ++i) {
    if (paths[i].state != PathState::kRuns) continue;
    if (best < 0 || paths[i].address < paths[static_cast<size_t>(best)].address) {
      best = static_cast<int>(i);
    }
  }
  if (best >= 0) {
    warp.current = best;
    return select_path(warp);  // it may have to wait
  }
  uint32_t there = 0;
  for (const Path& path : paths) {
    if (path.state == PathState::kAtBarrier) there |= path.lanes;
  }
  if (warp.live & ~there) throw fail("the lanes of a warp wait for each other");
  warp.at_barrier = true;
  return false;
}

bool Executor::open_barrier(Block& block) const {
  bool waits = false;
  for (const auto& warp : block.warps) {
    if (!warp->done && !warp->at_barrier) return false;
    waits = waits || warp->at_barrier;
  }
  if (!waits) return false;
  for (const auto& warp : block.warps) {
    if (warp->done) continue;
    Path path = {0, 0};
    for (const Path& each : warp->paths) {
      if (each.state != PathState::kAtBarrier) continue;
      path.lanes |= each.lanes;
      path.address = each.address + kBytesPerInstruction;
    }
    warp->paths.assign(1, path);
    warp->at_barrier = false;
    warp->current = -1;
  }
  return true;
}

void Executor::run_block(uint32_t index) {
  const std::unique_ptr<Block> block = open_block(index);
  do {
    for (const auto& warp : block->warps) {
      while (!warp->done && !warp->at_barrier) {
        if (!select_path(*warp)) break;
        step(*block, *warp);
      }
    }
  } while (open_barrier(*block));
}

void Executor::step(Block& block, Warp& warp) {
  Path& path = warp.paths[static_cast<size_t>(warp.current)];
  const size_t index = path.address / kBytesPerInstruction;
  if (index >= kernel_.instructions.size()) throw fail("execution leaves the kernel");
  const Instruction& instruction = kernel_.instructions[index];
  current_ = &instruction;
  uint32_t guard = kAllLanes;
  if (instruction.guard != kTruePredicate) {
    guard = instruction.guard_uniform ? (warp.uniform_predicates[instruction.guard] ? kAllLanes : 0)
                                      : warp.predicates[instruction.guard];
  }
  if (instruction.guard_negated) guard = ~guard;
  const uint32_t active = path.lanes & guard;
  access_.kind = access_of(instruction.opcode);
  access_.lanes = active;
  access_.bytes = instruction.bytes;
  if (branch(instruction, warp, active)) return;
  if (active) compute(instruction, block, warp, active);
  path.address += kBytesPerInstruction;
}

// Executes an instruction that changes paths; false: it does not, and the path goes on behind it.
bool Executor::branch(const Instruction& instruction, Warp& warp, uint32_t active) {
  Path& path = warp.paths[static_cast<size_t>(warp.current)];
  const std::vector<Operand>& operands = instruction.operands;
  const uint32_t next = path.address + kBytesPerInstruction;
  switch (instruction.opcode) {
    case Opcode::kBranch: {
      if (instruction.has(kDIV) || instruction.has(kCONV)) return false;  // all lanes are here
      uint32_t taken = active;
      for (const Operand& operand : operands) {
        if (operand.is_predicate()) taken &= predicate(warp, operand);
      }
      if (taken == path.lanes) {
        path.address = instruction.target;
        return true;
      }
      if (taken == 0) return false;
      path.lanes &= ~taken;
      path.address = next;
      warp.paths.push_back({instruction.target, taken});
      warp.current = -1;
      return true;
    }
    case Opcode::kOpenJoin:
      if (active) warp.joins[operands[0].index] = active;
      return false;
    case Opcode::kBreak:
      if (active) warp.joins[operands[0].index] &= ~active;
      return false;
    case Opcode::kJoin: {
      if (active == 0) return false;
      const uint32_t others = path.lanes & ~active;
      path.lanes = active;
      path.state = PathState::kJoins;
      path.join = operands[0].index;
      if (others) warp.paths.push_back({next, others});
      warp.current = -1;
      return true;
    }
    case Opcode::kMeet:
      if (active == 0) return false;
      if (instruction.has(kCOLLECTIVE)) throw fail("no model of a collective");
      path.state = PathState::kMeets;
      path.awaited = kAllLanes;
      if (!instruction.has(kALL)) {
        path.awaited = bits(warp, operands[0]).at[__builtin_ctz(active)];
      }
      warp.current = -1;
      return true;
    case Opcode::kBarrier:
      if (active == 0) return false;
      if (active != path.lanes || operands.size() != 1 || operands[0].number != 0) {
        throw fail("expected barrier 0 with all lanes");
      }
      path.state = PathState::kAtBarrier;
      warp.current = -1;
      return true;
    case Opcode::kCall:
      if (active == 0) return false;
      if (active != path.lanes) throw fail("only some lanes call");
      path.address = instruction.target;
      return true;
    case Opcode::kReturn: {
      if (active == 0) return false;
      const Row to = bits(warp, operands[0]);
      const uint32_t address = to.at[__builtin_ctz(active)];
      each(active, [&](int lane) {
        if (to.at[lane] != address) throw fail("lanes return to different callers");
      });
      if (active != path.lanes) throw fail("only some lanes return");
      path.address = address;
      return true;
    }
    case Opcode::kExit:
      warp.live &= ~active;
      path.lanes &= ~active;
      if (path.lanes) return false;
      path.state = PathState::kExited;
      warp.current = -1;
      return true;
    default:
      return false;
  }
}

// ---- operands ------------------------------------------------------------------------------------

uint32_t Executor::constant(int bank, int64_t offset) const {
  const std::vector<uint8_t>* bytes = &constants_;
  if (bank != 0) {
    const auto found = kernel_.constants.find(bank);
    if (found == kernel_.constants.end()) throw fail("no constant bank " + std::to_string(bank));
    bytes = &found->second;
  }
  if (offset < 0 || offset + 4 > static_cast<int64_t>(bytes->size())) {
    throw fail("a read outside of constant bank " + std::to_string(bank));
  }
  uint32_t number;
  std::memcpy(&number, bytes->data() + offset, sizeof(number));
  return number;
}

// Word 0 or 1 of an operand, without its modifiers.
Row Executor::bits(const Warp& warp, const Operand& operand, int word) const {
  uint32_t number = 0;
  switch (operand.kind) {
    case Kind::kRegister:
      if (operand.index != kZeroRegister) {
        return warp.registers[static_cast<size_t>(operand.index + word)];
      }
      break;
    case Kind::kUniform:
      if (operand.index != kZeroUniform) number = warp.uniforms[operand.index + word];
      break;
    case Kind::kImmediate:
      number = word == 0 ? operand.number : operand.number >> 31 ? kAllLanes : 0;
      break;
    case Kind::kConstant: {
      int64_t offset = operand.offset + 4 * word;
      if (operand.uniform != kZeroUniform) offset += warp.uniforms[operand.uniform];
      if (operand.index != kZeroRegister) throw fail("an indexed constant");  // see kLoadConstant
      number = constant(operand.bank, offset);
      break;
    }
    default:
      throw fail("an operand that is not a number");
  }
  return row_of([&](int) { return number; });
}

// An operand as 32-bit integers.
Row Executor::ints(const Warp& warp, const Operand& operand) const {
  Row row = bits(warp, operand);
  if (operand.inverted) {
    for (uint32_t& number : row.at) number = ~number;
  }
  if (operand.negated) {
    for (uint32_t& number : row.at) number = -number;
  }
  return row;
}

// An operand as 64-bit integers, without its modifiers.
Longs Executor::longs(const Warp& warp, const Operand& operand) const {
  const Row low = bits(warp, operand), high = bits(warp, operand, 1);
  Longs numbers;
  for (int lane = 0; lane < kLanes; ++lane) {
    numbers[lane] = low.at[lane] | uint64_t{high.at[lane]} << 32;
  }
  return numbers;
}

// An operand as a term of a sum with a carry: a negative one is its complement and 1.
Longs Executor::terms(const Warp& warp, const Operand& operand) const {
  const Row row = bits(warp, operand);
  Longs numbers;
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t number = row.at[lane];
    numbers[lane] = operand.inverted  ? uint32_t{~number}
                    : operand.negated ? uint64_t{uint32_t{~number}} + 1
                                      : number;
  }
  return numbers;
}

Floats Executor::floats(const Warp& warp, const Operand& operand) const {
  const Row row = bits(warp, operand);
  Floats numbers;
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t number = row.at[lane];
    if (operand.half >= 0) {
      number = bits_of(float_of_half(operand.half == 1 ? number >> 16 : number & 0xffff));
    }
    if (operand.absolute) number &= 0x7fffffffu;
    if (operand.negated) number ^= 0x80000000u;
    numbers[lane] = float_of(number);
  }
  return numbers;
}

uint32_t Executor::predicate(const Warp& warp, const Operand& operand) const {
  uint32_t lanes = kAllLanes;
  if (operand.kind == Kind::kPredicate) {
    if (operand.index != kTruePredicate) lanes = warp.predicates[operand.index];
  } else if (operand.kind == Kind::kUniformPredicate) {
    if (operand.index != kTruePredicate && !warp.uniform_predicates[operand.index]) lanes = 0;
  } else {
    throw fail("an operand that is not a predicate");
  }
  return operand.inverted ? ~lanes : lanes;
}

void Executor::set(Warp& warp, const Operand& operand, uint32_t active, const Row& row,
                   int word) const {
  if (operand.kind == Kind::kUniform) {
    if (operand.index != kZeroUniform) {
      warp.uniforms[operand.index + word] = row.at[__builtin_ctz(active)];
    }
    return;
  }
  if (operand.kind != Kind::kRegister) throw fail("a result that is not a register");
  if (operand.index == kZeroRegister) return;
  Row& to = warp.registers[static_cast<size_t>(operand.index + word)];
  for (int lane = 0; lane < kLanes; ++lane) {
    to.at[lane] = is_on(active, lane) ? row.at[lane] : to.at[lane];
  }
}

void Executor::set_longs(Warp& warp, const Operand& operand, uint32_t active,
                         const Longs& numbers) const {
  set(warp, operand, active, row_of([&](int i) { return static_cast<uint32_t>(numbers[i]); }));
  set(warp, operand, active, row_of([&](int i) { return static_cast<uint32_t>(numbers[i] >> 32); }),
      1);
}

void Executor::set_floats(Warp& warp, const Operand& operand, uint32_t active,
                          const Floats& numbers) const {
  set(warp, operand, active, row_of([&](int lane) { return bits_of(numbers[lane]); }));
}

void Executor::set_predicate(Warp& warp, const Operand& operand, uint32_t active,
                             uint32_t lanes) const {
  if (operand.index == kTruePredicate) return;
  if (operand.kind == Kind::kUniformPredicate) {
    warp.uniform_predicates[operand.index] = is_on(lanes, __builtin_ctz(active));
  } else if (operand.kind == Kind::kPredicate) {
    uint32_t& to = warp.predicates[operand.index];
    to = (to & ~active) | (lanes & active);
  } else {
    throw fail("a result that is not a predicate");
  }
}

// ---- instructions --------------------------------------------------------------------------------

void Executor::compute(const Instruction& instruction, Block& block, Warp& warp, uint32_t active) {
  const std::vector<Operand>& o = instruction.operands;
  switch (instruction.opcode) {
    case Opcode::kNothing:
    case Opcode::kBranch:  // of all lanes together, not taken
    case Opcode::kOpenJoin:
    case Opcode::kBreak:
    case Opcode::kExit:
      return;
    case Opcode::kMove:
    case Opcode::kToUniform:
      return set(warp, o[0], active, ints(warp, o[1]));
    case Opcode::kZeroPair:
      if (o[1].name != "SRZ") throw fail("no model of the special register");
      return set_longs(warp, o[0], active, Longs{});
    case Opcode::kLoadConstant: {
      Longs numbers = {};
      each(active, [&](int lane) {
        int64_t offset = o[1].offset;
        if (o[1].uniform != kZeroUniform) offset += warp.uniforms[o[1].uniform];
        if (o[1].index != kZeroRegister) {
          offset += static_cast<int32_t>(warp.registers[static_cast<size_t>(o[1].index)].at[lane]);
        }
        numbers[lane] = constant(o[1].bank, offset);
        if (instruction.bytes == 8) {
          numbers[lane] |= uint64_t{constant(o[1].bank, offset + 4)} << 32;
        }
        if (instruction.bytes == 1) numbers[lane] &= 0xff;
      });
      if (instruction.bytes == 8) return set_longs(warp, o[0], active, numbers);
      return set(warp, o[0], active,
                 row_of([&](int i) { return static_cast<uint32_t>(numbers[i]); }));
    }
    case Opcode::kSpecialRegister:
      return special_register(instruction, block, warp, active);
    case Opcode::kIntAdd3:
      return add_three(instruction, warp, active);
    case Opcode::kAdd: {
      const Row a = ints(warp, o[1]), b = ints(warp, o[2]);
      return set(warp, o[0], active, row_of([&](int i) { return a.at[i] + b.at[i]; }));
    }
    case Opcode::kIntAbs: {
      const Row a = bits(warp, o[1]);
      return set(warp, o[0], active,
                 row_of([&](int i) { return a.at[i] >> 31 ? -a.at[i] : a.at[i]; }));
    }
    case Opcode::kIntMultiplyAdd:
      return multiply_add(instruction, warp, active);
    case Opcode::kShiftedAdd:
      return shifted_add(instruction, warp, active);
    case Opcode::kShift:
      return shift(instruction, warp, active);
    case Opcode::kLogic:
    case Opcode::kPredicateLogic:
    case Opcode::kPermuteBytes:
    case Opcode::kBitCount:
    case Opcode::kBitReverse:
    case Opcode::kLeadingOne:
    case Opcode::kRegisterToPredicates:
    case Opcode::kPredicatesToRegister:
      return logic(instruction, warp, active);
    case Opcode::kCompareInts:
    case Opcode::kCompareFloats:
    case Opcode::kCheckDivision:
      return compare(instruction, warp, active);
    case Opcode::kSelect: {
      const uint32_t first = predicate(warp, o[3]);
      const Row a = ints(warp, o[1]), b = ints(warp, o[2]);
      return set(warp, o[0], active,
                 row_of([&](int i) { return is_on(first, i) ? a.at[i] : b.at[i]; }));
    }
    case Opcode::kFloatSelect: {
      const uint32_t first = predicate(warp, o[3]);
      const Floats a = floats(warp, o[1]), b = floats(warp, o[2]);
      return set(warp, o[0], active,
                 row_of([&](int i) { return bits_of(is_on(first, i) ? a[i] : b[i]); }));
    }
    case Opcode::kIntMinMax:
    case Opcode::kIntMinMax3:
    case Opcode::kAddMinMax:
    case Opcode::kFloatMinMax:
      return minimum(instruction, warp, active);
    case Opcode::kFloatAdd:
    case Opcode::kHalfAdd: {
      Floats a = floats(warp, o[1]);
      const Floats b = floats(warp, o[2]);
      for (int i = 0; i < kLanes; ++i) a[i] += b[i];
      if (instruction.opcode == Opcode::kHalfAdd && !instruction.has(kF32)) {
        throw fail("no model of sums in 16 bits");
      }
      return set_floats(warp, o[0], active, a);
    }
    case Opcode::kFloatMultiply: {
      Floats a = floats(warp, o[1]);
      const Floats b = floats(warp, o[2]);
      for (int i = 0; i < kLanes; ++i) a[i] *= b[i];
      return set_floats(warp, o[0], active, a);
    }
    case Opcode::kFloatMultiplyAdd:
      return float_multiply_add(instruction, warp, active);
    case Opcode::kHalfMultiplyAdd: {
      // ptxas makes constants of two 16-bit numbers so: -0 * 0 + (high, low)
      const bool constant = o.size() == 5 && o[1].index == kZeroRegister &&
                            o[2].index == kZeroRegister && o[3].kind == Kind::kImmediate;
      if (!constant) throw fail("no model of products in 16 bits");
      const uint32_t pair = half_bits(static_cast<float>(o[3].decimal)) << 16 |
                            half_bits(static_cast<float>(o[4].decimal));
      return set(warp, o[0], active, row_of([&](int) { return pair; }));
    }
    case Opcode::kRound:
    case Opcode::kFloatToInt:
    case Opcode::kIntToFloat:
    case Opcode::kPackFloats:
      return convert(instruction, warp, active);
    case Opcode::kFunction:
      return function(instruction, warp, active);
    case Opcode::kMatrixMultiply:
      return multiply_matrices(instruction, warp, active);
    case Opcode::kShuffle:
    case Opcode::kVote:
    case Opcode::kReduceWarp:
      return exchange(instruction, warp, active);
    case Opcode::kLoadGlobal:
    case Opcode::kStoreGlobal:
    case Opcode::kReduceGlobal:
    case Opcode::kLoadShared:
    case Opcode::kStoreShared:
    case Opcode::kAtomicShared:
    case Opcode::kLoadLocal:
    case Opcode::kStoreLocal:
      return access_memory(instruction, block, warp, active);
    case Opcode::kBarrier:
    case Opcode::kCall:
    case Opcode::kJoin:
    case Opcode::kMeet:
    case Opcode::kReturn:
      break;  // always handled by `branch`
  }
  throw fail("no model of what it computes");
}

// R, [carry, [carry,]] a, b, c [, carry in, carry in]
void Executor::add_three(const Instruction& instruction, Warp& warp, uint32_t active) {
  const std::vector<Operand>& o = instruction.operands;
  size_t first = 1;
  while (o[first].is_predicate()) ++first;
  Longs sum = terms(warp, o[first]);
  for (size_t term = first + 1; term < first + 3; ++term) {
    const Longs numbers = terms(warp, o[term]);
    for (int i = 0; i < kLanes; ++i) sum[i] += numbers[i];
  }
  for (size_t term = first + 3; instruction.has(kX) && term < o.size(); ++term) {
    const uint32_t carry = predicate(warp, o[term]);
    for (int i = 0; i < kLanes; ++i) sum[i] += is_on(carry, i);
  }
  set(warp, o[0], active, row_of([&](int i) { return static_cast<uint32_t>(sum[i]); }));
  for (size_t carry = 1; carry < first; ++carry) {
    set_predicate(warp, o[carry], active,
                  lanes_where([&](int i) { return (sum[i] >> 32) >= carry; }));
  }
}

// R, [carry,] a, b, c [, carry in]
void Executor::multiply_add(const Instruction& instruction, Warp& warp, uint32_t active) {
  const std::vector<Operand>& o = instruction.operands;
  const bool carries = o[1].is_predicate();
  const size_t first = carries ? 2 : 1;
  const Operand& term = o[first + 2];
  const uint32_t carry =
      instruction.has(kX) && o.size() > first + 3 ? predicate(warp, o[first + 3]) : 0;
  if (!instruction.has(kWIDE) && !instruction.has(kHI)) {
    const Row a = ints(warp, o[first]), b = ints(warp, o[first + 1]);
    const Longs c = terms(warp, term);
    if (carries) throw fail("no model of the carry");
    return set(warp, o[0], active, row_of([&](int i) {
                 return a.at[i] * b.at[i] + static_cast<uint32_t>(c[i]) + is_on(carry, i);
               }));
  }
  const Row a = bits(warp, o[first]), b = bits(warp, o[first + 1]);
  Longs product;
  for (int i = 0; i < kLanes; ++i) {
    product[i] = instruction.has(kU32)
                     ? uint64_t{a.at[i]} * b.at[i]
                     : static_cast<uint64_t>(int64_t{static_cast<int32_t>(a.at[i])} *
                                             static_cast<int32_t>(b.at[i]));
    if (o[first].negated != o[first + 1].negated) product[i] = -product[i];
  }
  Longs added = longs(warp, term);
  for (uint64_t& number : added) {
    if (term.kind == Kind::kImmediate) number = term.number;
    if (term.negated) number = -number;
  }
  if (instruction.has(kHI)) {
    return set(warp, o[0], active,
               row_of([&](int i) { return static_cast<uint32_t>((product[i] + added[i]) >> 32); }));
  }
  Longs sum;
  const uint32_t carried = lanes_where([&](int i) {
    sum[i] = product[i] + added[i];
    const bool first_carry = sum[i] < added[i];
    sum[i] += is_on(carry, i);
    return first_carry || sum[i] < uint64_t{is_on(carry, i)};
  });
  set_longs(warp, o[0], active, sum);
  if (carries) set_predicate(warp, o[1], active, carried);
}

// R, [carry,] a, b, shift: (a << shift) + b
// .HI: R, [carry,] a, b, high, shift [, carry in]: the high word of (high:a << shift), + b
// .HI.SX32: as .HI, with the sign of a in place of `high`
void Executor::shifted_add(const Instruction& instruction, Warp& warp, uint32_t active) {
  const std::vector<Operand>& o = instruction.operands;
  const bool carries = o[1].is_predicate();
  const size_t first = carries ? 2 : 1;
  Longs sum;
  if (!instruction.has(kHI)) {
    if (instruction.has(kX)) throw fail("no model of the carry");
    const Row a = ints(warp, o[first]), by = bits(warp, o[first + 2]);
    const Longs b = terms(warp, o[first + 1]);
    for (int i = 0; i < kLanes; ++i) sum[i] = uint64_t{a.at[i] << by.at[i]} + b[i];
  } else {
    const bool extends = instruction.has(kSX32);
    const size_t last = first + (extends ? 2 : 3);
    const Row low = ints(warp, o[first]), b = ints(warp, o[first + 1]);
    const Row high = extends ? row_of([&](int i) { return low.at[i] >> 31 ? kAllLanes : 0; })
                             : ints(warp, o[first + 2]);
    const Row by = bits(warp, o[last]);
    const uint32_t carry = instruction.has(kX) ? predicate(warp, o[last + 1]) : 0;
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t a = low.at[i] | uint64_t{high.at[i]} << 32;
      sum[i] = uint64_t{static_cast<uint32_t>((a << by.at[i]) >> 32)} + b.at[i] + is_on(carry, i);
    }
  }
  set(warp, o[0], active, row_of([&](int i) { return static_cast<uint32_t>(sum[i]); }));
  if (carries) {
    set_predicate(warp, o[1], active, lanes_where([&](int i) { return (sum[i] >> 32) != 0; }));
  }
}

// R, low, shift, high
void Executor::shift(const Instruction& instruction, Warp& warp, uint32_t active) {
  const std::vector<Operand>& o = instruction.operands;
  const Row low = bits(warp, o[1]), by = bits(warp, o[2]), high = bits(warp, o[3]);
  const bool is_64_bits = instruction.has(kU64) || instruction.has(kS64);
  const bool is_signed = instruction.has(kS32) || instruction.has(kS64);
  const uint32_t width = is_64_bits ? 64 : 32;
  set(warp, o[0], active, row_of([&](int i) {
        const uint64_t number = low.at[i] | uint64_t{high.at[i]} << 32;
        const uint32_t count =
            instruction.has(kW) ? by.at[i] & (width - 1) : std::min(by.at[i], width);
        uint64_t shifted;
        if (instruction.has(kL)) {
          shifted = count == 64 ? 0 : number << count;
        } else if (is_signed) {
          shifted = static_cast<uint64_t>(static_cast<int64_t>(number) >>
                                          static_cast<int>(std::min(count, 63u)));
        } else {
          shifted = count == 64 ? 0 : number >> count;
        }
        return static_cast<uint32_t>(instruction.has(kHI) ? shifted >> 32 : shifted);
      }));
}

void Executor::logic(const Instruction& instruction, Warp& warp, uint32_t active) {
  const std::vector<Operand>& o = instruction.operands;
  switch (instruction.opcode) {
    case Opcode::kLogic: {  // [any,] R, a, b, c, table [, any in]
      const size_t to = o[0].is_predicate() ? 1 : 0;
      const Row a = ints(warp, o[to + 1]), b = ints(warp, o[to + 2]), c = ints(warp, o[to + 3]);
      const uint32_t table = o[to + 4].number;
      const Row found = row_of([&](int i) { return looked_up(table, a.at[i], b.at[i], c.at[i]); });
      if (to == 1) {
        uint32_t any = lanes_where([&](int i) { return found.at[i] != 0; });
        if (o.size() > 6) any |= predicate(warp, o[6]);
        set_predicate(warp, o[0], active, any);
      }
      return set(warp, o[to], active, found);
    }
    case Opcode::kPredicateLogic: {  // P, P, a, b, c, table, table
      const uint32_t a = predicate(warp, o[2]), b = predicate(warp, o[3]);
      const uint32_t c = predicate(warp, o[4]);
      set_predicate(warp, o[0], active, looked_up(o[5].number, a, b, c));
      return set_predicate(warp, o[1], active, looked_up(o[6].number, a, b, c));
    }
    case Opcode::kPermuteBytes: {  // R, low, selection, high
      const Row low = bits(warp, o[1]), selection = bits(warp, o[2]), high = bits(warp, o[3]);
      return set(warp, o[0], active, row_of([&](int i) {
                   const uint64_t bytes = low.at[i] | uint64_t{high.at[i]} << 32;
                   uint32_t permuted = 0;
                   for (int b = 0; b < 4; ++b) {
                     const uint32_t which = selection.at[i] >> (4 * b) & 15;
                     uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (which & 7))) & 0xff;
                     if (which & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign
                     permuted |= byte << (8 * b);
                   }
                   return permuted;
                 }));
    }
    case Opcode::kBitCount: {
      const Row a = ints(warp, o[1]);
      return set(warp, o[0], active,
                 row_of([&](int i) { return static_cast<uint32_t>(__builtin_popcount(a.at[i])); }));
    }
    case Opcode::kBitReverse: {
      const Row a = bits(warp, o[1]);
      return set(warp, o[0], active, row_of([&](int i) {
                   uint32_t reversed = 0;
                   for (int b = 0; b < 32; ++b) reversed |= (a.at[i] >> b & 1) << (31 - b);
                   return reversed;
                 }));
    }
    case Opcode::kLeadingOne: {
      const Row a = ints(warp, o[1]);
      return set(warp, o[0], active, row_of([&](int i) -> uint32_t {
                   if (a.at[i] == 0) return kAllLanes;
                   const int zeros = __builtin_clz(a.at[i]);
                   return static_cast<uint32_t>(instruction.has(kSH) ? zeros : 31 - zeros);
                 }));
    }
    case Opcode::kRegisterToPredicates: {  // PR, R, which
      const Row a = bits(warp, o[1]);
      for (int p = 0; p < kTruePredicate; ++p) {
        if (!(o[2].number >> p & 1)) continue;
        const uint32_t lanes = lanes_where([&](int i) { return a.at[i] >> p & 1; });
        warp.predicates[p] = (warp.predicates[p] & ~active) | (lanes & active);
      }
      return;
    }
    default: {  // R, PR, the other bits, which
      const Row other = bits(warp, o[2]);
      return set(warp, o[0], active, row_of([&](int i) {
                   uint32_t all = 0;
                   for (int p = 0; p < kTruePredicate; ++p) {
                     all |= (warp.predicates[p] >> i & 1) << p;
                   }
                   return (all & o[3].number) | (other.at[i] & ~o[3].number);
                 }));
    }
  }
}

// P, P, a, b, P in [, P of the low words]
void Executor::compare(const Instruction& instruction, Warp& warp, uint32_t active) {
  const std::vector<Operand>& o = instruction.operands;
  uint32_t holding;
  if (instruction.opcode == Opcode::kCheckDivision) {
    // P, a, b: where the fast path of a division could be inexact, roughly
    const Floats a = floats(warp, o[1]), b = floats(warp, o[2]);
    return set_predicate(warp, o[0], active, lanes_where([&](int i) {
                           const int above = static_cast<int>(bits_of(a[i]) >> 23 & 255);
                           const int below = static_cast<int>(bits_of(b[i]) >> 23 & 255);
                           return below == 0 || below >= 252 || above == 255 || above < 24 ||
                                  above - below >= 126 || above - below <= -102;
                         }));
  }
  if (instruction.opcode == Opcode::kCompareFloats) {
    const Floats a = floats(warp, o[2]), b = floats(warp, o[3]);
    holding = lanes_where([&](int i) { return holds(instruction.comparison, a[i], b[i]); });
  } else {
    const Row a = ints(warp, o[2]), b = ints(warp, o[3]);
    const uint32_t low = instruction.has(kEX) ? predicate(warp, o[5]) : 0;
    holding = lanes_where([&](int i) {
      if (instruction.has(kEX) && a.at[i] == b.at[i]) return is_on(low, i);
      if (instruction.has(kU32)) return holds(instruction.comparison, a.at[i], b.at[i]);
      return holds(instruction.comparison, static_cast<int32_t>(a.at[i]),
                   static_cast<int32_t>(b.at[i]));
    });
  }
  const uint32_t other = predicate(warp, o[4]);
  const auto combined = [&](uint32_t lanes) {
    return instruction.has(kOR)    ? lanes | other
           : instruction.has(kXOR) ? lanes ^ other
                                   : lanes & other;
  };
  const uint32_t not_holding = ~holding;
  set_predicate(warp, o[1], active, combined(not_holding));
  set_predicate(warp, o[0], active, combined(holding));
}

// The last operand says whether it is the minimum.
void Executor::minimum(const Instruction& instruction, Warp& warp, uint32_t active) {
  const std::vector<Operand>& o = instruction.operands;
  const uint32_t least = predicate(warp, o.back());
  if (instruction.opcode == Opcode::kFloatMinMax) {
    Floats a = floats(warp, o[1]);
    const Floats b = floats(warp, o[2]);
    for (int i = 0; i < kLanes; ++i) {
      a[i] = is_on(least, i) ? std::fmin(a[i], b[i]) : std::fmax(a[i], b[i]);
    }
    return set_floats(warp, o[0], active, a);
  }
  const auto of_two = [&](const Row& a, const Row& b) {
    return row_of([&](int i) {
      const bool a_first = instruction.has(kU32)
                               ? a.at[i] < b.at[i]
                               : static_cast<int32_t>(a.at[i]) < static_cast<int32_t>(b.at[i]);
      return a_first == is_on(least, i) ? a.at[i] : b.at[i];
    });
  };
  Row a = ints(warp, o[1]);
  const Row b = ints(warp, o[2]);
  if (instruction.opcode == Opcode::kAddMinMax) {
    for (int i = 0; i < kLanes; ++i) a.at[i] += b.at[i];
  } else {
    a = of_two(a, b);
  }
  if (instruction.opcode != Opcode::kIntMinMax) a = of_two(a, ints(warp, o[3]));
  set(warp, o[0], active, a);
}

void Executor::float_multiply_add(const Instruction& instruction, Warp& warp, uint32_t active) {
  const std::vector<Operand>& o = instruction.operands;
  Floats a = floats(warp, o[1]);
  const Floats b = floats(warp, o[2]), c = floats(warp, o[3]);
  const bool to_nearest = !instruction.has(kRM) && !instruction.has(kRP) && !instruction.has(kRZ);
  for (int i = 0; i < kLanes; ++i) {
    a[i] = to_nearest ? std::fma(a[i], b[i], c[i]) : rounded(instruction, [&] {
      const volatile float x = a[i];
      return std::fma(x, b[i], c[i]);
    });
    if (instruction.has(kSAT)) a[i] = std::isnan(a[i]) ? 0 : std::fmin(std::fmax(a[i], 0.f), 1.f);
  }
  set_floats(warp, o[0], active, a);
}

void Executor::convert(const Instruction& instruction, Warp& warp, uint32_t active) {
  const std::vector<Operand>& o = instruction.operands;
  const bool down = instruction.has(kFLOOR), up = instruction.has(kCEIL);
  const auto whole = [&](double number) {
    return down                      ? std::floor(number)
           : up                      ? std::ceil(number)
           : instruction.has(kTRUNC) ? std::trunc(number)
                                     : std::rint(number);
  };
  switch (instruction.opcode) {
    case Opcode::kRound: {
      Floats a = floats(warp, o[1]);
      for (float& number : a) number = static_cast<float>(whole(number));
      return set_floats(warp, o[0], active, a);
    }
    case Opcode::kFloatToInt: {
      const Floats a = floats(warp, o[1]);
      const auto limited = [&](int i, double least, double most) {
        return std::isnan(a[i]) ? 0.0 : std::min(std::max(whole(a[i]), least), most);
      };
      Longs numbers;
      for (int i = 0; i < kLanes; ++i) {
        // the largest doubles below 2**63 and 2**64
        if (instruction.has(kS64)) {
          numbers[i] = static_cast<uint64_t>(
              static_cast<int64_t>(limited(i, -0x1p63, 0x1.fffffffffffffp62)));
        } else if (instruction.has(kU64)) {
          numbers[i] = static_cast<uint64_t>(limited(i, 0, 0x1.fffffffffffffp63));
        } else if (instruction.has(kU32)) {
          numbers[i] = static_cast<uint64_t>(limited(i, 0, 0x1p32 - 1));
        } else {
          numbers[i] = static_cast<uint64_t>(static_cast<int64_t>(limited(i, -0x1p31, 0x1p31 - 1)));
        }
      }
      if (instruction.has(kS64) || instruction.has(kU64)) {
        return set_longs(warp, o[0], active, numbers);
      }
      return set(warp, o[0], active,
                 row_of([&](int i) { return static_cast<uint32_t>(numbers[i]); }));
    }
    case Opcode::kIntToFloat: {
      const bool is_64_bits = instruction.has(kS64) || instruction.has(kU64);
      const Row low = ints(warp, o[1]);
      const Longs both = is_64_bits ? longs(warp, o[1]) : Longs();
      Floats numbers;
      for (int i = 0; i < kLanes; ++i) {
        numbers[i] = rounded(instruction, [&]() -> float {
          if (instruction.has(kS64)) {
            const volatile int64_t number = static_cast<int64_t>(both[i]);
            return static_cast<float>(number);
          }
          if (instruction.has(kU64)) {
            const volatile uint64_t number = both[i];
            return static_cast<float>(number);
          }
          if (instruction.has(kU32)) {
            const volatile uint32_t number = low.at[i];
            return static_cast<float>(number);
          }
          const volatile int32_t number = static_cast<int32_t>(low.at[i]);
          return static_cast<float>(number);
        });
      }
      return set_floats(warp, o[0], active, numbers);
    }
    default: {  // R, high, low
      const Floats high = floats(warp, o[1]), low = floats(warp, o[2]);
      const bool to_bfloat = instruction.has(kBF16);
      return set(warp, o[0], active, row_of([&](int i) {
                   return to_bfloat ? bfloat_bits(high[i]) << 16 | bfloat_bits(low[i])
                                    : half_bits(high[i]) << 16 | half_bits(low[i]);
                 }));
    }
  }
}

// Exact to a float, which the hardware is not; comparisons of values allow for that.
void Executor::function(const Instruction& instruction, Warp& warp, uint32_t active) {
  const std::vector<Operand>& o = instruction.operands;
  Floats a = floats(warp, o[1]);
  for (float& number : a) {
    if (instruction.has(kRCP)) {
      number = 1.0f / number;
    } else if (instruction.has(kEX2)) {
      number = std::exp2(number);
    } else if (instruction.has(kRSQ)) {
      number = 1.0f / std::sqrt(number);
    } else if (instruction.has(kLG2)) {
      number = std::log2(number);
    } else {
      throw fail("no model of the function");
    }
  }
  set_floats(warp, o[0], active, a);
}

// sum += a b, distributed over the lanes as PTX's mma.m16n8k16.
void Executor::multiply_matrices(const Instruction& instruction, Warp& warp, uint32_t active) {
  const std::vector<Operand>& o = instruction.operands;
  if (!instruction.has(k16816) || !instruction.has(kF32) || active != kAllLanes) {
    throw fail("no model of the product");
  }
  const auto element = [&](const Operand& operand, int word, int lane, int half) {
    if (operand.index == kZeroRegister) return 0.0f;
    const uint32_t pair = warp.registers[static_cast<size_t>(operand.index + word)].at[lane];
    if (instruction.has(kBF16)) return float_of(half ? pair & 0xffff0000u : pair << 16);
    return float_of_half(half ? pair >> 16 : pair & 0xffff);
  };
  float a[16][16], b[16][8], sum[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const int column = 2 * t + half;
      a[g][column] = element(o[1], 0, lane, half);
      a[g + 8][column] = element(o[1], 1, lane, half);
      a[g][column + 8] = element(o[1], 2, lane, half);
      a[g + 8][column + 8] = element(o[1], 3, lane, half);
      b[column][g] = element(o[2], 0, lane, half);
      b[column + 8][g] = element(o[2], 1, lane, half);
      sum[g][column] = float_of(bits(warp, o[3], half).at[lane]);
      sum[g + 8][column] = float_of(bits(warp, o[3], half + 2).at[lane]);
    }
  }
  for (auto& row : sum) {
    const auto& factors = a[&row - sum];
    for (int column = 0; column < 8; ++column) {
      double number = row[column];
      for (int k = 0; k < 16; ++k) number += static_cast<double>(factors[k]) * b[k][column];
      row[column] = static_cast<float>(number);
    }
  }
  for (int word = 0; word < 4; ++word) {
    set(warp, o[0], active, row_of([&](int lane) {
          return bits_of(sum[lane / 4 + word / 2 * 8][2 * (lane % 4) + word % 2]);
        }),
        word);
  }
}

void Executor::special_register(const Instruction& instruction, const Block& block, Warp& warp,
                                uint32_t active) {
  const std::string& name = instruction.operands[1].name;
  Row row = {};
  if (name == "SR_TID.X") {
    row = row_of([&](int lane) { return static_cast<uint32_t>(warp.index * kLanes + lane); });
  } else if (name == "SR_CTAID.X") {
    row = row_of([&](int) { return block.index; });
  } else if (name == "SR_LANEID") {
    row = row_of([&](int lane) { return static_cast<uint32_t>(lane); });
  } else if (name == "SR_LTMASK") {
    row = row_of([&](int lane) { return (1u << lane) - 1; });
  } else if (name != "SR_TID.Y" && name != "SR_TID.Z" && name != "SR_CTAID.Y" &&
             name != "SR_CTAID.Z" && name != "SR_CgaCtaId") {  // which are 0
    throw fail("no model of the special register");
  }
  set(warp, instruction.operands[0], active, row);
}

// Shuffles, votes and reductions among the lanes of a warp.
void Executor::exchange(const Instruction& instruction, Warp& warp, uint32_t active) {
  const std::vector<Operand>& o = instruction.operands;
  if (instruction.opcode == Opcode::kShuffle) {  // P, R, from, by, clamp and segments
    const Row from = bits(warp, o[2]), by = bits(warp, o[3]), limits = bits(warp, o[4]);
    uint32_t inside = 0;
    const Row row = row_of([&](int lane) {
      const int distance = static_cast<int>(by.at[lane]);
      const int segment = static_cast<int>(limits.at[lane] >> 8 & 31);
      const int clamp = static_cast<int>(limits.at[lane] & 31);
      const int least = lane & segment, most = least | (clamp & ~segment);
      int other = least | (distance & ~segment);
      if (instruction.has(kBFLY)) other = lane ^ distance;
      if (instruction.has(kDOWN)) other = lane + distance;
      if (instruction.has(kUP)) other = lane - distance;
      const bool is_inside = instruction.has(kUP) ? other >= most : other <= most;
      inside |= uint32_t{is_inside} << lane;
      return from.at[is_inside ? other & 31 : lane];
    });
    set(warp, o[1], active, row);
    return set_predicate(warp, o[0], active, inside);
  }
  if (instruction.opcode == Opcode::kReduceWarp) {  // UR, R
    const Row a = bits(warp, o[1]);
    uint32_t found = 0;
    each(active, [&](int lane) {
      found = instruction.has(kOR) ? found | a.at[lane] : std::max(found, a.at[lane]);
    });
    if (!instruction.has(kOR) && !instruction.has(kMAX)) throw fail("no model of the reduction");
    return set(warp, o[0], active, row_of([&](int) { return found; }));
  }
  // [R,] [P,] P in
  const uint32_t votes = active & predicate(warp, o.back());
  const bool decided = instruction.has(kALL) ? votes == active : votes != 0;
  for (size_t i = 0; i + 1 < o.size(); ++i) {
    if (o[i].is_register()) {
      set(warp, o[i], active, row_of([&](int) { return votes; }));
    } else {
      set_predicate(warp, o[i], active, decided ? kAllLanes : 0);
    }
  }
}

// ---- memory accesses -----------------------------------------------------------------------------

uint64_t Executor::address(const Warp& warp, const Operand& operand, int lane, bool global) const {
  uint64_t found = 0;
  if (operand.index != kZeroRegister) {
    const size_t index = static_cast<size_t>(operand.index);
    found = uint64_t{warp.registers[index].at[lane]} * static_cast<uint64_t>(operand.scale);
    if (operand.is_64_bits) found |= uint64_t{warp.registers[index + 1].at[lane]} << 32;
  }
  if (operand.uniform != kZeroUniform) {
    found += warp.uniforms[operand.uniform];
    if (operand.uniform_is_pair) found += uint64_t{warp.uniforms[operand.uniform + 1]} << 32;
  }
  found += static_cast<uint64_t>(operand.offset);
  return global ? found : static_cast<uint32_t>(found);
}

uint8_t* Executor::shared_at(Block& block, uint64_t address, int bytes) {
  if (address + static_cast<uint64_t>(bytes) > block.shared.size()) {
    throw fail("an access outside of shared memory");
  }
  return block.shared.data() + address;
}

void Executor::access_memory(const Instruction& instruction, Block& block, Warp& warp,
                             uint32_t active) {
  const std::vector<Operand>& o = instruction.operands;
  const Opcode opcode = instruction.opcode;
  const bool is_local = opcode == Opcode::kLoadLocal || opcode == Opcode::kStoreLocal;
  const bool is_global = opcode == Opcode::kLoadGlobal || opcode == Opcode::kStoreGlobal ||
                         opcode == Opcode::kReduceGlobal;
  const int bytes = instruction.bytes, words = (bytes + 3) / 4;
  size_t at = 0;
  while (at < o.size() && o[at].kind != Kind::kAddress) ++at;
  if (at == o.size()) throw fail("no address");
  for (size_t i = 0; i < o.size(); ++i) {
    if (i != at && o[i].kind != Kind::kRegister && !o[i].is_predicate()) {
      throw fail("an operand that is not a register");
    }
  }
  if (is_local && warp.local.empty()) warp.local.resize(kLanes * kLocalBytes);

  const auto place_of = [&](int lane) -> uint8_t* {
    const uint64_t where = address(warp, o[at], lane, is_global);
    access_.addresses[lane] = where;
    if (where % static_cast<uint64_t>(bytes) != 0) throw fail("a misaligned access");
    if (is_global) {
      uint8_t* const place = memory_.find(where, bytes);
      if (!place) throw fail("an access outside of every tensor");
      return place;
    }
    if (!is_local) return shared_at(block, where, bytes);
    if (where + static_cast<uint64_t>(bytes) > kLocalBytes) throw fail("outside of local memory");
    return warp.local.data() + lane * kLocalBytes + where;
  };
  // Word `word` of a register operand.
  const auto word_of = [&](const Operand& operand, int word, int lane) -> uint32_t {
    if (operand.index == kZeroRegister) return 0;
    return warp.registers[static_cast<size_t>(operand.index + word)].at[lane];
  };
  const auto set_word = [&](const Operand& operand, int word, int lane, uint32_t number) {
    if (operand.index == kZeroRegister) return;
    warp.registers[static_cast<size_t>(operand.index + word)].at[lane] = number;
  };
  // Replaces each T at the addresses of a lane by what `body` makes of it and of the word's number.
  const auto change = [&](auto type, const auto& body) {
    using T = decltype(type);
    each(active, [&](int lane) {
      uint8_t* const place = place_of(lane);
      for (int i = 0; i < bytes / static_cast<int>(sizeof(T)); ++i) {
        T number;
        std::memcpy(&number, place + i * static_cast<int>(sizeof(T)), sizeof(T));
        number = body(number, i, lane);
        std::memcpy(place + i * static_cast<int>(sizeof(T)), &number, sizeof(T));
      }
    });
  };

  switch (opcode) {
    case Opcode::kLoadGlobal:
    case Opcode::kLoadShared:
    case Opcode::kLoadLocal:
      return each(active, [&](int lane) {
        const uint8_t* const place = place_of(lane);
        if (bytes < 4) {
          return set_word(o[0], 0, lane,
                          bytes == 1 ? place[0] : place[0] | uint32_t{place[1]} << 8);
        }
        for (int word = 0; word < words; ++word) {
          uint32_t number;
          std::memcpy(&number, place + 4 * word, sizeof(number));
          set_word(o[0], word, lane, number);
        }
      });
    case Opcode::kStoreGlobal:
    case Opcode::kStoreShared:
    case Opcode::kStoreLocal:
      return each(active, [&](int lane) {
        uint8_t* const place = place_of(lane);
        for (int word = 0; word < words; ++word) {
          const uint32_t number = word_of(o[at + 1], word, lane);
          if (bytes >= 4) {
            std::memcpy(place + 4 * word, &number, sizeof(number));
          } else {
            std::memcpy(place, &number, static_cast<size_t>(bytes));
          }
        }
      });
    case Opcode::kReduceGlobal: {
      const Operand& term = o[at + 1];
      const bool of_floats = instruction.has(kF32) || instruction.has(kF32x4);
      if (instruction.has(kMAX) && bytes == 4 && !of_floats) {
        return change(uint32_t(), [&](uint32_t number, int, int lane) {
          return std::max(number, word_of(term, 0, lane));
        });
      }
      if (instruction.has(kADD) && bytes == 8 && !of_floats) {
        return change(uint64_t(), [&](uint64_t number, int, int lane) {
          return number + (word_of(term, 0, lane) | uint64_t{word_of(term, 1, lane)} << 32);
        });
      }
      if (instruction.has(kADD) && of_floats) {
        return change(float(), [&](float number, int word, int lane) {
          return number + float_of(word_of(term, word, lane));
        });
      }
      throw fail("no model of the reduction");
    }
    case Opcode::kAtomicShared: {  // R, address [, a [, b]]
      const bool swaps = instruction.has(kCAS);
      const bool counts = instruction.has(kPOPC) && instruction.has(kINC);
      if (!swaps && !counts && !instruction.has(kADD)) throw fail("no model of the atomic");
      return change(uint32_t(), [&](uint32_t old, int, int lane) {
        uint32_t number = old + (counts ? 1 : word_of(o[at + 1], 0, lane));
        if (swaps) {
          number = old == word_of(o[at + 1], 0, lane) ? word_of(o[at + 2], 0, lane) : old;
        }
        set_word(o[0], 0, lane, old);
        return number;
      });
    }
    default:
      throw fail("no model of the access");
  }
}

}  // namespace cycles
