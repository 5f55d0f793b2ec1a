// SPDX-License-Identifier: Apache-2.0
// The dense form of a kernel, and how a family of instructions decodes itself into it.
//
// A family is a function `bool decode_xyz(Decoder&, const ptx::Instruction&, Instruction& out)`, declared below and
// listed in the table of decode.cpp. It looks at `in.parts[0]`, returns false for what is not its own, and otherwise
// fills `out` (execute, operands, cls and, where it needs them, immediate, aux, data) or calls decoder.error(). The
// pattern:
//
//   Modifiers mods(decoder, in);                       // the parts behind the mnemonic
//   bool sat = mods.take("sat"); Type type = mods.take_type();
//   mods.finish();                                     // Error when a part is left: nothing is ever skipped silently
//   decoder.expect_operands(in, 3);
//   out.cls = InstructionClass::kFma;
//   out.execute = sat ? &execute_add<true> : &execute_add<false>;
//   decoder.set_operands(out, {decoder.destination(in.operands[0], type), decoder.source(in.operands[1], type),
//                              decoder.source(in.operands[2], type)});
//
// The guard (@p) is core's business: execute runs with warp.active() = the lanes whose guard holds, and not at all when
// there are none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "counters.h"
#include "ptx.h"
#include "report.h"

namespace emulator {

class Module;
class Warp;
struct Code;
struct Instruction;

constexpr int kWarpLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// ---- Types ----------------------------------------------------------------------------------------------------------
enum class Type : uint8_t {
  kNone,
  kPred,
  kB8,
  kB16,
  kB32,
  kB64,
  kB128,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kF16x2,
  kBF16,
  kBF16x2,
  kTF32,
  kF32,
  kF64,
  kE4M3,
  kE5M2,
  kE4M3x2,
  kE5M2x2,
  kU16x2,
  kS16x2,
  kF32x2
};
Type type_of(std::string_view name);  // "u32"; kNone when it names no type
uint32_t num_bytes(Type type);        // kPred: 4, a mask of the 32 lanes
const char* name_of(Type type);
bool is_signed(Type type);   // s8 ... s64
bool is_integer(Type type);  // u*, s*, b*
bool is_float(Type type);

// State spaces of addresses. Addresses are: global, const: the host address. Shared: the offset in the block's shared
// memory. Local: the offset in the lane's own local memory. Param of kernels: the host address of the launch's copy;
// param of functions and of calls lies in the lane's local memory, so its Space here is kLocal. Generic: the host
// address, or one of the windows of machine.h (`space_of(address)`).
enum class Space : uint8_t { kGeneric, kGlobal, kConst, kShared, kLocal, kParam, kSharedCluster };

// ---- Operands
// -------------------------------------------------------------------------------------------------------- Where a
// value of 32 lanes stands: `warp.lanes<T>(operand)` is a T[32] aligned to 64 bytes, T as wide as the register was
// declared. Predicates are one uint32_t, bit i for lane i. Banks: registers of the frame, constants (immediates,
// addresses of variables; never written), special registers of the warp, and a sink that takes what `_` discards.
struct Operand {
  enum Bank : uint32_t { kRegisters = 0, kConstants = 1, kSpecials = 2, kSink = 3 };
  static constexpr uint32_t kNegate = 1u << 29;  // of a predicate: !p
  static constexpr uint32_t kOffsetMask = kNegate - 1;
  uint32_t bits = 0;
  static Operand at(Bank bank, uint32_t offset) { return {static_cast<uint32_t>(bank) << 30 | offset}; }
  uint32_t bank() const { return bits >> 30; }
  uint32_t offset() const { return bits & kOffsetMask; }
  bool negated() const { return bits & kNegate; }
  friend bool operator==(Operand a, Operand b) { return a.bits == b.bits; }
};

// What [...] names: lanes<uint32_t or uint64_t>(base) + offset in `space`. The base is always there: zeros for the
// address of a variable, whose offset then holds all; `uniform` says so. Core has resolved the space: a kernel's
// parameter by name is {kParam, uniform, offset in the parameter block}, warp.block().params() its host address; a
// function's or a call's is {kLocal, base = frame pointer}; ld.param of a register is {kGeneric}.
struct Address {
  Space space = Space::kGeneric;
  Operand base;
  uint32_t base_bytes = 8;  // 4 or 8
  int64_t offset = 0;
  bool uniform = false;
};

// ---- Instructions ---------------------------------------------------------------------------------------------------
using Execute = void (*)(Warp&, const Instruction&);

struct Instruction {
  Execute execute = nullptr;
  const Operand* operands = nullptr;  // as the family ordered them; in.operands[i]
  const void* data = nullptr;         // of the family, kept alive by decoder.keep()
  int64_t immediate = 0;              // free for the family: an address offset, ...
  uint32_t aux = 0;                   // free for the family
  uint32_t pc = 0;                    // number of this instruction in the program: what counters and shadows know it by
  uint32_t target = 0;                // index of a branch's target in its Code
  uint32_t reconverge = 0;            // index of a branch's immediate post-dominator, or kNoReconvergence
  uint32_t check = 0;                 // with kSlow: index of Code::checks
  Operand guard;                      // meaningful with kGuarded
  uint16_t num_operands = 0;
  InstructionClass cls = InstructionClass::kOther;
  uint8_t flags = 0;
  enum Flag : uint8_t {
    kGuarded = 1,
    kChecksReads = 2,   // may read a register nobody wrote
    kTracksWrites = 4,  // writes a register that such an instruction reads
    kPropagates = 8,    // all it reads is only moved (Moved::kAlways)
    kEndsBlock = 16,    // control does not go to the next instruction (when there is no guard)
    kBranch = 32,       // goes to target, or to Code::jump_tables
    kSlow = kChecksReads | kTracksWrites,
  };
};
constexpr uint32_t kNoReconvergence = 0xffffffffu;

// Of a register that is read: whether the result is as unwritten as it is, instead of a report. So a value that nobody
// uses is no fault: compilers compare and select what is not written yet, and a broadcast reads one lane alone.
enum class Moved : uint8_t {
  kNot,
  kAlways,
  kFirst,     // except in lanes where the second one decides: Warp::set_deciding()
  kSecond,    // except in lanes where the first one decides
  kFromLane,  // in the lanes that get it: Warp::set_sources()
};

// A register that an instruction reads or writes, for the analysis and for checks.
struct RegisterUse {
  uint32_t offset;     // in the bank of registers
  uint32_t num_bytes;  // of one lane; predicates: 0
  bool write;
  Moved moved = Moved::kNot;
};

struct InstructionInfo {
  std::string text;   // "ld.global.u32"
  SourceLine where;   // innermost line that is not in a header of the CUDA toolkit
  SourceLine caller;  // where that was inlined, as far out as it goes; line 0: nowhere
  int ptx_line = 0;
  std::vector<RegisterUse> uses;
};

// Where a parameter or result of a function stands in its own frame.
struct ParamSlot {
  bool in_register = false;
  Operand reg;
  uint32_t local_offset = 0, num_bytes = 0, align = 1;
};

// The tracked registers of an instruction, as indices of Frame::written.
struct RegisterCheck {
  uint32_t guard = ~0u;  // the first of reads, when that is the guard
  std::vector<uint32_t> reads, writes;
  std::vector<std::pair<uint32_t, Moved>> moved_from;
};

// One function. The last instruction is always one that core appends: the end of the function.
struct Code {
  std::string name;
  bool is_entry = false;
  std::vector<Instruction> instructions;
  std::vector<std::vector<Operand>> operand_lists;
  std::vector<InstructionInfo> info;  // beside instructions
  std::byte* constants = nullptr;     // the bank of constants
  std::unique_ptr<std::byte[]> constants_storage;
  uint32_t register_bytes = 0;  // the bank of registers; a frame pointer (u64 lanes) stands at offset 0
  uint32_t words_alive = 0;     // 32-bit registers whose values are still needed, at most at one time
  uint32_t local_bytes = 0;     // local variables, parameters and call parameters of a frame, a lane
  uint32_t first_pc = 0;
  uint32_t num_tracked = 0;  // registers whose written lanes are tracked at run time
  std::vector<RegisterCheck> checks;
  std::vector<uint32_t> written_at_entry;                 // tracked ones that hold parameters
  std::map<uint32_t, std::vector<uint32_t>> jump_tables;  // of brx.idx: instruction -> targets
  std::vector<ParamSlot> params, results;
};

// A kernel and all functions it can reach. codes[0] is the kernel.
struct Program {
  const Module* module = nullptr;
  std::vector<std::unique_ptr<Code>> codes;
  std::map<uint64_t, const Code*> code_at_address;  // of function pointers
  std::vector<std::shared_ptr<const void>> kept;
  std::vector<std::pair<const Code*, uint32_t>> places;  // pc -> function, index in it
  uint32_t static_smem = 0, dynamic_smem_align = 16;
  uint32_t num_instructions = 0;
  uint32_t params_bytes = 0;
  bool orders_blocks = false;  // some instruction releases what another block can acquire
  const InstructionInfo& info(uint32_t pc) const { return places[pc].first->info[places[pc].second]; }
};

// ---- Decoding -------------------------------------------------------------------------------------------------------
class CodeBuilder;  // decode.cpp

class Decoder {
 public:
  explicit Decoder(CodeBuilder& builder) : builder_(builder) {}

