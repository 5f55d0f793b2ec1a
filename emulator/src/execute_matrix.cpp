// SPDX-License-Identifier: Apache-2.0
// execute_matrix.cpp: mma.sync, ldmatrix, stmatrix and movmatrix. All are collectives of the whole warp.
#include "matrix.h"

#include <bit>
#include <cstring>

#include "access.h"
#include "machine.h"
#include "program.h"

namespace emulator {

namespace {

constexpr int kMaxRegisters = 8;  // of one matrix

// ---- mma ------------------------------------------------------------------------------------------------------------

struct Mma {
  const MatrixOp* op;
  int selector;
};

// Operands: d, a, b, c, then the metadata of mma.sp.
void execute_mma(Warp& warp, const Instruction& in) {
  if (!warp.collective_all(in)) return;
  const Mma& mma = *static_cast<const Mma*>(in.data);
  const MatrixOp& op = *mma.op;
  const Operand* next = in.operands;
  const auto lanes = [&](int count, auto** out) {
    for (int r = 0; r < count; ++r) out[r] = warp.lanes<uint32_t>(*next++);
  };
  void* d[kMaxRegisters];
  const void *a[kMaxRegisters], *b[kMaxRegisters], *c[kMaxRegisters];
  lanes(op.num_d, d);
  lanes(op.num_a, a);
  lanes(op.num_b, b);
  lanes(op.num_c, c);
  const uint32_t* metadata = op.num_metadata != 0 ? warp.lanes<uint32_t>(*next) : nullptr;
  if (warp.full()) {
    op.run(d, a, b, c, metadata, mma.selector);
  } else {  // reported as a fault already: what the lanes that are there get must only not touch the others
    alignas(64) uint64_t result[kMaxRegisters][kWarpLanes];
    void* copies[kMaxRegisters];
    for (int r = 0; r < op.num_d; ++r) copies[r] = result[r];
    op.run(copies, a, b, c, metadata, mma.selector);
    warp.for_each([&](int lane) {
      for (int r = 0; r < op.num_d; ++r) {
        const size_t bytes = op.a_bytes_per_reg, at = static_cast<size_t>(lane) * bytes;
        std::memcpy(static_cast<char*>(d[r]) + at, reinterpret_cast<const char*>(result[r]) + at, bytes);
      }
    });
  }
  if (Counters* counters = warp.counters()) counters->mma(in.pc, op.flops);
}

// The least architecture that has this form.
int architecture_of(const std::vector<std::string>& parts, const MatrixOp& op) {
  for (const std::string& part : parts) {
    if (part == "e4m3" || part == "e5m2") return 89;
    if (part == "f64" && op.num_c == 4) return 90;
  }
  return 80;
}

void decode_mma(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  const MatrixOp* op = find_matrix_op({in.parts.begin() + 1, in.parts.end()});
  if (op == nullptr) decoder.error("no such matrix product");
  decoder.require_architecture(architecture_of(in.parts, *op));
  const bool sparse = op->num_metadata != 0;
  decoder.expect_operands(in, sparse ? 6 : 4);

  // Registers by their width, except that numbers written in place of C follow its type.
  const Type plain = op->a_bytes_per_reg == 8 ? Type::kF64 : Type::kB32;
  const bool float_c = in.parts.back() == "f32";
  std::vector<Operand> operands;
  const auto append = [&](const char* name, std::vector<Operand> registers, int expected) {
    if (static_cast<int>(registers.size()) != expected) {
      decoder.error(std::string("expected ") + std::to_string(expected) + " registers of " + name);
    }
    operands.insert(operands.end(), registers.begin(), registers.end());
  };
  append("d", decoder.destinations(in.operands[0], plain), op->num_d);
  append("a", decoder.sources(in.operands[1], plain), op->num_a);
  append("b", decoder.sources(in.operands[2], plain), op->num_b);
  append("c", decoder.sources(in.operands[3], float_c ? Type::kF32 : plain), op->num_c);
  auto mma = std::make_shared<Mma>(Mma{op, 0});
  if (sparse) {
    operands.push_back(decoder.source(in.operands[4], Type::kB32));
    const int64_t selector = decoder.integer(in.operands[5]);
    if (selector < 0 || selector >= op->num_selectors) {
      decoder.error("the sparsity selector must be below " + std::to_string(op->num_selectors));
    }
    mma->selector = static_cast<int>(selector);
  }
  decoder.set_operands(out, operands);
  out.cls = InstructionClass::kMma;
  out.execute = execute_mma;
  out.data = decoder.keep(std::move(mma));
}

// ---- ldmatrix and stmatrix ------------------------------------------------------------------------------------------

struct MatrixAccess {
  Address address;
  int num_matrices;
  bool transpose;
};

template <bool kWrite>
void execute_matrix_access(Warp& warp, const Instruction& in) {
  if (!warp.collective_all(in)) return;
  const MatrixAccess& access = *static_cast<const MatrixAccess*>(in.data);
  const int num_rows = 8 * access.num_matrices;  // given by the first lanes
  const uint32_t lanes_of_rows = num_rows == kWarpLanes ? kAllLanes : (1u << num_rows) - 1;
  constexpr const char* kVerb = kWrite ? "writes" : "reads";
  Targets targets;
  if (!resolve(warp, in, access.address, 16, 16, kVerb, targets, lanes_of_rows)) return;
  if (const uint32_t outside = targets.global | targets.local) {
    const int lane = std::countr_zero(outside);
    warp.fault(Fault::kOutOfBounds, in, lane, [&] {
      return std::string(kVerb) + " a matrix row at " + hex(targets.address[lane]) + ", which is not in shared memory";
    });
    return warp.end_launch();
  }
  const uint32_t* rows = targets.offset;
  check_shared(warp, in, kWrite ? Access::kWrite : Access::kRead, lanes_of_rows, rows, 16, kVerb, nullptr, true);
  if (Counters* counters = warp.counters()) counters->matrix_access(in.pc, access.num_matrices, rows, kWrite);

  auto* shared = reinterpret_cast<uint8_t*>(warp.block().shared());
  for (int m = 0; m < access.num_matrices; ++m) {
    uint8_t* row_pointers[8];
    for (int r = 0; r < 8; ++r) row_pointers[r] = shared + rows[8 * m + r];
    uint32_t* lanes = warp.lanes<uint32_t>(in.operands[m]);
    if constexpr (kWrite) {
      stmatrix(row_pointers, access.transpose, lanes);
    } else if (warp.full()) {
      ldmatrix(row_pointers, access.transpose, lanes);
    } else {
      alignas(64) uint32_t loaded[kWarpLanes];
      ldmatrix(row_pointers, access.transpose, loaded);
      warp.write<uint32_t>(in.operands[m], [&](int i) { return loaded[i]; });
    }
  }
}

void decode_matrix_access(Decoder& decoder, const ptx::Instruction& in, Instruction& out, bool write) {
  Modifiers mods(decoder, in);
  auto access = std::make_shared<MatrixAccess>();
  if (!mods.take("sync") || !mods.take("aligned")) decoder.error("expected .sync.aligned");
  if (!mods.take("m8n8")) decoder.error("expected .m8n8: other shapes are not known");
  const int num = mods.take_one_of({"x1", "x2", "x4"});
  if (num < 0) decoder.error("expected .x1, .x2 or .x4");
  access->num_matrices = 1 << num;
  access->transpose = mods.take("trans");
  const bool shared = mods.take("shared") || mods.take("shared::cta");
  if (!mods.take("b16")) decoder.error("expected .b16: other types are not known");
  mods.finish();
  if (write) decoder.require_architecture(90);
  decoder.expect_operands(in, 2);

  const std::vector<Operand> registers =
      write ? decoder.sources(in.operands[1], Type::kB32) : decoder.destinations(in.operands[0], Type::kB32);
  if (static_cast<int>(registers.size()) != access->num_matrices) {
    decoder.error("expected " + std::to_string(access->num_matrices) + " registers");
  }
  access->address = decoder.address(in.operands[write ? 0 : 1], shared ? Space::kShared : Space::kGeneric);
  decoder.set_operands(out, registers);
  out.cls = write ? InstructionClass::kSharedStore : InstructionClass::kMatrixLoad;
  out.execute = write ? execute_matrix_access<true> : execute_matrix_access<false>;
  out.data = decoder.keep(std::move(access));
}

// ---- movmatrix ------------------------------------------------------------------------------------------------------

void execute_movmatrix(Warp& warp, const Instruction& in) {
  if (!warp.collective_all(in)) return;
  alignas(64) uint32_t result[kWarpLanes];
  movmatrix_trans(warp.lanes<uint32_t>(in.operands[1]), result);
  warp.write<uint32_t>(in.operands[0], [&](int i) { return result[i]; });
}

void decode_movmatrix(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  for (const char* part : {"sync", "aligned", "m8n8", "trans", "b16"}) {
    if (!mods.take(part)) decoder.error(std::string("expected .") + part);
  }
  mods.finish();
  decoder.expect_operands(in, 2);
  out.cls = InstructionClass::kShuffle;
  out.execute = execute_movmatrix;
  decoder.set_operands(out,
                       {decoder.destination(in.operands[0], Type::kB32), decoder.source(in.operands[1], Type::kB32)});
}

}  // namespace

bool decode_matrix(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  const std::string& name = in.parts[0];
  if (name == "mma") {
    decode_mma(decoder, in, out);
  } else if (name == "ldmatrix" || name == "stmatrix") {
    decode_matrix_access(decoder, in, out, name == "stmatrix");
  } else if (name == "movmatrix") {
    decode_movmatrix(decoder, in, out);
  } else {
    return false;
  }
  return true;
}

}  // namespace emulator
