// SPDX-License-Identifier: Apache-2.0
#include "driver.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "memory.h"
#include "ptx.h"
#include "register_memory.h"

namespace emulator {
namespace {

constexpr size_t kMaxReports = 1000, kMaxLaunches = 10000;  // kept: the first reports, the last launches

// An option of the process from its environment, read once; for programs that call no configure().
int64_t environment_number(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return otherwise;
  char* end = nullptr;
  const int64_t value = std::strtoll(text, &end, 10);
  if (*end != '\0') throw Error(std::string(name) + " must be a number, got " + text);
  return value;
}

const Device& checked_device(const Options& options) {
  const Device* device = find_device(options.architecture);
  if (device == nullptr) {
    throw Error("architecture must be one of " + emulated_architectures() + ", got " +
                std::to_string(options.architecture));
  }
  if (options.threads < 1 || options.threads > 1024) {
    throw Error("threads must be from 1 to 1024, got " + std::to_string(options.threads));
  }
  if (options.max_instructions < 1) throw Error("max_instructions must be at least 1");
  return *device;
}

Status status_of(const LaunchOutcome& outcome) {
  if (outcome.reports.empty()) return outcome.completed ? Status::kSuccess : Status::kFailure;
  const Report& first = outcome.reports.front();
  switch (first.fault) {
    case Fault::kOutOfBounds: return Status::kIllegalAddress;
    case Fault::kMisaligned: return Status::kMisaligned;
    case Fault::kDeadlock:
    case Fault::kLivelock: return Status::kTimeout;
    case Fault::kTrap: return first.text.find("ssert") != std::string::npos ? Status::kAssert : Status::kFailure;
    default: return Status::kFailure;
  }
}

std::string sizes(const uint32_t (&dim)[3]) {
  return std::to_string(dim[0]) + " x " + std::to_string(dim[1]) + " x " + std::to_string(dim[2]);
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      result += '\\';
      result += c;
    } else if (static_cast<unsigned char>(c) < ' ') {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      result += escaped;
    } else {
      result += c;
    }
  }
  return result + '"';
}

void leave() { Driver::instance().at_exit(); }

}  // namespace

Accessible::Accessible(std::vector<AccessibleRange> ranges) : ranges_(std::move(ranges)) {
  for (const auto& [address, num_bytes, name] : ranges_) {
    device_memory().add(reinterpret_cast<const void*>(address), num_bytes, name);
  }
}

Accessible::~Accessible() {
  for (const auto& [address, num_bytes, name] : ranges_) {
    device_memory().remove(reinterpret_cast<const void*>(address), num_bytes);
  }
}

// ---- Options --------------------------------------------------------------------------------------------------------

Driver& Driver::instance() {
  static auto* const driver = new Driver;  // never destroyed: objects unregister themselves when the process ends
  return *driver;
}

Driver::Driver() : device_(find_device(options_.architecture)) {
  device_memory();  // made before what is registered here and by the first host object, so that it outlives both
  std::atexit(leave);
  try {
    Options options;
    options.architecture = static_cast<int>(environment_number("EMULATOR_ARCHITECTURE", options.architecture));
    options.checks = environment_number("EMULATOR_CHECKS", options.checks) != 0;
    options.counters = environment_number("EMULATOR_COUNTERS", options.counters) != 0;
    options.threads = static_cast<int>(environment_number("EMULATOR_THREADS", options.threads));
    options.max_instructions = static_cast<uint64_t>(
        environment_number("EMULATOR_MAX_INSTRUCTIONS", static_cast<int64_t>(options.max_instructions)));
    configure(options);
  } catch (const Error& error) {
    refuse(Status::kInvalidValue, "", error.what());
  }
}

Options Driver::options() const {
  const std::lock_guard lock(mutex_);
  return options_;
}

void Driver::configure(const Options& options) {
  const Device& device = checked_device(options);
  const std::lock_guard lock(mutex_);
  options_ = options;
  device_ = &device;
}

void Driver::edit_images(Edit edit) {
  const std::lock_guard launches(launch_mutex_);
  const std::lock_guard loading(load_mutex_);
  const std::lock_guard lock(mutex_);
  edit_ = std::move(edit);
  for (auto& [address, image] : images_) {
    image->modules.clear();
    image->failures.clear();
  }
}

const Device& Driver::device() const {
  const std::lock_guard lock(mutex_);
  return *device_;
}

// ---- What host objects register -------------------------------------------------------------------------------------

Image* Driver::add_image(const void* wrapper) {
  const std::lock_guard lock(mutex_);
  auto image = std::make_unique<Image>();
  image->wrapper = wrapper;
  Image* const result = image.get();
  images_[result] = std::move(image);
  return result;
}