  // Throws Error "file:line: <message> in 'ld.global.foo'".
  [[noreturn]] void error(const std::string& message) const;
  void expect_operands(const ptx::Instruction& in, size_t count) const;
  void expect_operands(const ptx::Instruction& in, size_t at_least, size_t at_most) const;
  int architecture() const;  // of the Options: 80, 90, ...
  // Error "needs sm_90, the module is loaded for sm_80".
  void require_architecture(int at_least) const;

  // A register, immediate, special register or (64-bit types) the address of a variable, as lanes of `type`. A register
  // must be declared exactly as wide as the type; where PTX lets it be wider (ld, st, cvt) pass register_bytes, which
  // becomes the declared width of a lane (an immediate has that of the type). With a type of kPred: a predicate, maybe
  // negated. Float immediates follow the type: 0f and 0d patterns are converted to it.
  Operand source(const ptx::Operand& operand, Type type, uint32_t* register_bytes = nullptr);
  Operand source(const ptx::Operand& operand, Type type, Moved moved);
  // A register or `_`.
  Operand destination(const ptx::Operand& operand, Type type, uint32_t* register_bytes = nullptr);
  // A destination that the instruction also reads (rare: only when PTX says so, e.g. wgmma's accumulators).
  Operand destination_and_source(const ptx::Operand& operand, Type type);
  // {a, b, c} or a plain operand, as a list.
  std::vector<Operand> sources(const ptx::Operand& operand, Type type, uint32_t* register_bytes = nullptr);
  std::vector<Operand> destinations(const ptx::Operand& operand, Type type, uint32_t* register_bytes = nullptr);
  // [..]: `space` as the instruction names it, kGeneric when it names none.
  Address address(const ptx::Operand& operand, Space space);
  // An immediate whose value the instruction must know (a byte count, a barrier id).
  int64_t integer(const ptx::Operand& operand);
  bool is_integer(const ptx::Operand& operand) const { return operand.kind == ptx::Operand::Kind::kInteger; }
  bool is_predicate(const ptx::Operand& operand) const;  // a register of type .pred
  // An immediate as constant lanes.
  Operand constant(uint64_t bits, uint32_t num_bytes);
  Operand sink() const { return Operand::at(Operand::kSink, 0); }
  uint32_t label(const ptx::Operand& operand);  // index of the instruction it stands before

