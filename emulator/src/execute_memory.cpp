// SPDX-License-Identifier: Apache-2.0
// execute_memory.cpp: ld, st, and what only concerns addresses: cvta, isspacep, fences, hints to caches.
#include <bit>
#include <cstring>

#include "access.h"
#include "builder.h"
#include "machine.h"
#include "memory_modifiers.h"
#include "sync.h"

namespace emulator {
namespace {

// Moves one element of every active lane between a register and memory at host[lane] + byte.
using Move = void (*)(void* values, std::byte* const* host, size_t byte, uint32_t lanes);

struct MemoryOp {
  Address address;
  uint32_t element_bytes, num_bytes, count;
  Order order;
  Reach reach;
  bool counts_local;   // false: parameters of calls, which real code keeps in registers
  bool counts_global;  // false: parameters of the kernel and constants, which come from a cache of their own
  Move move;
};

template <typename F>
inline void for_lanes(uint32_t lanes, F&& f) {
  if (lanes == kAllLanes) {
    for (int i = 0; i < kWarpLanes; i++) f(i);
  } else {
    for (uint32_t rest = lanes; rest; rest &= rest - 1) f(std::countr_zero(rest));
  }
}

// A value of memory into a register that is as wide or wider; T is signed when the sign is to be extended.
template <typename T, typename R>
void load_element(void* values, std::byte* const* host, size_t byte, uint32_t lanes) {
  R* out = static_cast<R*>(values);
  for_lanes(lanes, [&](int i) {
    T value;
    std::memcpy(&value, host[i] + byte, sizeof(T));
    out[i] = static_cast<R>(value);
  });
}

template <typename T, typename R>
void store_element(void* values, std::byte* const* host, size_t byte, uint32_t lanes) {
  const R* in = static_cast<const R*>(values);
  for_lanes(lanes, [&](int i) {
    const T value = static_cast<T>(in[i]);
    std::memcpy(host[i] + byte, &value, sizeof(T));
  });
}

using Wide = unsigned __int128;

template <typename T>
Move choose_move(bool store, uint32_t register_bytes) {
  switch (register_bytes) {
    case 1: return store ? store_element<T, uint8_t> : load_element<T, uint8_t>;
    case 2: return store ? store_element<T, uint16_t> : load_element<T, uint16_t>;
    case 4: return store ? store_element<T, uint32_t> : load_element<T, uint32_t>;
    case 8: return store ? store_element<T, uint64_t> : load_element<T, uint64_t>;
    default: return store ? store_element<T, Wide> : load_element<T, Wide>;
  }
}

Move choose_move(Type type, bool store, uint32_t register_bytes) {
  const bool extends = is_signed(type);
  switch (num_bytes(type)) {
    case 1: return extends ? choose_move<int8_t>(store, register_bytes) : choose_move<uint8_t>(store, register_bytes);
    case 2: return extends ? choose_move<int16_t>(store, register_bytes) : choose_move<uint16_t>(store, register_bytes);
    case 4: return extends ? choose_move<int32_t>(store, register_bytes) : choose_move<uint32_t>(store, register_bytes);
    case 8: return choose_move<uint64_t>(store, register_bytes);
    default: return choose_move<Wide>(store, register_bytes);
  }
}

// Four words of every lane of a full warp, between 16 bytes of memory and four registers.
using Words = uint32_t __attribute__((vector_size(16)));

inline void transpose(Words& a, Words& b, Words& c, Words& d) {
  const Words ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Words cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}

void load_four_words(Warp& warp, const Instruction& in, std::byte* const* host) {
  Words* out[4];
  for (int e = 0; e < 4; e++) out[e] = reinterpret_cast<Words*>(warp.lanes<uint32_t>(in.operands[e]));
  for (int g = 0; g < kWarpLanes / 4; g++) {
    Words w[4];
    for (int i = 0; i < 4; i++) std::memcpy(&w[i], host[4 * g + i], 16);
    transpose(w[0], w[1], w[2], w[3]);
    for (int e = 0; e < 4; e++) out[e][g] = w[e];
  }
}

void store_four_words(Warp& warp, const Instruction& in, std::byte* const* host) {
  const Words* from[4];
  for (int e = 0; e < 4; e++) from[e] = reinterpret_cast<const Words*>(warp.lanes<uint32_t>(in.operands[e]));
  for (int g = 0; g < kWarpLanes / 4; g++) {
    Words w[4];
    for (int e = 0; e < 4; e++) w[e] = from[e][g];
    transpose(w[0], w[1], w[2], w[3]);
    for (int i = 0; i < 4; i++) std::memcpy(host[4 * g + i], &w[i], 16);
  }
}

// ---- ld -------------------------------------------------------------------------------------------------------------

template <bool kFour>
void execute_load(Warp& warp, const Instruction& in) {
  const MemoryOp& op = *static_cast<const MemoryOp*>(in.data);
  Targets to;
  if (!resolve(warp, in, op.address, op.num_bytes, op.num_bytes, "reads", to)) return;
  if (to.shared)
    check_shared(warp, in, op.order == Order::kWeak ? Access::kRead : Access::kAtomicRead, to.shared, to.offset,
                 op.num_bytes, "reads");
  if (Counters* counters = warp.counters()) {
    if (to.global && op.counts_global) counters->global_access(in.pc, to.global, to.address, op.num_bytes, false);
    if (to.shared) counters->shared_access(in.pc, to.shared, to.offset, op.num_bytes, false);
    if (to.local && op.counts_local) counters->local_access(in.pc, to.local, op.num_bytes, false);
  }
  if (to.global && op.counts_global)
    check_global(warp, in, op.order == Order::kWeak ? Access::kRead : Access::kAtomicRead, op.reach, to.global, to,
                 op.num_bytes, "reads");
  const uint32_t lanes = warp.active();
  if (kFour && lanes == kAllLanes) {
    load_four_words(warp, in, to.host);
  } else {
    for (uint32_t e = 0; e < op.count; e++)
      op.move(warp.lanes<std::byte>(in.operands[e]), to.host, e * op.element_bytes, lanes);
  }
  if (to.global && op.order != Order::kWeak) warp.block().note_poll();
  if (op.order != Order::kWeak) order_after(warp, lanes & ~to.local, to.global, to.host, op.order, op.reach);
}

// ld.param of a kernel's parameter by its name: one value for all lanes.
void execute_load_param(Warp& warp, const Instruction& in) {
  const MemoryOp& op = *static_cast<const MemoryOp*>(in.data);
  const uint64_t offset = static_cast<uint64_t>(op.address.offset), size = warp.block().params_bytes();
  if (op.num_bytes > size || offset > size - op.num_bytes) {
    warp.fault(Fault::kOutOfBounds, in, std::countr_zero(warp.active()), [&] {
      return "reads " + bytes_text(op.num_bytes) + " at byte " + std::to_string(offset) + " of parameters that have " +
             bytes_text(size);
    });
    return warp.end_launch();
  }
  std::byte* host[kWarpLanes];
  for (auto& pointer : host) pointer = const_cast<std::byte*>(warp.block().params()) + offset;
  for (uint32_t e = 0; e < op.count; e++)
    op.move(warp.lanes<std::byte>(in.operands[e]), host, e * op.element_bytes, warp.active());
}

// ---- st -------------------------------------------------------------------------------------------------------------

// What a store is about to write, compared with memory.
struct Stored {
  Warp& warp;
  const Instruction& in;
  const MemoryOp& op;
  std::byte* const* host;