void Driver::remove_image(Image* image) {
  const std::lock_guard launches(launch_mutex_);
  const std::lock_guard loading(load_mutex_);
  const std::lock_guard lock(mutex_);
  std::erase_if(kernels_, [&](const auto& entry) { return entry.second->image == image; });
  std::erase_if(variables_, [&](const auto& entry) { return entry.second.image == image; });
  images_.erase(image);
}

void Driver::add_kernel(Image* image, const void* stub, std::string name) {
  const std::lock_guard lock(mutex_);
  auto kernel = std::make_unique<Kernel>();
  kernel->image = image;
  kernel->name = std::move(name);
  kernels_[stub] = std::move(kernel);
}

void Driver::add_variable(Image* image, const void* host, std::string name) {
  const std::lock_guard lock(mutex_);
  variables_[host] = HostVariable{image, std::move(name)};
}

Kernel* Driver::find_kernel(const void* stub) const {
  const std::lock_guard lock(mutex_);
  const auto found = kernels_.find(stub);
  if (found != kernels_.end()) return found->second.get();
  // A cudaKernel_t, which __cudaGetKernel makes of a stub, is the Kernel itself.
  const auto is_kernel = [&](const auto& entry) { return entry.second.get() == stub; };
  const auto kernel = std::find_if(kernels_.begin(), kernels_.end(), is_kernel);
  return kernel == kernels_.end() ? nullptr : kernel->second.get();
}

std::shared_ptr<Module> Driver::module_of(Image* image, Status* status) {
  const std::lock_guard loading(load_mutex_);
  const Options options = this->options();
  const int architecture = options.architecture;
  if (const auto found = image->modules.find(architecture); found != image->modules.end()) return found->second;
  *status = Status::kNoImage;
  try {
    if (const auto failed = image->failures.find(architecture); failed != image->failures.end()) {
      throw Error(failed->second);
    }
    const FatBinary binary = read_registered(image->wrapper);
    const PtxText& text = choose(binary, architecture);
    *status = Status::kInvalidImage;
    return image->modules[architecture] = Module::parse(edit_ ? edit_(text.text) : text.text, text.target, options);
  } catch (const Error& error) {
    image->failures[architecture] = error.what();
    throw;
  }
}

void* Driver::find_variable(Image* image, const std::string& name, uint64_t* num_bytes) {
  Status status = Status::kSuccess;
  try {
    void* const data = module_of(image, &status)->symbol(name, num_bytes);
    if (data == nullptr) refuse(Status::kInvalidImage, "", "the PTX holds no variable " + name);
    return data;
  } catch (const Error& error) {
    refuse(status, "", error.what());
    return nullptr;
  }
}

void* Driver::find_variable(const void* host, uint64_t* num_bytes) {
  std::optional<HostVariable> variable;
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = variables_.find(host); found != variables_.end()) variable = found->second;
  }
  return variable ? find_variable(variable->image, variable->name, num_bytes) : nullptr;
}

const Function* Driver::load(const Kernel& kernel, Status* status) {
  *status = Status::kSuccess;
  try {
    const std::shared_ptr<Module> module = module_of(kernel.image, status);
    *status = Status::kInvalidImage;
    const Function* const function = module->find(kernel.name);
    if (function == nullptr) throw Error("the PTX for " + module->syntax().target + " holds no such kernel");
    *status = Status::kSuccess;
    return function;
  } catch (const Error& error) {
    refuse(*status, kernel.name, error.what());
    return nullptr;
  }
}

// ---- Launches -------------------------------------------------------------------------------------------------------

