#include "code.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <sstream>

namespace cycles {

namespace {

using Kind = Operand::Kind;

struct OpcodeEntry {
  const char* name;
  Opcode opcode;
  Unit unit;
  const char* modifiers;      // all that are implemented
  bool takes_floats = false;  // decimal immediates are floats
};

#define COMPARISONS "LT EQ LE GT NE GE AND OR XOR "
#define UNORDERED "NUM NAN LTU EQU LEU GTU NEU GEU "
#define ACCESSES "E 128 64 U8 U16 "

const OpcodeEntry kOpcodes[] = {
    {"ATOMS", Opcode::kAtomicShared, Unit::kLoadStore, "ADD CAS POPC INC 32"},
    {"BAR", Opcode::kBarrier, Unit::kControl, "SYNC DEFER_BLOCKING"},
    {"BRA", Opcode::kBranch, Unit::kControl, "DIV CONV"},
    {"BREAK", Opcode::kBreak, Unit::kControl, ""},
    {"BREV", Opcode::kBitReverse, Unit::kSpecial, ""},
    {"BSSY", Opcode::kOpenJoin, Unit::kControl, ""},
    {"BSYNC", Opcode::kJoin, Unit::kControl, ""},
    {"CALL", Opcode::kCall, Unit::kControl, "REL NOINC"},
    {"CS2R", Opcode::kZeroPair, Unit::kAlu, ""},
    {"ENDCOLLECTIVE", Opcode::kNothing, Unit::kControl, ""},
    {"EXIT", Opcode::kExit, Unit::kControl, ""},
    {"F2FP", Opcode::kPackFloats, Unit::kAlu, "BF16 F16 F32 PACK_AB", true},
    {"F2I", Opcode::kFloatToInt, Unit::kSpecial, "FTZ U32 S64 U64 TRUNC FLOOR CEIL NTZ", true},
    {"FADD", Opcode::kFloatAdd, Unit::kFma, "FTZ", true},
    {"FCHK", Opcode::kCheckDivision, Unit::kSpecial, "", true},
    {"FFMA", Opcode::kFloatMultiplyAdd, Unit::kFma, "FTZ RM RP RZ SAT", true},
    {"FLO", Opcode::kLeadingOne, Unit::kSpecial, "U32 SH"},
    {"FMNMX", Opcode::kFloatMinMax, Unit::kAlu, "FTZ", true},
    {"FMUL", Opcode::kFloatMultiply, Unit::kFma, "FTZ", true},
    {"FRND", Opcode::kRound, Unit::kSpecial, "FTZ FLOOR CEIL TRUNC", true},
    {"FSEL", Opcode::kFloatSelect, Unit::kAlu, "FTZ", true},
    {"FSETP", Opcode::kCompareFloats, Unit::kAlu, COMPARISONS UNORDERED "FTZ", true},
    {"HADD2", Opcode::kHalfAdd, Unit::kFma, "F32", true},
    {"HFMA2", Opcode::kHalfMultiplyAdd, Unit::kFma, "MMA", true},
    {"HMMA", Opcode::kMatrixMultiply, Unit::kMatrix, "16816 F32 BF16"},
    {"I2F", Opcode::kIntToFloat, Unit::kSpecial, "U32 S64 U64 RP"},
    {"I2FP", Opcode::kIntToFloat, Unit::kAlu, "F32 S32 U32"},
    {"IABS", Opcode::kIntAbs, Unit::kAlu, ""},
    {"IADD3", Opcode::kIntAdd3, Unit::kAlu, "X"},
    {"IMAD", Opcode::kIntMultiplyAdd, Unit::kIntMultiply, "HI IADD MOV SHL U32 WIDE X"},
    {"IMNMX", Opcode::kIntMinMax, Unit::kAlu, "U32"},
    {"ISETP", Opcode::kCompareInts, Unit::kAlu, COMPARISONS "U32 EX"},
    {"LD", Opcode::kLoadGlobal, Unit::kLoadStore, ACCESSES},
    {"LDC", Opcode::kLoadConstant, Unit::kConstant, "64 U8"},
    {"LDG", Opcode::kLoadGlobal, Unit::kLoadStore, ACCESSES "CONSTANT"},
    {"LDL", Opcode::kLoadLocal, Unit::kLoadStore, "64 128"},
    {"LDS", Opcode::kLoadShared, Unit::kLoadStore, ACCESSES},
    {"LEA", Opcode::kShiftedAdd, Unit::kAlu, "HI X SX32"},
    {"LOP3", Opcode::kLogic, Unit::kAlu, "LUT"},
    {"MOV", Opcode::kMove, Unit::kAlu, ""},
    {"MUFU", Opcode::kFunction, Unit::kSpecial, "EX2 LG2 RCP RSQ", true},
    {"NOP", Opcode::kNothing, Unit::kControl, ""},
    {"P2R", Opcode::kPredicatesToRegister, Unit::kAlu, ""},
    {"PLOP3", Opcode::kPredicateLogic, Unit::kAlu, "LUT"},
    {"POPC", Opcode::kBitCount, Unit::kSpecial, ""},
    {"PRMT", Opcode::kPermuteBytes, Unit::kAlu, ""},
    {"R2P", Opcode::kRegisterToPredicates, Unit::kAlu, ""},
    {"R2UR", Opcode::kToUniform, Unit::kUniform, ""},
    {"RED", Opcode::kReduceGlobal, Unit::kLoadStore, "E ADD MAX 64 F32 F32x4 FTZ RN STRONG GPU"},
    {"REDG", Opcode::kReduceGlobal, Unit::kLoadStore, "E ADD MAX 64 F32 F32x4 FTZ RN STRONG GPU"},
    {"REDUX", Opcode::kReduceWarp, Unit::kAlu, "MAX OR"},
    {"RET", Opcode::kReturn, Unit::kControl, "REL NODEC"},
    {"S2R", Opcode::kSpecialRegister, Unit::kConstant, ""},
    {"S2UR", Opcode::kSpecialRegister, Unit::kConstant, ""},
    {"SEL", Opcode::kSelect, Unit::kAlu, ""},
    {"SHF", Opcode::kShift, Unit::kAlu, "L R U32 S32 U64 S64 HI W"},
    {"SHFL", Opcode::kShuffle, Unit::kLoadStore, "BFLY DOWN IDX UP"},
    {"STG", Opcode::kStoreGlobal, Unit::kLoadStore, ACCESSES},
    {"STL", Opcode::kStoreLocal, Unit::kLoadStore, "64 128"},
    {"STS", Opcode::kStoreShared, Unit::kLoadStore, ACCESSES},
    {"UFLO", Opcode::kLeadingOne, Unit::kUniform, "U32 SH"},
    {"UIADD3", Opcode::kIntAdd3, Unit::kUniform, "X"},
    {"UIMAD", Opcode::kIntMultiplyAdd, Unit::kUniform, "HI U32 WIDE"},
    {"UISETP", Opcode::kCompareInts, Unit::kUniform, COMPARISONS "U32 EX"},
    {"ULDC", Opcode::kLoadConstant, Unit::kUniform, "64 U8"},
    {"ULEA", Opcode::kShiftedAdd, Unit::kUniform, "HI X SX32"},
    {"ULOP3", Opcode::kLogic, Unit::kUniform, "LUT"},
    {"UMOV", Opcode::kMove, Unit::kUniform, ""},
    {"UPLOP3", Opcode::kPredicateLogic, Unit::kUniform, "LUT"},
    {"USEL", Opcode::kSelect, Unit::kUniform, ""},
    {"USHF", Opcode::kShift, Unit::kUniform, "L R U32 S32 U64 S64 HI W"},
    {"VIADD", Opcode::kAdd, Unit::kAlu, ""},
    {"VIADDMNMX", Opcode::kAddMinMax, Unit::kAlu, "U32"},
    {"VIMNMX", Opcode::kIntMinMax, Unit::kAlu, "U32"},
    {"VIMNMX3", Opcode::kIntMinMax3, Unit::kAlu, "U32"},
    {"VOTE", Opcode::kVote, Unit::kAlu, "ALL ANY"},
    {"VOTEU", Opcode::kVote, Unit::kAlu, "ALL ANY"},
    {"WARPSYNC", Opcode::kMeet, Unit::kControl, "ALL COLLECTIVE"},
    {"YIELD", Opcode::kNothing, Unit::kControl, ""},
};

const char* const kModifierNames[] = {
#define CYCLES_ENTRY(NAME) #NAME,
    CYCLES_MODIFIERS(CYCLES_ENTRY)
#undef CYCLES_ENTRY
};

struct ComparisonEntry {
  Modifier modifier;
  Comparison comparison;
};

const ComparisonEntry kComparisons[] = {
    {kLT, Comparison::kLess},
    {kEQ, Comparison::kEqual},
    {kLE, Comparison::kLessEqual},
    {kGT, Comparison::kGreater},
    {kNE, Comparison::kNotEqual},
    {kGE, Comparison::kGreaterEqual},
    {kNUM, Comparison::kOrdered},
    {kNAN, Comparison::kUnordered},
    {kLTU, Comparison::kLessUnordered},
    {kEQU, Comparison::kEqualUnordered},
    {kLEU, Comparison::kLessEqualUnordered},
    {kGTU, Comparison::kGreaterUnordered},
    {kNEU, Comparison::kNotEqualUnordered},
    {kGEU, Comparison::kGreaterEqualUnordered},
};

bool starts_with(const std::string& text, const std::string& prefix) {
  return text.compare(0, prefix.size(), prefix) == 0;
}

std::string trimmed(const std::string& text) {
  const char* const kSpace = " \t\r";
  const size_t first = text.find_first_not_of(kSpace);
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(trimmed(part));
  return parts;
}

bool is_listed(const std::string& word, const char* words) {
  std::istringstream stream(words);
  for (std::string each; stream >> each;) {
    if (each == word) return true;
  }
  return false;
}

bool remove_suffix(std::string& text, const std::string& suffix) {
  if (text.size() <= suffix.size()) return false;
  if (text.compare(text.size() - suffix.size(), suffix.size(), suffix) != 0) return false;
  text.resize(text.size() - suffix.size());
  return true;
}

bool remove_prefix(std::string& text, const std::string& prefix) {
  if (!starts_with(text, prefix)) return false;
  text.erase(0, prefix.size());
  return true;
}

// The number after a prefix such as "UR"; -1 where the text is something else.
int number_after(const std::string& text, const std::string& prefix) {
  if (!starts_with(text, prefix) || text.size() == prefix.size()) return -1;
  int number = 0;
  for (size_t i = prefix.size(); i < text.size(); ++i) {
    if (text[i] < '0' || text[i] > '9') return -1;
    number = 10 * number + (text[i] - '0');
  }
  return number;
}

uint32_t bits_of(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits;
}

// A register, uniform register or predicate by its name.
bool parse_register(const std::string& name, Operand& operand) {
  const struct {
    const char* prefix;
    const char* constant;
    int index;
    Kind kind;
  } kFiles[] = {{"R", "RZ", kZeroRegister, Kind::kRegister},
                {"UR", "URZ", kZeroUniform, Kind::kUniform},
                {"P", "PT", kTruePredicate, Kind::kPredicate},
                {"UP", "UPT", kTruePredicate, Kind::kUniformPredicate},
                {"B", "", 0, Kind::kJoin}};
  for (const auto& file : kFiles) {
    const int number = name == file.constant ? file.index : number_after(name, file.prefix);
    if (number < 0) continue;
    operand.kind = file.kind;
    operand.index = number;
    return true;
  }
  return false;
}

// What is added in [R2.64+UR4+0x10], [R3.X4+-0x8] or c[0x0][R1+0x210].
bool parse_sum(const std::string& text, Operand& operand) {
  operand.index = kZeroRegister;
  for (std::string term : split(text, '+')) {
    if (term.empty()) continue;
    if (starts_with(term, "UR")) {
      operand.uniform_is_pair = remove_suffix(term, ".64");
      operand.uniform = term == "URZ" ? kZeroUniform : number_after(term, "UR");
      if (operand.uniform < 0) return false;
    } else if (term[0] == 'R') {
      operand.is_64_bits = remove_suffix(term, ".64");
      remove_suffix(term, ".U32");
      for (const int scale : {4, 8, 16}) {
        if (remove_suffix(term, ".X" + std::to_string(scale))) operand.scale = scale;
      }
      operand.index = term == "RZ" ? kZeroRegister : number_after(term, "R");
      if (operand.index < 0) return false;
    } else {
      const bool negative = remove_prefix(term, "-");
      if (!starts_with(term, "0x")) return false;
      const int64_t number = std::strtoll(term.c_str(), nullptr, 16);
      operand.offset += negative ? -number : number;
    }
  }
  return true;
}

bool parse_immediate(std::string text, bool takes_floats, Operand& operand) {
  operand.kind = Kind::kImmediate;
  const bool negative = remove_prefix(text, "-");
  remove_prefix(text, "+");
  if (text == "INF" || text == "QNAN") {
    operand.number = (text == "INF" ? 0x7f800000u : 0x7fc00000u) | (negative ? 1u << 31 : 0);
    operand.decimal = negative ? -INFINITY : INFINITY;
    return takes_floats;
  }
  if (starts_with(text, "0x")) {
    const uint64_t number = std::strtoull(text.c_str(), nullptr, 16);
    operand.number = static_cast<uint32_t>(negative ? -number : number);
    return true;
  }
  char* end = nullptr;
  const double number = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != 0) return false;
  operand.decimal = negative ? -number : number;
  operand.number = bits_of(static_cast<float>(operand.decimal));
  return takes_floats;
}

bool parse_operand(std::string text, bool takes_floats,
                   const std::map<std::string, uint32_t>& labels, Operand& operand) {
  const size_t relative =
      text.find(" `(");  // RET R4 `(KERNEL): the register holds an address in the kernel
  if (relative != std::string::npos) {
    const auto label = labels.find(text.substr(relative + 3, text.size() - relative - 4));
    if (label == labels.end() || label->second != 0) return false;
    text.resize(relative);
  }
  remove_suffix(text, ".reuse");
  if (starts_with(text, "desc[") || starts_with(text, "[")) {
    const size_t open = text.rfind('[');
    operand.kind = Kind::kAddress;
    if (!parse_sum(text.substr(open + 1, text.size() - open - 2), operand)) return false;
    operand.uniform_is_pair = operand.uniform_is_pair || text[0] == 'd';
    return true;
  }
  if (starts_with(text, "`(")) {
    const auto label = labels.find(text.substr(2, text.size() - 3));
    if (label == labels.end()) return false;
    operand.kind = Kind::kLabel;
    operand.number = label->second;
    return true;
  }
  operand.inverted = remove_prefix(text, "!") || remove_prefix(text, "~");
  std::string unsigned_text = text;
  if (remove_prefix(unsigned_text, "-")) {
    // the sign of an immediate is part of its number
    const char first = unsigned_text[0];
    if (first == 'R' || first == 'U' || first == 'c' || first == '|') {
      operand.negated = true;
      text = unsigned_text;
    }
  }
  if (remove_prefix(text, "|")) {
    const size_t end = text.find('|');
    if (end == std::string::npos) return false;
    operand.absolute = true;
    text.erase(end, 1);
    remove_suffix(text, ".reuse");
  }
  if (remove_suffix(text, ".H0_H0")) operand.half = 0;
  if (remove_suffix(text, ".H1_H1")) operand.half = 1;
  remove_suffix(text, ".reuse");
  if (parse_register(text, operand)) return true;
  if (text == "PR") {
    operand.kind = Kind::kAllPredicates;
    return true;
  }
  if (starts_with(text, "SR")) {
    operand.kind = Kind::kSpecial;
    operand.name = text;
    return true;
  }
  if (starts_with(text, "c[")) {
    const size_t middle = text.find("][");
    if (middle == std::string::npos) return false;
    operand.kind = Kind::kConstant;
    operand.bank = static_cast<int>(std::strtol(text.c_str() + 2, nullptr, 16));
    return parse_sum(text.substr(middle + 2, text.size() - middle - 3), operand);
  }
  return parse_immediate(text, takes_floats, operand);
}

int bytes_of(const Instruction& instruction) {
  if (instruction.has(k128) || instruction.has(kF32x4)) return 16;
  if (instruction.has(k64)) return 8;
  if (instruction.has(kU16)) return 2;
  return instruction.has(kU8) ? 1 : 4;
}

// The hexadecimal number after the last space of a line such as "\t.word 0x00000040".
int last_number(const std::string& line) {
  return static_cast<int>(std::strtol(line.c_str() + line.find_last_of(" \t") + 1, nullptr, 0));
}

// The name in "index@(NAME)"; empty where there is none.
std::string indexed_name(const std::string& line) {
  const size_t at = line.find("index@(");
  return at == std::string::npos ? "" : line.substr(at + 7, line.rfind(')') - at - 7);
}

}  // namespace

