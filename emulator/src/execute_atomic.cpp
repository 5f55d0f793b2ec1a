// SPDX-License-Identifier: Apache-2.0
// execute_atomic.cpp: atom and red. The lanes of a warp go one after another, in their order.
#include <atomic>
#include <bit>
#include <cstring>
#include <mutex>
#include <type_traits>

#include "access.h"
#include "builder.h"
#include "machine.h"
#include "memory_modifiers.h"
#include "numerics.h"
#include "sync.h"

namespace emulator {
namespace {

enum class Op : uint8_t { kAnd, kOr, kXor, kCas, kExch, kAdd, kInc, kDec, kMin, kMax };

// The new value from the old one and the operands; up to 8 bytes in the low bits.
using Combine = uint64_t (*)(uint64_t old, uint64_t b, uint64_t c);

struct Atomic {
  Address address;
  Type type;
  uint32_t element_bytes, count;
  Order order;
  Reach reach;
  bool reads;  // atom: operands are count results, then count values of b, then c
  Combine combine, combine_global;
};

template <typename T, Op kOp>
uint64_t combine_integers(uint64_t old_bits, uint64_t b_bits, uint64_t c_bits) {
  using U = std::make_unsigned_t<T>;
  const T old = static_cast<T>(old_bits), b = static_cast<T>(b_bits), c = static_cast<T>(c_bits);
  T value = old;
  switch (kOp) {
    case Op::kAnd: value = static_cast<T>(old & b); break;
    case Op::kOr: value = static_cast<T>(old | b); break;
    case Op::kXor: value = static_cast<T>(old ^ b); break;
    case Op::kCas: value = old == b ? c : old; break;
    case Op::kExch: value = b; break;
    case Op::kAdd: value = static_cast<T>(static_cast<U>(old) + static_cast<U>(b)); break;
    case Op::kInc: value = old >= b ? T{0} : static_cast<T>(old + 1); break;
    case Op::kDec: value = old == 0 || old > b ? b : static_cast<T>(old - 1); break;
    case Op::kMin: value = b < old ? b : old; break;
    case Op::kMax: value = b > old ? b : old; break;
  }
  return static_cast<U>(value);
}

template <typename T>
Combine choose_integer(Op op) {
  switch (op) {
    case Op::kAnd: return combine_integers<T, Op::kAnd>;
    case Op::kOr: return combine_integers<T, Op::kOr>;
    case Op::kXor: return combine_integers<T, Op::kXor>;
    case Op::kCas: return combine_integers<T, Op::kCas>;
    case Op::kExch: return combine_integers<T, Op::kExch>;
    case Op::kAdd: return combine_integers<T, Op::kAdd>;
    case Op::kInc: return combine_integers<T, Op::kInc>;
    case Op::kDec: return combine_integers<T, Op::kDec>;
    case Op::kMin: return combine_integers<T, Op::kMin>;
    default: return combine_integers<T, Op::kMax>;
  }
}

// Hardware adds f32 in global memory with subnormals flushed, in shared memory without.
template <bool kFlush>
uint64_t add_f32(uint64_t old, uint64_t b, uint64_t) {
  float x = numerics::as_float(static_cast<uint32_t>(old)), y = numerics::as_float(static_cast<uint32_t>(b));
  if (kFlush) x = numerics::flush(x), y = numerics::flush(y);
  const float sum = numerics::canonical(x + y);
  return numerics::bits_of(kFlush ? numerics::flush(sum) : sum);
}

uint64_t add_f64(uint64_t old, uint64_t b, uint64_t) {
  return numerics::bits_of(numerics::canonical(numerics::as_double(old) + numerics::as_double(b)));
}

template <bool kBf16, Op kOp>
uint32_t combine_half(uint32_t old, uint32_t b) {
  const float x = kBf16 ? numerics::float_from_bf16(old) : numerics::float_from_f16(old);
  const float y = kBf16 ? numerics::float_from_bf16(b) : numerics::float_from_f16(b);
  float result = 0;
  if (kOp == Op::kAdd) result = kBf16 ? numerics::bf16_fma(x, 1.0f, y) : numerics::f16_fma(x, 1.0f, y);
  if (kOp == Op::kMin) result = numerics::minimum<false>(x, y);
  if (kOp == Op::kMax) result = numerics::maximum<false>(x, y);
  return kBf16 ? numerics::bf16_from_float(result) : numerics::f16_from_float(result);
}

template <bool kBf16, bool kPair, Op kOp>
uint64_t combine_halves(uint64_t old, uint64_t b, uint64_t) {
  const uint32_t x = static_cast<uint32_t>(old), y = static_cast<uint32_t>(b);
  uint32_t result = combine_half<kBf16, kOp>(x & 0xffff, y & 0xffff);
  if (kPair) result |= combine_half<kBf16, kOp>(x >> 16, y >> 16) << 16;
  return result;
}

template <Op kOp>
Combine choose_half(Type type) {
  switch (type) {
    case Type::kF16: return combine_halves<false, false, kOp>;
    case Type::kF16x2: return combine_halves<false, true, kOp>;
    case Type::kBF16: return combine_halves<true, false, kOp>;
    default: return combine_halves<true, true, kOp>;
  }
}

constexpr bool is_half(Type type) {
  return type == Type::kF16 || type == Type::kF16x2 || type == Type::kBF16 || type == Type::kBF16x2;
}

// Null: no such operation on this type.
Combine choose_combine(Op op, Type type, bool global) {
  const bool bits = type == Type::kB16 || type == Type::kB32 || type == Type::kB64;
  const bool is_logic = op == Op::kAnd || op == Op::kOr || op == Op::kXor;
  if (is_logic || op == Op::kCas || op == Op::kExch) {
    if (is_logic && type == Type::kB16) return nullptr;
    if (!bits && !((op == Op::kCas || op == Op::kExch) && is_integer(type)) &&
        !(op == Op::kExch && (type == Type::kF32 || type == Type::kF64)))
      return nullptr;
    switch (num_bytes(type)) {
      case 2: return op == Op::kCas ? choose_integer<uint16_t>(op) : nullptr;
      case 4: return choose_integer<uint32_t>(op);
      case 8: return choose_integer<uint64_t>(op);
      default: return nullptr;
    }
  }
  if (op == Op::kAdd && type == Type::kF32) return global ? add_f32<true> : add_f32<false>;
  if (op == Op::kAdd && type == Type::kF64) return add_f64;
  if (is_half(type)) {
    switch (op) {
      case Op::kAdd: return choose_half<Op::kAdd>(type);
      case Op::kMin: return choose_half<Op::kMin>(type);
      case Op::kMax: return choose_half<Op::kMax>(type);
      default: return nullptr;
    }
  }
  if ((op == Op::kInc || op == Op::kDec) && type != Type::kU32) return nullptr;
  switch (type) {
    case Type::kU32: return choose_integer<uint32_t>(op);
    case Type::kS32: return choose_integer<int32_t>(op);
    case Type::kU64: return choose_integer<uint64_t>(op);
    case Type::kS64: return choose_integer<int64_t>(op);
    default: return nullptr;
  }
}

// `concurrent`: memory that blocks on other OS threads may be changing, or another process.
template <typename T>
uint64_t update(std::byte* host, bool concurrent, Combine combine, uint64_t b, uint64_t c, bool& changed) {
  T* const place = reinterpret_cast<T*>(host);
  if (!concurrent) {
    const T old = *place;
    *place = static_cast<T>(combine(old, b, c));
    changed |= *place != old;
    return old;
  }
  std::atomic_ref<T> reference(*place);
  T old = reference.load(), next;
  do {
    next = static_cast<T>(combine(old, b, c));
  } while (!reference.compare_exchange_weak(old, next));
  changed |= next != old;
  return old;
}

uint64_t update(uint32_t num_bytes, std::byte* host, bool concurrent, Combine combine, uint64_t b, uint64_t c,
                bool& changed) {
  switch (num_bytes) {
    case 2: return update<uint16_t>(host, concurrent, combine, b, c, changed);
    case 4: return update<uint32_t>(host, concurrent, combine, b, c, changed);
    default: return update<uint64_t>(host, concurrent, combine, b, c, changed);
  }
}

uint64_t lane_value(const Warp& warp, Operand operand, uint32_t num_bytes, int lane) {
  switch (num_bytes) {
    case 2: return warp.lanes<uint16_t>(operand)[lane];
    case 4: return warp.lanes<uint32_t>(operand)[lane];
    default: return warp.lanes<uint64_t>(operand)[lane];
  }
}

void set_lane(const Warp& warp, Operand operand, uint32_t num_bytes, int lane, uint64_t value) {
  switch (num_bytes) {
    case 2: warp.lanes<uint16_t>(operand)[lane] = static_cast<uint16_t>(value); break;
    case 4: warp.lanes<uint32_t>(operand)[lane] = static_cast<uint32_t>(value); break;
    default: warp.lanes<uint64_t>(operand)[lane] = value;
  }
}

// Everything around the operation itself: bounds, checks, counters, ordering. False: the launch has ended.
bool begin_atomic(Warp& warp, const Instruction& in, const Atomic& op, Targets& to) {
  const uint32_t num_bytes = op.element_bytes * op.count;
  if (!resolve(warp, in, op.address, num_bytes, num_bytes, "atomically changes", to)) return false;
  if (to.local) {
    const int lane = std::countr_zero(to.local);
    warp.fault(Fault::kOutOfBounds, in, lane, [&] {
      return "atomically changes " + bytes_text(num_bytes) +
             " of local memory, which only global and shared memory allow";
    });
    warp.end_launch();
    return false;
  }
  if (to.shared) check_shared(warp, in, Access::kAtomic, to.shared, to.offset, num_bytes, "atomically changes");
  if (to.global) check_global(warp, in, Access::kAtomicWrite, op.reach, to.global, to, num_bytes, "atomically changes");
  if (Counters* counters = warp.counters()) {
    if (to.global) counters->global_access(in.pc, to.global, to.address, num_bytes, true);
    if (to.shared) counters->shared_access(in.pc, to.shared, to.offset, num_bytes, true);
  }
  order_before(warp, warp.active(), to.global, to.host, op.order, op.reach, true);
  return true;
}

void end_atomic(Warp& warp, const Atomic& op, const Targets& to, bool changed) {
  if (op.reads) order_after(warp, warp.active(), to.global, to.host, op.order, op.reach);
  warp.block().note_progress();
  if (!changed && to.global) warp.block().note_poll();
}

void execute_atomic(Warp& warp, const Instruction& in) {
  const Atomic& op = *static_cast<const Atomic*>(in.data);
  Targets to;
  if (!begin_atomic(warp, in, op, to)) return;
  const Operand* results = op.reads ? in.operands : nullptr;
  const Operand* values = in.operands + (op.reads ? op.count : 0);
  bool changed = false;
  const bool has_c = in.num_operands > op.count * (op.reads ? 2 : 1);
  warp.for_each([&](int lane) {
    const bool global = to.global >> lane & 1;
    const uint64_t c = has_c ? lane_value(warp, values[op.count], op.element_bytes, lane) : 0;
    for (uint32_t e = 0; e < op.count; e++) {
      const uint64_t b = lane_value(warp, values[e], op.element_bytes, lane);
      const uint64_t old = update(op.element_bytes, to.host[lane] + e * op.element_bytes, global,
                                  global ? op.combine_global : op.combine, b, c, changed);
      if (results) set_lane(warp, results[e], op.element_bytes, lane, old);
    }
  });
  end_atomic(warp, op, to, changed);
}

// atom.cas.b128 and atom.exch.b128. immediate: is cas.
void execute_wide(Warp& warp, const Instruction& in) {
  static std::mutex mutex;
  const Atomic& op = *static_cast<const Atomic*>(in.data);
  using Wide = unsigned __int128;
  Targets to;
  if (!begin_atomic(warp, in, op, to)) return;
  bool changed = false;
  warp.for_each([&](int lane) {
    std::lock_guard lock(mutex);
    Wide old, next = warp.lanes<Wide>(in.operands[1])[lane];
    std::memcpy(&old, to.host[lane], 16);
    if (in.immediate) next = old == next ? warp.lanes<Wide>(in.operands[2])[lane] : old;
    std::memcpy(to.host[lane], &next, 16);
    changed |= next != old;
    warp.lanes<Wide>(in.operands[0])[lane] = old;
  });
  end_atomic(warp, op, to, changed);
}

}  // namespace

void decode_atomic(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  auto op = std::make_shared<Atomic>();
  op->reads = in.parts[0] == "atom";
  const Space space = take_space(mods);
  if (space != Space::kGeneric && space != Space::kGlobal && space != Space::kShared && space != Space::kSharedCluster)
    decoder.error("atomics work on global and shared memory");
  op->order = take_order(mods, kAtomicOrders);
  if (op->order == Order::kWeak) op->order = Order::kRelaxed;
  op->reach = take_reach(mods, true);
  if ((op->order == Order::kRelease || op->order == Order::kAcquireRelease) && op->reach != Reach::kBlock)
    decoder.builder().note_release();
  const bool has_policy = take_cache_hints(mods);
  const int operation = mods.take_one_of({"and", "or", "xor", "cas", "exch", "add", "inc", "dec", "min", "max"});
  if (operation < 0) decoder.error("expected an operation such as .add");
  const Op which = static_cast<Op>(operation);
  const bool noftz = mods.take("noftz");
  const int vector = mods.take_one_of({"v2", "v4", "v8"});
  op->count = vector < 0 ? 1 : 2u << vector;
  op->type = mods.take_type();
  mods.finish();
  op->element_bytes = num_bytes(op->type);
  if (!op->reads && (which == Op::kCas || which == Op::kExch)) decoder.error("red has no such operation");
  if (is_half(op->type)) {
    if (!noftz) decoder.error("expected .noftz");
    if (op->count == 1 && which != Op::kAdd) decoder.error("no such operation on this type");
    if (op->type == Type::kBF16 || op->type == Type::kBF16x2) decoder.require_architecture(90);
  }
  if (op->count > 1) {
    decoder.require_architecture(90);
    if (space == Space::kShared || !is_float(op->type) || op->type == Type::kF64 ||
        op->element_bytes * op->count > 16 || (op->type == Type::kF32 && which != Op::kAdd))
      decoder.error("no such vector operation");
  }
  out.cls = InstructionClass::kAtomic;
  const size_t num_values = which == Op::kCas ? 2 : 1;
  decoder.expect_operands(in, (op->reads ? 2 : 1) + num_values + has_policy);
  op->address = decoder.address(in.operands[op->reads ? 1 : 0], space);
  std::vector<Operand> operands;
  if (op->reads) operands = decoder.destinations(in.operands[0], op->type);
  for (size_t i = 0; i < num_values; i++)
    for (Operand value : decoder.sources(in.operands[(op->reads ? 2 : 1) + i], op->type)) operands.push_back(value);
  if (operands.size() != op->count * ((op->reads ? 1 : 0) + num_values))
    decoder.error("expected vectors of one length");
  if (op->type == Type::kB128) {
    decoder.require_architecture(90);
    if (num_values == 1 && which != Op::kExch) decoder.error("no such operation on this type");
    out.immediate = which == Op::kCas;
    out.execute = &execute_wide;
  } else {
    op->combine = choose_combine(which, op->type, false);
    op->combine_global = choose_combine(which, op->type, true);
    if (op->combine == nullptr) decoder.error("no such operation on this type");
    out.execute = &execute_atomic;
  }
  decoder.set_operands(out, std::move(operands));
  out.data = decoder.keep(op);
}

}  // namespace emulator