Status Driver::limits(const Function& function, const LaunchShape& shape, uint64_t max_dynamic_shared,
                      std::string* why) const {
  const FunctionInfo& info = function.info();
  const Device& gpu = device();
  const uint64_t num_threads = uint64_t{shape.block[0]} * shape.block[1] * shape.block[2];
  for (int i = 0; i < 3; ++i) {
    if (shape.grid[i] < 1 || shape.grid[i] > kMaxGridDim[i]) {
      *why = "a grid of " + sizes(shape.grid) + " blocks; there may be 1 to " + std::to_string(kMaxGridDim[0]) +
             " in x, 1 to " + std::to_string(kMaxGridDim[1]) + " in y and z";
      return Status::kInvalidConfiguration;
    }
    if (shape.block[i] < 1 || shape.block[i] > kMaxBlockDim[i] || num_threads > kMaxThreads) {
      *why =
          "blocks of " + sizes(shape.block) + " threads; there may be 1 to 1024 in x and y, 1 to 64 in z, 1024 in all";
      return Status::kInvalidConfiguration;
    }
  }
  if (info.max_threads != 0 && num_threads > info.max_threads) {
    *why = "blocks of " + std::to_string(num_threads) + " threads; the launch bounds of the kernel allow " +
           std::to_string(info.max_threads);
    return Status::kOutOfResources;
  }
  if (info.required_threads[0] != 0 && !std::equal(shape.block, shape.block + 3, info.required_threads)) {
    *why = "blocks of " + sizes(shape.block) + " threads; the kernel is for " + sizes(info.required_threads);
    return Status::kInvalidValue;
  }
  if (info.static_smem > static_cast<uint32_t>(kSharedWithoutOptIn)) {
    *why = std::to_string(info.static_smem) + " bytes of static shared memory, more than a block may have";
    return Status::kInvalidImage;
  }
  if (shape.dynamic_shared > max_dynamic_shared) {
    *why = std::to_string(shape.dynamic_shared) + " bytes of dynamic shared memory beside " +
           std::to_string(info.static_smem) + " static ones; without cudaFuncSetAttribute a block has " +
           std::to_string(kSharedWithoutOptIn) + " in all, with it up to " + std::to_string(gpu.shared_per_block) +
           " on sm_" + std::to_string(gpu.architecture);
    return Status::kInvalidValue;
  }
  if (shape.cooperative) {
    // The registers of a thread are ptxas's choice, which PTX does not tell: they limit nothing here.
    const int resident =
        resident_blocks(gpu, static_cast<int>(num_threads), 1, info.static_smem + shape.dynamic_shared);
    const uint64_t num_blocks = uint64_t{shape.grid[0]} * shape.grid[1] * shape.grid[2];
    if (num_blocks > static_cast<uint64_t>(resident) * gpu.num_sms) {
      *why = "a cooperative launch of " + std::to_string(num_blocks) + " blocks; " +
             std::to_string(resident * gpu.num_sms) + " are resident at a time";
      return Status::kCooperativeTooLarge;
    }
  }
  return Status::kSuccess;
}

Status Driver::opt_in(Kernel& kernel, int64_t dynamic_shared) {
  Status status = Status::kSuccess;
  const Function* function = load(kernel, &status);
  if (function == nullptr) return status;
  if (dynamic_shared < 0 || dynamic_shared + function->info().static_smem > device().shared_per_block) {
    return Status::kInvalidValue;
  }
  const std::lock_guard lock(mutex_);
  kernel.max_dynamic_shared = dynamic_shared;
  return Status::kSuccess;
}

Status Driver::launch(const Kernel& kernel, const LaunchShape& shape, void** args) {
  Status status = Status::kSuccess;
  const Function* function = load(kernel, &status);
  if (function == nullptr) return status;
  const FunctionInfo& info = function->info();
  std::vector<std::byte> params(info.params_bytes);
  for (size_t i = 0; i < info.params.size(); ++i) {
    std::memcpy(params.data() + info.params[i].offset, args[i], info.params[i].num_bytes);
  }
  const std::shared_ptr<Module> module = module_of(kernel.image, &status);
  return launch(*module, *function, shape, params.data(), params.size(), max_dynamic_shared(kernel, *function));
}

uint64_t Driver::max_dynamic_shared(const Kernel& kernel, const Function& function) const {
  const std::lock_guard lock(mutex_);
  const uint64_t static_smem = std::min<uint64_t>(function.info().static_smem, kSharedWithoutOptIn);
  return kernel.max_dynamic_shared.value_or(kSharedWithoutOptIn - static_smem);
}

Status Driver::launch(const Module& module, const Function& function, const LaunchShape& shape, const std::byte* params,
                      uint64_t params_bytes, uint64_t max_dynamic_shared) {
  const std::string& name = function.info().name;
  std::string why;
  const Status refused = limits(function, shape, max_dynamic_shared, &why);
  if (refused != Status::kSuccess) return refuse(refused, name, why);

  Launch launch;
  std::copy_n(shape.grid, 3, launch.grid);
  std::copy_n(shape.block, 3, launch.block);
  launch.dynamic_smem = static_cast<uint32_t>(shape.dynamic_shared);
  launch.params = params;
  launch.params_bytes = params_bytes;
  // Where cooperative groups let the blocks of a grid wait: the size of this, and a counter.
  uint32_t workspace[2] = {sizeof workspace, 0};
  std::optional<Accessible> accessible;
  if (shape.cooperative) {
    launch.grid_workspace = reinterpret_cast<uint64_t>(workspace);
    accessible.emplace(std::vector<AccessibleRange>{
        {launch.grid_workspace, sizeof workspace, "the workspace of a cooperative launch"}});
  }
  LaunchOutcome outcome;
  try {
    const std::lock_guard one_at_a_time(launch_mutex_);
    outcome = emulator::launch(module, function, launch, options());
  } catch (const Error& error) {
    return refuse(Status::kInvalidValue, name, error.what());
  }
  std::fflush(stdout);  // of the kernel's printf: whoever reads the output through a file descriptor sees it now
  const Status status = status_of(outcome);
  for (Report& report : outcome.reports) this->report(std::move(report));
  const std::lock_guard lock(mutex_);
  launches_.push_back(
      std::make_shared<const KeptLaunch>(std::move(outcome.record), module.shared_from_this(), &function));
  if (launches_.size() > kMaxLaunches) launches_.pop_front();
  return status;
}