Disassembly::Disassembly(const std::string& text) {
  std::string section, attribute, indexed;
  std::vector<std::string> pending;  // labels of the next instruction
  Section* code = nullptr;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) {
    const std::string content = trimmed(line);
    if (starts_with(content, ".section\t")) {
      section = trimmed(content.substr(9));
      section.resize(std::min(section.size(), section.find(',')));
      std::string kernel = section;
      code = remove_prefix(kernel, ".text.") ? &sections_[kernel] : nullptr;
      pending.clear();
      attribute.clear();
      continue;
    }
    std::string kernel = section;
    if (code) {
      if (!content.empty() && content.back() == ':' && line[0] != ' ' && line[0] != '\t') {
        pending.push_back(content.substr(0, content.size() - 1));
        continue;
      }
      if (!starts_with(content, "/*")) continue;
      const size_t encoding = content.rfind("/* 0x");
      if (encoding == std::string::npos) continue;
      const uint64_t bits = std::strtoull(content.c_str() + encoding + 3, nullptr, 16);
      if (encoding == 0) {  // the second half
        if (!code->lines.empty()) code->lines.back().high = bits;
        continue;
      }
      const size_t after = content.find("*/");
      const std::string address = content.substr(2, after - 2);
      std::string words = trimmed(content.substr(after + 2, encoding - after - 2));
      if (!words.empty() && words.back() == ';') words.pop_back();
      const uint32_t at = static_cast<uint32_t>(std::strtoul(address.c_str(), nullptr, 16));
      for (const std::string& label : pending) code->labels[label] = at;
      pending.clear();
      code->lines.push_back({at, trimmed(words), bits, 0});
    } else if (remove_prefix(kernel, ".nv.shared.")) {
      if (starts_with(content, ".zero")) facts_[kernel].shared_bytes += last_number(content);
    } else if (starts_with(kernel, ".nv.constant") && kernel.size() > 14 && kernel[13] == '.') {
      const int bank = kernel[12] - '0';
      kernel.erase(0, 14);
      const size_t bytes = content.find(".byte");
      if (bank == 0 || bytes == std::string::npos) continue;
      for (const std::string& number : split(content.substr(bytes + 5), ',')) {
        facts_[kernel].constants[bank].push_back(
            static_cast<uint8_t>(std::strtoul(number.c_str(), nullptr, 16)));
      }
    } else if (section == ".nv.info" || remove_prefix(kernel, ".nv.info.")) {
      const size_t named = content.find("EIATTR_");
      if (named != std::string::npos) {
        attribute = content.substr(named + 7);
        indexed.clear();
      } else if (attribute == "REGCOUNT" && content.find(".word") != std::string::npos) {
        // the name of a kernel, then its registers
        if (!indexed.empty()) facts_[indexed].registers = last_number(content);
        indexed = indexed_name(content);
      } else if (attribute == "PARAM_CBANK") {
        if (!indexed_name(content).empty()) {
          indexed = "found";
        } else if (!indexed.empty() && content.find(".short") != std::string::npos) {
          Kernel& facts = facts_[kernel];
          (facts.parameter_base < 0 ? facts.parameter_base : facts.parameter_bytes) =
              last_number(content);
        }
      }
    }
  }
}