  // Bytes [first, last) of the lane's value equal memory.
  bool holds(int lane, uint32_t first, uint32_t last) const {
    std::byte value[64];
    std::byte* out[kWarpLanes];
    out[lane] = value;
    for (uint32_t e = 0; e < op.count; e++)
      op.move(warp.lanes<std::byte>(in.operands[e]), out, e * op.element_bytes, 1u << lane);
    return std::memcmp(value + first, host[lane] + first, last - first) == 0;
  }
};

// After a store by which lanes wrote the same bytes: do all find what they wrote?
void check_overlap(Warp& warp, const Instruction& in, uint32_t lanes, const Targets& to, const Stored& stored) {
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (stored.holds(lane, 0, stored.op.num_bytes)) continue;
    for (uint32_t others = lanes & ~(1u << lane); others; others &= others - 1) {
      const int other = std::countr_zero(others);
      if (to.host[other] >= to.host[lane] + stored.op.num_bytes ||
          to.host[lane] >= to.host[other] + stored.op.num_bytes)
        continue;
      warp.fault(Fault::kWarpRace, in, other, [&] {
        return "writes " + bytes_text(stored.op.num_bytes) + " of " + (to.shared >> lane & 1 ? "shared" : "global") +
               " memory at " + hex(to.address[lane]) + ", where " + thread_name(warp, warp.index(), lane) +
               " writes something else by the same instruction";
      });
      return;
    }
  }
}

bool ascending(const Targets& to, uint32_t num_bytes) {
  if (to.consecutive) return true;
  uint64_t end = 0;
  for (uint32_t rest = to.global; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (to.address[lane] < end) return false;
    end = to.address[lane] + num_bytes;
  }
  return true;
}

template <bool kFour>
void execute_store(Warp& warp, const Instruction& in) {
  const MemoryOp& op = *static_cast<const MemoryOp*>(in.data);
  Targets to;
  if (!resolve(warp, in, op.address, op.num_bytes, op.num_bytes, "writes", to)) return;
  const Stored stored{warp, in, op, to.host};
  const uint32_t lanes = warp.active();
  bool overlap = false;
  if (to.shared) {
    const SameBytes same{[](const void* context, int lane) {
                           const Stored& s = *static_cast<const Stored*>(context);
                           return s.holds(lane, 0, s.op.num_bytes);
                         },
                         &stored};
    overlap = check_shared(warp, in, op.order == Order::kWeak ? Access::kWrite : Access::kAtomicWrite, to.shared,
                           to.offset, op.num_bytes, "writes", &same);
  }
  if (Counters* counters = warp.counters()) {
    if (to.global) counters->global_access(in.pc, to.global, to.address, op.num_bytes, true);
    if (to.shared) counters->shared_access(in.pc, to.shared, to.offset, op.num_bytes, true);
    if (to.local && op.counts_local) counters->local_access(in.pc, to.local, op.num_bytes, true);
  }
  if (to.global) {
    const SameStored same{[](const void* context, int lane, uint32_t first, uint32_t last) {
                            return static_cast<const Stored*>(context)->holds(lane, first, last);
                          },
                          &stored};
    check_global(warp, in, op.order == Order::kWeak ? Access::kWrite : Access::kAtomicWrite, op.reach, to.global, to,
                 op.num_bytes, "writes", &same);
  }
  if (op.order != Order::kWeak)
    order_before(warp, lanes & ~to.local, to.global, to.host, op.order, op.reach, false);
  if (kFour && lanes == kAllLanes) {
    store_four_words(warp, in, to.host);
  } else {
    for (uint32_t e = 0; e < op.count; e++)
      op.move(warp.lanes<std::byte>(in.operands[e]), to.host, e * op.element_bytes, lanes);
  }
  if (overlap) check_overlap(warp, in, to.shared, to, stored);
  const bool plain_global = to.global && op.order == Order::kWeak && warp.block().shadow() != nullptr;
  if (plain_global && !ascending(to, op.num_bytes)) check_overlap(warp, in, to.global, to, stored);
  if (op.order != Order::kWeak) warp.block().note_progress();
}

InstructionClass class_of(Space space, bool store) {
  switch (space) {
    case Space::kShared:
    case Space::kSharedCluster: return store ? InstructionClass::kSharedStore : InstructionClass::kSharedLoad;
    case Space::kLocal: return InstructionClass::kLocal;
    case Space::kParam: return InstructionClass::kParam;
    default: return store ? InstructionClass::kGlobalStore : InstructionClass::kGlobalLoad;
  }
}

void decode_load_or_store(Decoder& decoder, const ptx::Instruction& in, Instruction& out, bool store) {
  Modifiers mods(decoder, in);
  auto op = std::make_shared<MemoryOp>();
  const Space space = take_space(mods);
  if (space == Space::kSharedCluster) decoder.require_architecture(90);
  if (store && space == Space::kConst) decoder.error("constant memory cannot be written");
  op->order = take_order(mods, store ? kStoreOrders : kLoadOrders);
  op->reach = take_reach(mods, false);
  if (store && op->order == Order::kRelease && op->reach != Reach::kBlock) decoder.builder().note_release();
  const bool has_policy = take_cache_hints(mods);
  mods.take("nc");
  const int vector = mods.take_one_of({"v2", "v4", "v8"});
  op->count = vector < 0 ? 1 : 2u << vector;
  const Type type = mods.take_type();
  mods.finish();
  decoder.expect_operands(in, has_policy ? 3 : 2);
  op->element_bytes = num_bytes(type);
  op->num_bytes = op->element_bytes * op->count;
  if (op->num_bytes > 32 || (op->num_bytes == 32 && space != Space::kGlobal && space != Space::kGeneric))
    decoder.error("a lane accesses at most 16 bytes (32 of global memory), not " + std::to_string(op->num_bytes));
  if (op->num_bytes == 32) decoder.require_architecture(100);
  op->address = decoder.address(in.operands[store ? 0 : 1], space);
  op->counts_local = space != Space::kParam;
  op->counts_global = space != Space::kParam && space != Space::kConst;
  uint32_t register_bytes = 0;
  const ptx::Operand& values = in.operands[store ? 1 : 0];
  std::vector<Operand> operands =
      store ? decoder.sources(values, type, &register_bytes) : decoder.destinations(values, type, &register_bytes);
  if (operands.size() != op->count)
    decoder.error("expected " + std::to_string(op->count) + " registers, found " + std::to_string(operands.size()));
  op->move = choose_move(type, store, register_bytes);
  const bool four = op->count == 4 && op->element_bytes == 4 && register_bytes == 4;
  out.cls = class_of(space, store);
  if (!store && op->address.space == Space::kParam && op->address.uniform) {
    out.execute = &execute_load_param;
  } else if (store) {
    if (op->address.space == Space::kParam) decoder.error("parameters of a kernel cannot be written");
    out.execute = four ? &execute_store<true> : &execute_store<false>;
  } else {
    out.execute = four ? &execute_load<true> : &execute_load<false>;
  }
  decoder.set_operands(out, std::move(operands));
  out.data = decoder.keep(op);
}

// ---- addresses ------------------------------------------------------------------------------------------------------

template <typename T>
void execute_add_window(Warp& warp, const Instruction& in) {
  const T* from = warp.lanes<T>(in.operands[1]);
  const T window = static_cast<T>(in.immediate);
  warp.write<T>(in.operands[0], [=](int i) { return static_cast<T>(from[i] + window); });
}

uint64_t window_of(const Decoder& decoder, Space space) {
  switch (space) {
    case Space::kShared: return kSharedWindow;
    case Space::kLocal: return kLocalWindow;
    case Space::kGlobal:
    case Space::kConst:
    case Space::kParam: return 0;
    case Space::kSharedCluster: return kSharedWindow;  // a cluster is one block
    case Space::kGeneric: break;
  }
  decoder.error("expected a state space");
}

void decode_cvta(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  const bool to = mods.take("to");
  const uint64_t window = window_of(decoder, take_space(mods));
  const Type type = mods.take_type();
  mods.finish();
  if (type != Type::kU64 && !(type == Type::kU32 && window == 0)) decoder.error("generic addresses have 64 bits");
  decoder.expect_operands(in, 2);
  out.cls = InstructionClass::kMove;
  out.immediate = static_cast<int64_t>(to ? 0 - window : window);
  out.execute = type == Type::kU64 ? &execute_add_window<uint64_t> : &execute_add_window<uint32_t>;
  decoder.set_operands(out, {decoder.destination(in.operands[0], type), decoder.source(in.operands[1], type)});
}

// immediate: the space. Global is whatever lies in no window and not in the parameters.
void execute_isspacep(Warp& warp, const Instruction& in) {
  const uint64_t* address = warp.lanes<uint64_t>(in.operands[1]);
  const uint64_t params = reinterpret_cast<uint64_t>(warp.block().params()), size = warp.block().params_bytes();
  const Space space = static_cast<Space>(in.immediate);
  warp.write_mask(in.operands[0], [&](int i) {
    const bool is_param = address[i] - params < size;
    switch (space) {
      case Space::kParam: return is_param;
      case Space::kConst: return false;  // the generic address of a constant is that of a global variable
      case Space::kGlobal: return space_of(address[i]) == Space::kGlobal && !is_param;
      default: return space_of(address[i]) == space;
    }
  });
}

void decode_isspacep(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  Space space = take_space(mods);
  if (space == Space::kSharedCluster) space = Space::kShared;
  if (space == Space::kGeneric) decoder.error("expected a state space");
  mods.finish();
  decoder.expect_operands(in, 2);
  out.cls = InstructionClass::kIntAlu;
  out.immediate = static_cast<int64_t>(space);
  out.execute = &execute_isspacep;
  decoder.set_operands(out,
                       {decoder.destination(in.operands[0], Type::kPred), decoder.source(in.operands[1], Type::kU64)});
}

// ---- fences and hints -----------------------------------------------------------------------------------------------

void execute_fence(Warp& warp, const Instruction& in) { fence(warp, static_cast<Reach>(in.immediate)); }
void execute_nothing(Warp&, const Instruction&) {}

void decode_fence(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  decoder.expect_operands(in, 0, 2);
  out.cls = InstructionClass::kFence;
  out.execute = &execute_fence;
  decoder.set_operands(out, {});
  if (mods.take("proxy")) {
    if (mods.take_one_of({"alias", "async", "async::generic"}) < 0) decoder.error("this proxy is not emulated");
    mods.take_one_of({"acquire", "release"});
    mods.take("sync_restrict::shared::cta"), mods.take("sync_restrict::shared::cluster");
    mods.take_one_of({"cta", "cluster"});
    take_space(mods);
    mods.finish();
    out.execute = &execute_nothing;  // the memory of all proxies is one here
    return;
  }
  if (mods.take("mbarrier_init")) {
    decoder.require_architecture(90);
    mods.take("release"), mods.take("cluster");
    mods.finish();
    out.immediate = static_cast<int>(Reach::kBlock);
    return;
  }
  if (in.parts[0] == "membar") {
    const int level = mods.take_one_of({"cta", "gl", "sys"});
    if (level < 0) decoder.error("expected .cta, .gl or .sys");
    out.immediate = level - 1;
  } else {
    mods.take_one_of({"acq_rel", "sc", "acquire", "release"});
    mods.take("sync_restrict::shared::cta"), mods.take("sync_restrict::shared::cluster");
    out.immediate = static_cast<int>(reach_of(take_scope(mods)));
  }
  mods.finish();
  if (out.immediate != static_cast<int>(Reach::kBlock)) decoder.builder().note_release();
}

// Hints to caches: nothing happens. createpolicy gives a policy, which nothing reads.
void decode_hint(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  out.cls = InstructionClass::kOther;
  out.execute = &execute_nothing;
  if (mods.take("tensormap")) decoder.error("tensor maps are not emulated");
  const Space space = take_space(mods);
  take_cache_hints(mods);
  mods.take_one_of({"L1", "L2"});
  mods.finish();
  decoder.expect_operands(in, 1, 2);
  decoder.address(in.operands[0], space);
  decoder.set_operands(out, {});
}

void execute_policy(Warp& warp, const Instruction& in) {
  warp.write<uint64_t>(in.operands[0], [](int) { return uint64_t{0}; });
}

void decode_createpolicy(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  const bool converts = mods.take("cvt");
  if (!converts && mods.take_one_of({"fractional", "range"}) < 0) decoder.error("expected .fractional, .range or .cvt");
  if (converts) mods.take("L2");
  take_space(mods);
  take_cache_hints(mods);
  if (mods.take_type() != Type::kB64) decoder.error("expected .b64");
  mods.finish();
  decoder.expect_operands(in, 1, 4);
  out.cls = InstructionClass::kMove;
  out.execute = &execute_policy;
  decoder.set_operands(out, {decoder.destination(in.operands[0], Type::kB64)});
}

}  // namespace

bool decode_memory(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  const std::string& name = in.parts[0];
  if (name == "ld" || name == "ldu") {
    decode_load_or_store(decoder, in, out, false);
  } else if (name == "st") {
    if (in.parts.size() > 1 && (in.parts[1] == "async" || in.parts[1] == "bulk")) return false;
    decode_load_or_store(decoder, in, out, true);
  } else if (name == "atom" || name == "red") {
    if (in.parts.size() > 1 && in.parts[1] == "async") return false;
    decode_atomic(decoder, in, out);
  } else if (name == "cvta") {
    decode_cvta(decoder, in, out);
  } else if (name == "isspacep") {
    decode_isspacep(decoder, in, out);
  } else if (name == "fence" || name == "membar") {
    decode_fence(decoder, in, out);
  } else if (name == "prefetch" || name == "prefetchu" || name == "discard" || name == "applypriority") {
    decode_hint(decoder, in, out);
  } else if (name == "createpolicy") {
    decode_createpolicy(decoder, in, out);
  } else if (name == "mapa" || name == "getctarank") {
    decoder.error("clusters of blocks are not emulated");
  } else {
    return false;
  }
  return true;
}

}  // namespace emulator
