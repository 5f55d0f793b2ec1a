// SPDX-License-Identifier: Apache-2.0
// counters_json.cpp: one launch as JSON, for Python. Its keys are stable: baselines are compared by them.

#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <utility>

#include "counters.h"
#include "estimate.h"

namespace emulator {
namespace {

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      result += escaped;
    } else {
      result += c;
    }
  }
  return result + '"';
}

// An object whose members are added one by one; `text` is what has been written of it.
class Object {
 public:
  Object& add(const char* key, const std::string& value) {
    text_.append(text_.empty() ? "{\"" : ", \"").append(key).append("\": ").append(value);
    return *this;
  }
  Object& add(const char* key, uint64_t value) { return add(key, std::to_string(value)); }
  std::string text() const { return text_.empty() ? "{}" : text_ + '}'; }

 private:
  std::string text_;
};

std::string decimal(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f", value);
  return text;
}

std::string triple(const uint32_t (&values)[3]) {
  char text[64];
  std::snprintf(text, sizeof text, "[%u, %u, %u]", values[0], values[1], values[2]);
  return text;
}

// "scale<float, 4>" of a kernel's mangled or demangled name: without result, parameters and anonymous namespaces.
std::string short_name(std::string name) {
  if (name.starts_with("_Z")) {  // others are no mangled names, although "a" would be one of a type
    int status = 0;
    const std::unique_ptr<char, decltype(&std::free)> demangled(
        abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status), &std::free);
    if (status != 0) return name;
    name = demangled.get();
  }
  const std::string anonymous = "(anonymous namespace)::", no_result = "void ";
  for (size_t at; (at = name.find(anonymous)) != std::string::npos;) name.erase(at, anonymous.size());
  if (name.starts_with(no_result)) name.erase(0, no_result.size());
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

std::string lines_json(const Counters& counters, const std::function<SourceLine(uint32_t)>& line_of) {
  std::map<std::pair<std::string, int>, PcCounts> by_line;
  const std::vector<PcCounts>& by_pc = counters.by_pc();
  for (uint32_t pc = 0; pc < by_pc.size(); ++pc) {
    if (by_pc[pc].warps == 0) continue;
    const SourceLine where = line_of ? line_of(pc) : SourceLine{};
    by_line[{where.file, where.line}].add(by_pc[pc]);
  }
  std::string result = "[";
  for (const auto& [where, counts] : by_line) {
    Object line;
    line.add("file", quoted(where.first)).add("line", std::to_string(where.second));
    line.add("warp_instructions", counts.warps).add("lanes", counts.lanes).add("mma_flops", counts.mma_flops);
    line.add("sectors", counts.sectors).add("ideal_sectors", counts.ideal_sectors);
    line.add("wavefronts", counts.wavefronts).add("ideal_wavefronts", counts.ideal_wavefronts);
    result.append(result.size() == 1 ? "" : ", ").append(line.text());
  }
  return result + ']';
}

std::string estimates_json(const Totals& totals) {
  Object result;
  for (const GpuRates& gpu : known_gpus()) {
    const Estimate of_gpu = estimate(totals, gpu);
    Object cycles;
    for (int unit = 0; unit < kNumUnits; ++unit) {
      cycles.add(name_of(static_cast<Unit>(unit)), decimal(of_gpu.cycles[static_cast<size_t>(unit)]));
    }
    Object entry;
    entry.add("sms", std::to_string(gpu.num_sms)).add("clock_ghz", decimal(gpu.clock_ghz));
    entry.add("cycles", cycles.text()).add("binds", quoted(name_of(of_gpu.binds())));
    result.add(gpu.name, entry.text());
  }
  return result.text();
}

}  // namespace

std::string to_json(const LaunchRecord& record, const std::function<SourceLine(uint32_t pc)>& line_of) {
  const Totals totals = record.counters.totals();
  Object sums, classes, result;
  for (const auto& [name, field] : kTotalFields) sums.add(name, totals.*field);
  for (int c = 0; c < kNumClasses; ++c) {
    const auto instruction_class = static_cast<InstructionClass>(c);
    classes.add(name_of(instruction_class), totals.of(instruction_class));
  }
  result.add("kernel", quoted(record.kernel)).add("name", quoted(short_name(record.kernel)));
  result.add("grid", triple(record.grid)).add("block", triple(record.block));
  result.add("static_smem", record.static_smem).add("dynamic_smem", record.dynamic_smem);
  result.add("registers", std::to_string(record.registers));
  result.add("totals", sums.text()).add("classes", classes.text());
  result.add("lines", lines_json(record.counters, line_of)).add("estimates", estimates_json(totals));
  return result.text();
}

}  // namespace emulator
