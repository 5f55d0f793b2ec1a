// SPDX-License-Identifier: Apache-2.0
// What stands between the CUDA runtime and the executor: the kernels that a process has registered, launches held to
// the limits of the emulated GPU, and what is kept of them for whoever asks afterwards. Knows no CUDA header.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "device.h"
#include "emulator.h"
#include "fatbin.h"

namespace emulator {

// How a call ended; the runtime has a cudaError_t for each.
enum class Status : uint8_t {
  kSuccess,
  kInvalidConfiguration,  // sizes of grid or block
  kInvalidValue,
  kOutOfResources,
  kCooperativeTooLarge,
  kInvalidFunction,
  kNoImage,       // no PTX that the architecture runs
  kInvalidImage,  // PTX that cannot be loaded
  kIllegalAddress,
  kMisaligned,
  kAssert,
  kTimeout,  // deadlock, livelock
  kFailure,  // any other fault
};

// A fat binary of a host object, loaded when its first kernel or variable is wanted.
struct Image {
  const void* wrapper = nullptr;
  std::map<int, std::shared_ptr<Module>> modules;  // by architecture
  std::map<int, std::string> failures;             // why there is none
};

struct Kernel {
  Image* image = nullptr;
  std::string name;
  std::optional<uint64_t> max_dynamic_shared;  // bytes that the program opted in to
};

struct LaunchShape {
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  uint64_t dynamic_shared = 0;
  bool cooperative = false;
};

using AccessibleRange = std::tuple<uint64_t, uint64_t, std::string>;  // address, bytes, name

// Memory of the host that kernels may touch as long as this lives.
class Accessible {
 public:
  explicit Accessible(std::vector<AccessibleRange> ranges);
  ~Accessible();
  Accessible(const Accessible&) = delete;
  Accessible& operator=(const Accessible&) = delete;

 private:
  std::vector<AccessibleRange> ranges_;
};

// A launch that has been, with what its counters' instructions are.
struct KeptLaunch {
  LaunchRecord record;
  std::shared_ptr<const Module> module;  // of the function
  const Function* function;
};

class Driver {
 public:
  static Driver& instance();

  Options options() const;
  // Throws Error for what cannot be. Modules are loaded anew for another architecture.
  void configure(const Options& options);
  Device device() const;
  // The PTX of registered images goes through `edit` when it is loaded, which all of it is anew; none: as it is.
  using Edit = std::function<std::string(const std::string& text)>;
  void edit_images(Edit edit);

  // ---- What host objects register
  Image* add_image(const void* wrapper);
  void remove_image(Image* image);
  void add_kernel(Image* image, const void* stub, std::string name);
  void add_variable(Image* image, const void* host, std::string name);
  Kernel* find_kernel(const void* stub) const;  // null when the address is no kernel's
  // Address and size of the module variable behind a host variable; null, and reported, when there is none.
  void* find_variable(const void* host, uint64_t* num_bytes);
  void* find_variable(Image* image, const std::string& name, uint64_t* num_bytes);
  // The kernel, decoded; null, and reported, when it cannot be loaded.
  const Function* load(const Kernel& kernel, Status* status);

  // ---- Launches
  // Whether the emulated GPU takes a launch; if not, `why` says which limit it breaks.
  Status limits(const Function& function, const LaunchShape& shape, uint64_t max_dynamic_shared,
                std::string* why) const;
  Status opt_in(Kernel& kernel, int64_t dynamic_shared);
  // Bytes of dynamic shared memory that a launch may ask for now.
  uint64_t max_dynamic_shared(const Kernel& kernel, const Function& function) const;
  Status launch(const Kernel& kernel, const LaunchShape& shape, void** args);
  // `params` packed as the function wants them; `max_dynamic_shared` is what was opted in to.
  Status launch(const Module& module, const Function& function, const LaunchShape& shape, const std::byte* params,
                uint64_t params_bytes, uint64_t max_dynamic_shared);

  // ---- What is kept
  void report(Report report);
  std::vector<Report> reports() const;
  std::vector<Report> take_reports();
  std::vector<std::shared_ptr<const KeptLaunch>> launches() const;
  std::vector<std::shared_ptr<const KeptLaunch>> take_launches();
  // What nobody took, to the file of EMULATOR_OUTPUT as JSON lines, else reports to standard error.
  void at_exit();

 private:
  struct HostVariable {
    Image* image;
    std::string name;
  };

  Driver();
  std::shared_ptr<Module> module_of(Image* image, Status* status);
  Status refuse(Status status, const std::string& kernel, const std::string& why);

  std::mutex launch_mutex_;   // one launch at a time; these three are taken in this order
  std::mutex load_mutex_;     // the modules of images, and edit_, which may wait for others: not under mutex_
  mutable std::mutex mutex_;  // everything below
  Options options_;
  Edit edit_;
  Device device_;
  std::map<const Image*, std::unique_ptr<Image>> images_;
  std::map<const void*, std::unique_ptr<Kernel>> kernels_;  // by host stub
  std::map<const void*, HostVariable> variables_;           // by host address
  std::vector<Report> reports_;
  std::deque<std::shared_ptr<const KeptLaunch>> launches_;
};

// The fields of a report as a JSON object; `kernel` and `text` escaped.
std::string to_json(const Report& report);
std::string to_json(const KeptLaunch& launch);
// "race: scale.cu:12: scale(float*), block (0, 0, 0), thread (3, 0, 0): ... (4 times)"
std::string describe(const Report& report);
// A mangled name as C++ writes it; others as they are.
std::string demangle(const std::string& name);

}  // namespace emulator