// ---- What is kept ---------------------------------------------------------------------------------------------------

Status Driver::refuse(Status status, const std::string& kernel, const std::string& why) {
  Report refused;
  refused.fault = Fault::kLaunch;
  refused.kernel = kernel;
  refused.text = why;
  report(std::move(refused));
  return status;
}

void Driver::report(Report report) {
  const std::lock_guard lock(mutex_);
  const auto same = std::find_if(reports_.begin(), reports_.end(), [&](const Report& known) {
    return known.fault == report.fault && known.kernel == report.kernel && known.where.line == report.where.line &&
           known.where.file == report.where.file && known.text == report.text;
  });
  if (same != reports_.end()) same->count += report.count;
  else if (reports_.size() < kMaxReports) reports_.push_back(std::move(report));
}

std::vector<Report> Driver::reports() const {
  const std::lock_guard lock(mutex_);
  return reports_;
}

std::vector<Report> Driver::take_reports() {
  const std::lock_guard lock(mutex_);
  return std::exchange(reports_, {});
}

std::vector<std::shared_ptr<const KeptLaunch>> Driver::launches() const {
  const std::lock_guard lock(mutex_);
  return {launches_.begin(), launches_.end()};
}

std::vector<std::shared_ptr<const KeptLaunch>> Driver::take_launches() {
  const std::lock_guard lock(mutex_);
  const auto taken = std::exchange(launches_, {});
  return {taken.begin(), taken.end()};
}

void Driver::at_exit() {
  const std::vector<Report> reports = take_reports();
  const auto launches = take_launches();
  if (const char* path = std::getenv("EMULATOR_OUTPUT"); path != nullptr && *path != '\0') {
    std::ofstream file(path, std::ios::app);
    for (const Report& report : reports) file << "{\"report\": " << to_json(report) << "}\n";
    for (const auto& launch : launches) file << "{\"launch\": " << to_json(*launch) << "}\n";
    return;
  }
  for (const Report& report : reports) std::fprintf(stderr, "emulator: %s\n", describe(report).c_str());
}

std::string demangle(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status),
                                                    std::free);
  return text != nullptr ? text.get() : name;
}

std::string describe(const Report& report) {
  std::string result = name_of(report.fault);
  result += ": ";
  if (report.where.line != 0) result += report.where.file + ":" + std::to_string(report.where.line) + ": ";
  if (!report.kernel.empty()) result += demangle(report.kernel) + ", ";
  if (!report.kernel.empty() && report.fault != Fault::kLaunch) {
    const auto place = [](const uint32_t (&at)[3]) {
      return "(" + std::to_string(at[0]) + ", " + std::to_string(at[1]) + ", " + std::to_string(at[2]) + ")";
    };
    result += "block " + place(report.block) + ", thread " + place(report.thread) + ": ";
  }
  result += report.text;
  if (report.count > 1) result += " (" + std::to_string(report.count) + " times)";
  return result;
}

std::string to_json(const KeptLaunch& launch) {
  LaunchRecord record = launch.record;
  record.kernel = demangle(record.kernel);
  return to_json(record, [&](uint32_t pc) { return launch.function->source_line(pc); });
}

std::string to_json(const Report& report) {
  const auto place = [](const uint32_t (&at)[3]) {
    return "[" + std::to_string(at[0]) + ", " + std::to_string(at[1]) + ", " + std::to_string(at[2]) + "]";
  };
  return "{\"fault\": " + quoted(name_of(report.fault)) + ", \"kernel\": " + quoted(demangle(report.kernel)) +
         ", \"file\": " + quoted(report.where.file) + ", \"line\": " + std::to_string(report.where.line) +
         ", \"block\": " + place(report.block) + ", \"thread\": " + place(report.thread) +
         ", \"text\": " + quoted(report.text) + ", \"count\": " + std::to_string(report.count) +
         ", \"message\": " + quoted(describe(report)) + "}";
}

}  // namespace emulator

extern "C" {

void emulator_register_memory(const void* begin, uint64_t num_bytes, const char* name) {
  emulator::device_memory().add(begin, num_bytes, name == nullptr ? "memory" : name);
}

void emulator_unregister_memory(const void* begin, uint64_t num_bytes) {
  emulator::device_memory().remove(begin, num_bytes);
}

void emulator_register_peer_memory(const void* begin, uint64_t num_bytes) {
  emulator::peer_memory().add(begin, num_bytes, "memory of peers");
}

void emulator_unregister_peer_memory(const void* begin, uint64_t num_bytes) {
  emulator::peer_memory().remove(begin, num_bytes);
}

}  // extern "C"
