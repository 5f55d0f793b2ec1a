// SPDX-License-Identifier: Apache-2.0
// The functions that CUDA's device runtime brings and no PTX defines: vprintf, __assertfail, malloc, free.
#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "execute_control.h"
#include "machine.h"
#include "memory.h"

namespace emulator {
namespace {

constexpr size_t kMaxText = 1 << 16;  // of a format or a string argument

template <typename T>
T argument(Warp& warp, const CallSite& site, size_t i, int lane) {
  T value{};
  const ParamSlot& slot = site.arguments[i];
  size_t bytes = std::min<size_t>(sizeof value, slot.num_bytes);
  if (slot.in_register)
    std::memcpy(&value, warp.lanes<std::byte>(slot.reg) + static_cast<size_t>(lane) * slot.num_bytes, bytes);
  else std::memcpy(&value, warp.local(lane) + warp.frame().local_base + slot.local_offset, bytes);
  return value;
}

template <typename T>
void set_result(Warp& warp, const CallSite& site, int lane, T value) {
  if (site.results.empty()) return;
  const ParamSlot& slot = site.results[0];
  size_t bytes = std::min<size_t>(sizeof value, slot.num_bytes);
  if (slot.in_register)
    std::memcpy(warp.lanes<std::byte>(slot.reg) + static_cast<size_t>(lane) * slot.num_bytes, &value, bytes);
  else std::memcpy(warp.local(lane) + warp.frame().local_base + slot.local_offset, &value, bytes);
}

// Where a generic address leads, null when it leads nowhere.
const std::byte* find_memory(Warp& warp, int lane, uint64_t address, uint32_t num_bytes) {
  uint64_t offset = address & ~kWindowMask;
  switch (space_of(address)) {
    case Space::kShared:
      return offset + num_bytes <= warp.block().shared_bytes() ? warp.block().shared() + offset : nullptr;
    case Space::kLocal: return offset + num_bytes <= warp.local_bytes() ? warp.local(lane) + offset : nullptr;
    default:
      return device_memory().contains(address, num_bytes) ? reinterpret_cast<const std::byte*>(address) : nullptr;
  }
}

bool read_string(Warp& warp, int lane, uint64_t address, std::string& out) {
  out.clear();
  while (out.size() < kMaxText) {
    const std::byte* byte = find_memory(warp, lane, address + out.size(), 1);
    if (!byte) return false;
    if (*byte == std::byte{0}) return true;
    out += static_cast<char>(*byte);
  }
  return true;
}

// ---- printf ---------------------------------------------------------------------------------------------------------
class Formatter {
 public:
  Formatter(Warp& warp, int lane, uint64_t arguments) : warp_(warp), lane_(lane), address_(arguments) {}

  // False: an argument or a string cannot be read.
  bool run(const std::string& format, std::string& out) {
    for (size_t i = 0; i < format.size(); i++) {
      if (format[i] != '%') {
        out += format[i];
        continue;
      }
      if (i + 1 < format.size() && format[i + 1] == '%') {
        out += format[++i];
        continue;
      }
      if (!conversion(format, i, out)) return false;
    }
    return true;
  }
  int count() const { return count_; }

 private:
  template <typename T>
  bool next(T& value) {
    address_ = (address_ + sizeof(T) - 1) / sizeof(T) * sizeof(T);
    const std::byte* from = find_memory(warp_, lane_, address_, sizeof(T));
    if (!from) return false;
    std::memcpy(&value, from, sizeof(T));
    address_ += sizeof(T);
    return true;
  }

  bool star(std::string& spec) {
    int32_t value;
    if (!next(value)) return false;
    spec += std::to_string(std::clamp(value, -10000, 10000));
    return true;
  }

  // format[i] is '%'; leaves i at the last character of the conversion.
  bool conversion(const std::string& format, size_t& i, std::string& out) {
    size_t begin = i++;
    std::string spec = "%", width;
    auto digits = [&] {
      std::string number;
      while (i < format.size() && format[i] >= '0' && format[i] <= '9') number += format[i++];
      spec += number.substr(0, 4);  // wider ones are no use, and snprintf would have to allocate them
    };
    while (i < format.size() && std::strchr("-+ #0", format[i])) spec += format[i++];
    if (i < format.size() && format[i] == '*') {
      i++;
      if (!star(spec)) return false;
    } else {
      digits();
    }
    if (i < format.size() && format[i] == '.') {
      spec += format[i++];
      if (i < format.size() && format[i] == '*') {
        i++;
        if (!star(spec)) return false;
      } else {
        digits();
      }
    }
    while (i < format.size() && std::strchr("hlLqjzt", format[i])) width += format[i++];
    if (i >= format.size()) {
      out += format.substr(begin);
      return true;
    }
    char kind = format[i];
    bool wide = width.starts_with("l") || width == "j" || width == "z" || width == "t" || width == "q";
    if (std::strchr("diouxX", kind)) return integer(spec, kind, width, wide, out);
    if (std::strchr("fFeEgGaA", kind)) {
      double value;
      return next(value) && put(spec + kind, value, out);
    }
    if (kind == 'c') {
      int32_t value;
      return next(value) && put(spec + kind, value, out);
    }
    if (kind == 'p') {
      uint64_t value;
      return next(value) && put(spec + kind, reinterpret_cast<void*>(value), out);
    }
    if (kind == 's') {
      uint64_t value;
      std::string text;
      return next(value) && read_string(warp_, lane_, value, text) && put(spec + kind, text.c_str(), out);
    }
    out += format.substr(begin, i + 1 - begin);  // no conversion that CUDA knows: as it stands
    return true;
  }