std::vector<std::string> Disassembly::names() const {
  std::vector<std::string> names;
  for (const auto& section : sections_) names.push_back(section.first);
  return names;
}

const Kernel& Disassembly::kernel(const std::string& name) {
  const auto known = decoded_.find(name);
  if (known != decoded_.end()) return known->second;
  const auto section = sections_.find(name);
  if (section == sections_.end()) throw Error("no kernel " + name + " in the machine code");
  Kernel kernel = facts_[name];
  kernel.name = name;
  decode(name, section->second, kernel);
  return decoded_[name] = kernel;
}

void Disassembly::decode(const std::string& name, const Section& section, Kernel& kernel) const {
  for (const Line& line : section.lines) {
    const auto fail = [&](const std::string& what) {
      return Error("kernel " + name + ": the model does not implement " + what +
                   " in the instruction `" + line.text + "`");
    };
    Instruction instruction;
    instruction.address = line.address;
    instruction.text = line.text;
    if (line.address != kernel.instructions.size() * kBytesPerInstruction) {
      throw fail("a gap before address " + std::to_string(line.address));
    }
    const uint64_t control = line.high >> 41;
    instruction.stall = control & 15;
    instruction.write_barrier = (control >> 5) & 7;
    instruction.read_barrier = (control >> 8) & 7;
    instruction.waits = (control >> 11) & 63;

    std::string rest = line.text;
    if (remove_prefix(rest, "@")) {
      const size_t space = rest.find(' ');
      std::string guard = rest.substr(0, space);
      rest = trimmed(rest.substr(space));
      instruction.guard_negated = remove_prefix(guard, "!");
      Operand predicate;
      if (!parse_register(guard, predicate) || !predicate.is_predicate()) {
        throw fail("the guard " + guard);
      }
      instruction.guard = predicate.index;
      instruction.guard_uniform = predicate.kind == Kind::kUniformPredicate;
    }
    const size_t space = rest.find(' ');
    const std::vector<std::string> words = split(rest.substr(0, space), '.');
    const OpcodeEntry* entry = nullptr;
    for (const OpcodeEntry& each : kOpcodes) {
      if (words[0] == each.name) entry = &each;
    }
    if (!entry) throw fail("the opcode " + words[0]);
    instruction.opcode = entry->opcode;
    instruction.unit = entry->unit;
    for (size_t i = 1; i < words.size(); ++i) {
      if (!is_listed(words[i], entry->modifiers)) {
        throw fail("the modifier " + words[i] + " of " + words[0]);
      }
      for (int m = 0; m < kModifiers; ++m) {
        if (words[i] == kModifierNames[m]) instruction.modifiers[m] = true;
      }
    }
    instruction.bytes = bytes_of(instruction);
    for (const ComparisonEntry& each : kComparisons) {
      if (instruction.has(each.modifier)) instruction.comparison = each.comparison;
    }
    if (space != std::string::npos) {
      for (const std::string& text : split(rest.substr(space), ',')) {
        Operand operand;
        if (!parse_operand(text, entry->takes_floats, section.labels, operand)) {
          throw fail("the operand " + text);
        }
        if (operand.kind == Kind::kLabel) instruction.target = operand.number;
        instruction.operands.push_back(operand);
      }
    }
    kernel.instructions.push_back(instruction);
  }
}

}  // namespace cycles