  void set_operands(Instruction& out, std::vector<Operand> operands);
  // Keeps an object as long as the program: out.data = decoder.keep(std::make_shared<Shape>(...)).
  const void* keep(std::shared_ptr<const void> object);

  CodeBuilder& builder() { return builder_; }  // for the control family

 private:
  friend class CodeBuilder;
  CodeBuilder& builder_;
  const ptx::Instruction* current_ = nullptr;
  std::vector<RegisterUse> uses_;
};

// The parts of an opcode behind its mnemonic, taken in any order.
class Modifiers {
 public:
  Modifiers(const Decoder& decoder, const ptx::Instruction& in)
      : decoder_(decoder), parts_(in.parts.begin() + 1, in.parts.end()) {}
  bool take(std::string_view part);  // removes the first of that name
  // The first that names a type; Error when there is none. kPred, whose registers are masks, only where asked for.
  Type take_type(bool or_predicate = false);
  // The index of the first of these names that is there, -1 when none is.
  int take_one_of(std::initializer_list<std::string_view> names);
  const std::vector<std::string>& rest() const { return parts_; }
  void finish() const;  // Error naming the first part left

 private:
  const Decoder& decoder_;
  std::vector<std::string> parts_;
};

// The families. All are tried in this order until one takes the instruction.
bool decode_integer(Decoder&, const ptx::Instruction&, Instruction&);  // CORE: integer, logic, setp, selp, mov
bool decode_control(Decoder&, const ptx::Instruction&, Instruction&);  // CORE: bra, call, ret, exit, bar, trap
bool decode_float(Decoder&, const ptx::Instruction&, Instruction&);  // NUMERICS: f16 bf16 f32 f64 arithmetic, set, setp
bool decode_convert(Decoder&, const ptx::Instruction&, Instruction&);  // NUMERICS: cvt
bool decode_matrix(Decoder&, const ptx::Instruction&, Instruction&);   // NUMERICS: mma, ldmatrix, stmatrix, movmatrix
bool decode_memory(Decoder&, const ptx::Instruction&, Instruction&);   // SHADOW: ld st atom red cvta fence ...
bool decode_async(Decoder&, const ptx::Instruction&, Instruction&);    // SHADOW: cp.async, mbarrier
bool decode_warp(Decoder&, const ptx::Instruction&, Instruction&);     // SHADOW: shfl vote match redux bar.warp elect
// Ownership where mnemonics meet: integer takes add sub mul mad min max abs neg set setp selp slct mov with types u, s,
// b and pred only and returns false for f16 bf16 f32 f64 and x2 floats, which are float's (also selp.f32 and mov.f32
// are integer's: bits). bar.warp.sync is warp's, every other bar and barrier is control's.

// Decodes kernel `name` with everything it reaches. Throws Error.
std::shared_ptr<const Program> decode_program(const Module& module, const ptx::Module& syntax, const std::string& name,
                                              int architecture);

// analysis.cpp: fills reconverge of every branch, Code::words_alive, Code::checks and the flags of instructions that
// need run-time checks.
void analyse(Code& code);

}  // namespace emulator