  bool integer(const std::string& spec, char kind, const std::string& width, bool wide, std::string& out) {
    if (wide) {
      int64_t value;
      return next(value) && put(spec + "ll" + kind, static_cast<long long>(value), out);
    }
    int32_t value;
    if (!next(value)) return false;
    return put(spec + (width.starts_with("h") ? width : "") + kind, value, out);
  }

  template <typename T>
  bool put(const std::string& spec, T value, std::string& out) {
    count_++;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    int length = std::snprintf(nullptr, 0, spec.c_str(), value);
    if (length < 0) return true;
    std::string text(static_cast<size_t>(length) + 1, '\0');
    std::snprintf(text.data(), text.size(), spec.c_str(), value);
#pragma GCC diagnostic pop
    text.pop_back();
    out += text;
    return true;
  }

  Warp& warp_;
  int lane_;
  uint64_t address_;
  int count_ = 0;
};

void run_vprintf(Warp& warp, const Instruction& in, const CallSite& site) {
  std::string format, out;
  warp.for_each([&](int lane) {
    uint64_t arguments = argument<uint64_t>(warp, site, 1, lane);
    Formatter formatter(warp, lane, arguments);
    bool read = read_string(warp, lane, argument<uint64_t>(warp, site, 0, lane), format);
    if (!read || !formatter.run(format, out)) {
      warp.fault(Fault::kOutOfBounds, in, lane,
                 [] { return std::string("printf of a format or an argument that cannot be read"); });
      set_result(warp, site, lane, int32_t{-1});
      return;
    }
    set_result(warp, site, lane, static_cast<int32_t>(formatter.count()));
  });
  std::fwrite(out.data(), 1, out.size(), stdout);
  std::fflush(stdout);
}

// __assertfail(message, file, line, function, size of a character)
void run_assertfail(Warp& warp, const Instruction& in, const CallSite& site) {
  int lane = std::countr_zero(warp.active());
  warp.fault(Fault::kTrap, in, lane, [&] {
    std::string message, file, function;
    read_string(warp, lane, argument<uint64_t>(warp, site, 0, lane), message);
    read_string(warp, lane, argument<uint64_t>(warp, site, 1, lane), file);
    read_string(warp, lane, argument<uint64_t>(warp, site, 3, lane), function);
    return file + ":" + std::to_string(argument<uint32_t>(warp, site, 2, lane)) + ": " + function + ": assertion `" +
           message + "` failed";
  });
  warp.end_launch();
}

// ---- the heap of the device -----------------------------------------------------------------------------------------
struct Heap {
  std::mutex mutex;
  struct Block {
    std::unique_ptr<std::byte[]> storage;
    uint64_t num_bytes;
  };
  std::unordered_map<uint64_t, Block> blocks;
  uint64_t num_bytes = 0;
};
constexpr uint64_t kHeapBytes = 1ull << 30;
constexpr int kFresh = 0xff;  // as of other new memory of the device

Heap& heap() {
  static Heap& the_heap = *new Heap;  // outlives every module
  return the_heap;
}

void run_malloc(Warp& warp, const Instruction&, const CallSite& site) {
  warp.for_each([&](int lane) {
    uint64_t size = argument<uint64_t>(warp, site, 0, lane), address = 0;
    Heap& all = heap();
    std::lock_guard lock(all.mutex);
    if (size > 0 && size <= kHeapBytes - all.num_bytes) {
      auto storage = std::make_unique_for_overwrite<std::byte[]>(size + 16);  // aligned to 16, as CUDA's malloc does
      std::memset(storage.get(), kFresh, size);
      address = reinterpret_cast<uint64_t>(storage.get());
      if (GlobalShadow* shadow = warp.block().global_shadow()) shadow->forget(address, size);
      device_memory().add(storage.get(), size, "an allocation of malloc in a kernel");
      all.blocks.emplace(address, Heap::Block{std::move(storage), size});
      all.num_bytes += size;
    }
    set_result(warp, site, lane, address);
  });
}

void run_free(Warp& warp, const Instruction& in, const CallSite& site) {
  warp.for_each([&](int lane) {
    uint64_t address = argument<uint64_t>(warp, site, 0, lane);
    if (address == 0) return;
    Heap& all = heap();
    std::lock_guard lock(all.mutex);
    auto block = all.blocks.find(address);
    if (block == all.blocks.end()) {
      warp.fault(Fault::kOutOfBounds, in, lane,
                 [] { return std::string("free of what malloc has not given, or twice"); });
      return;
    }
    device_memory().remove(block->second.storage.get(), block->second.num_bytes);
    all.num_bytes -= block->second.num_bytes;
    all.blocks.erase(block);
  });
}

struct BuiltinName {
  std::string_view name;
  size_t arguments;
  Builtin run;
};
constexpr BuiltinName kBuiltins[] = {
    {"vprintf", 2, run_vprintf}, {"__assertfail", 5, run_assertfail}, {"malloc", 1, run_malloc}, {"free", 1, run_free}};

}  // namespace

Builtin find_builtin(const std::string& name, size_t num_arguments) {
  for (const BuiltinName& builtin : kBuiltins)
    if (builtin.name == name && builtin.arguments == num_arguments) return builtin.run;
  return nullptr;
}

}  // namespace emulator
