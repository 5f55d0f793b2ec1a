// SPDX-License-Identifier: Apache-2.0
// python_counters.cpp: the counters as Python objects, so that tests can feed them patterns of their own.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "counters.h"
#include "estimate.h"

namespace py = pybind11;

namespace emulator {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
const T* checked(const Array<T>& array, py::ssize_t num_elements) {
  if (array.ndim() != 1 || array.size() != num_elements) {
    throw std::invalid_argument("addresses must be an array of " + std::to_string(num_elements));
  }
  return array.data();
}

py::dict totals_dict(const Counters& counters) {
  const Totals totals = counters.totals();
  py::dict result, classes;
  for (const auto& [name, field] : kTotalFields) result[name] = totals.*field;
  for (int c = 0; c < kNumClasses; ++c) {
    const auto instruction_class = static_cast<InstructionClass>(c);
    classes[name_of(instruction_class)] = totals.of(instruction_class);
  }
  result["classes"] = classes;
  return result;
}

// A launch of which only the counters are known; the source line of an instruction is its pc.
std::string json_of(const Counters& counters, const std::string& kernel) {
  LaunchRecord record;
  record.kernel = kernel;
  record.counters = counters;
  return to_json(record, [](uint32_t pc) { return SourceLine{"test.cu", static_cast<int>(pc)}; });
}

InstructionClass class_named(const std::string& name) {
  for (int c = 0; c < kNumClasses; ++c) {
    if (name == name_of(static_cast<InstructionClass>(c))) return static_cast<InstructionClass>(c);
  }
  throw std::invalid_argument("there is no instruction class " + name);
}

}  // namespace

void bind_counters(py::module_& module) {
  constexpr int kWarp = 32, kRowsPerMatrix = 8;
  py::class_<Counters>(module, "Counters", "Counters of one launch; addresses are arrays of 32 lanes.")
      .def(py::init<>())
      .def("instruction", [](Counters& self, const std::string& instruction_class, uint32_t pc,
                             uint32_t lanes) { self.instruction(class_named(instruction_class), pc, lanes); })
      .def("mma", &Counters::mma)
      .def("global_access",
           [](Counters& self, uint32_t pc, uint32_t lanes, const Array<uint64_t>& address, uint32_t num_bytes,
              bool write) { self.global_access(pc, lanes, checked(address, kWarp), num_bytes, write); })
      .def("shared_access",
           [](Counters& self, uint32_t pc, uint32_t lanes, const Array<uint32_t>& address, uint32_t num_bytes,
              bool write) { self.shared_access(pc, lanes, checked(address, kWarp), num_bytes, write); })
      .def("matrix_access",
           [](Counters& self, uint32_t pc, int num_matrices, const Array<uint32_t>& row_address, bool write) {
             self.matrix_access(pc, num_matrices, checked(row_address, num_matrices * kRowsPerMatrix), write);
           })
      .def("local_access", &Counters::local_access)
      .def("merge", &Counters::merge)
      .def("totals", &totals_dict)
      .def("json", &json_of, py::arg("kernel") = "kernel");
}

}  // namespace emulator
