// Machine code as nvdisasm prints it.
//
//   Opcode, Unit, Modifier   what an instruction does, and which unit of the multiprocessor executes it
//   Operand, Instruction     one instruction, decoded
//   Kernel                   the instructions of a kernel, and what it takes of a multiprocessor
//   Disassembly              the kernels of a text of `nvdisasm -hex`
//
// A kernel is decoded when it is asked for. An opcode, a modifier or an operand that the model does not
// implement is an Error that names the kernel and the instruction.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace cycles {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kLanes = 32;
constexpr int kZeroRegister = 255;  // RZ
constexpr int kZeroUniform = 63;    // URZ
constexpr int kTruePredicate = 7;   // PT, UPT
constexpr int kBytesPerInstruction = 16;

enum class Opcode {
  // clang-format off
  kAtomicShared, kBarrier, kBitCount, kBitReverse, kBranch, kBreak, kCall, kCheckDivision, kCompareFloats,
  kCompareInts, kExit, kFloatAdd, kFloatMinMax, kFloatMultiply, kFloatMultiplyAdd, kFloatSelect,
  kFloatToInt, kFunction, kHalfAdd, kHalfMultiplyAdd, kIntAbs, kIntAdd3, kIntMinMax, kIntMinMax3,
  kIntMultiplyAdd, kIntToFloat, kJoin, kLeadingOne, kLoadConstant, kLoadGlobal, kLoadLocal, kLoadShared,
  kLogic, kMatrixMultiply, kMeet, kMove, kNothing, kOpenJoin, kPackFloats, kPermuteBytes,
  kPredicateLogic, kPredicatesToRegister, kReduceGlobal, kReduceWarp, kRegisterToPredicates, kReturn,
  kRound, kSelect, kShift, kShiftedAdd, kShuffle, kSpecialRegister, kStoreGlobal, kStoreLocal,
  kStoreShared, kToUniform, kVote, kAdd, kAddMinMax, kZeroPair,
  // clang-format on
};

// The units that issue to different pipes, each with an interval of its own.
enum class Unit {
  kFma,          // float multiply-add
  kIntMultiply,  // integer multiply-add, on the other half of the multiply-add pipe
  kAlu,          // integers, logic, comparisons
  kSpecial,      // reciprocals, exponentials, conversions
  kLoadStore,
  kUniform,
  kControl,
  kConstant,  // loads of constants and special registers
  kMatrix,
  kCount,
};

// clang-format off
#define CYCLES_MODIFIERS(M) \
  M(128) M(16816) M(32) M(64) M(ADD) M(ALL) M(AND) M(ANY) M(BF16) M(BFLY) M(CAS) M(CEIL) \
  M(COLLECTIVE) M(CONSTANT) M(CONV) M(DEFER_BLOCKING) M(DIV) M(DOWN) M(E) M(EQ) M(EQU) \
  M(EX) M(EX2) M(F16) M(F32) M(F32x4) M(FLOOR) M(FTZ) M(GE) M(GEU) M(GPU) M(GT) M(GTU) \
  M(HI) M(IADD) M(IDX) M(INC) M(L) M(LE) M(LEU) M(LG2) M(LT) M(LTU) M(LUT) M(MAX) M(MIN) \
  M(MMA) M(MOV) M(NAN) M(NE) M(NEU) M(NODEC) M(NOINC) M(NTZ) M(NUM) M(OR) M(PACK_AB) \
  M(POPC) M(R) M(RCP) M(REL) M(RM) M(RN) M(RP) M(RSQ) M(RZ) M(S32) M(S64) M(SAT) M(SH) \
  M(SHL) M(STRONG) M(SX32) M(SYNC) M(TRUNC) M(U16) M(U32) M(U64) M(U8) M(UP) M(W) M(WIDE) \
  M(X) M(XOR)
// clang-format on

enum Modifier {
#define CYCLES_ENTRY(NAME) k##NAME,
  CYCLES_MODIFIERS(CYCLES_ENTRY)
#undef CYCLES_ENTRY
      kModifiers
};

enum class Comparison {
  // clang-format off
  kNone, kLess, kEqual, kLessEqual, kGreater, kNotEqual, kGreaterEqual, kOrdered,
  kUnordered, kLessUnordered, kEqualUnordered, kLessEqualUnordered, kGreaterUnordered,
  kNotEqualUnordered, kGreaterEqualUnordered,
  // clang-format on
};

struct Operand {
  enum class Kind {
    // clang-format off
    kRegister, kUniform, kPredicate, kUniformPredicate, kAllPredicates, kImmediate, kConstant, kLabel,
    kSpecial, kAddress, kJoin,
    // clang-format on
  };
  Kind kind;
  int index = 0;          // of the register; of a kAddress or kConstant: the register added, or RZ
  bool negated = false;   // -
  bool absolute = false;  // | |
  bool inverted = false;  // ~ or !
  bool is_64_bits = false;     // the register added is a pair
  int half = -1;               // 16 bits of the register: 0 or 1; -1: all of it
  int scale = 1;               // of the register added
  int uniform = kZeroUniform;  // added to an address or constant
  bool uniform_is_pair = false;
  int64_t offset = 0;
  int bank = 0;         // of a kConstant
  uint32_t number = 0;  // of a kImmediate
  double decimal = 0;   // of a kImmediate that was printed as a decimal
  std::string name;     // of a kSpecial

  bool is_register() const { return kind == Kind::kRegister || kind == Kind::kUniform; }
  bool is_predicate() const { return kind == Kind::kPredicate || kind == Kind::kUniformPredicate; }
};

struct Instruction {
  uint32_t address = 0;
  std::string text;
  Opcode opcode = Opcode::kNothing;
  Unit unit = Unit::kAlu;
  bool modifiers[kModifiers] = {};
  Comparison comparison = Comparison::kNone;
  int bytes = 4;  // that each lane loads or stores
  std::vector<Operand> operands;
  uint32_t target = 0;  // of a branch or call

  int guard = kTruePredicate;
  bool guard_negated = false, guard_uniform = false;

  // Control bits, which ptxas writes.
  int stall = 1;          // cycles until the warp may issue again
  int write_barrier = 7;  // set until the result is there; 7: none
  int read_barrier = 7;   // set until the operands have been read; 7: none
  unsigned waits = 0;     // barriers that must be clear before, a bit each

  bool has(Modifier modifier) const { return modifiers[modifier]; }
};

struct Kernel {
  std::string name;  // mangled
  std::vector<Instruction> instructions;
  int registers = 0;        // of a thread
  int shared_bytes = 0;     // of a block, with those that the system reserves in front (sm_90)
  int parameter_base = -1;  // offset in constant bank 0
  int parameter_bytes = -1;
  std::map<int, std::vector<uint8_t>> constants;  // other banks
};

class Disassembly {
 public:
  explicit Disassembly(const std::string& text);

  std::vector<std::string> names() const;
  // The kernel, decoded; throws an Error where there is none of this mangled name.
  const Kernel& kernel(const std::string& name);

 private:
  struct Line {
    uint32_t address;
    std::string text;
    uint64_t low, high;  // the encoding
  };
  struct Section {
    std::vector<Line> lines;
    std::map<std::string, uint32_t> labels;
  };

  void decode(const std::string& name, const Section& section, Kernel& kernel) const;

  std::map<std::string, Section> sections_;
  std::map<std::string, Kernel> facts_;  // all but the instructions
  std::map<std::string, Kernel> decoded_;
};

}  // namespace cycles
