// SPDX-License-Identifier: Apache-2.0
// python.cpp: the module emulator._emulator. Plain values in and out; emulator/__init__.py makes the API of them.

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "driver.h"
#include "fatbin.h"
#include "ptx.h"

namespace py = pybind11;

namespace emulator {

void bind_counters(py::module_& module);  // python_counters.cpp

namespace {

using Dim = std::array<uint32_t, 3>;

// Bytes of a PTX text, names of files in it and messages that quote it need not be UTF-8.
py::str text_of(const std::string& bytes) {
  PyObject* text = PyUnicode_DecodeUTF8(bytes.data(), static_cast<py::ssize_t>(bytes.size()), "replace");
  if (text == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(text);
}

py::dict dict_of(const Report& report) {
  py::dict result;
  result["fault"] = name_of(report.fault);
  result["kernel"] = text_of(demangle(report.kernel));
  result["file"] = text_of(report.where.file);
  result["line"] = report.where.line;
  result["block"] = std::make_tuple(report.block[0], report.block[1], report.block[2]);
  result["thread"] = std::make_tuple(report.thread[0], report.thread[1], report.thread[2]);
  result["text"] = text_of(report.text);
  result["count"] = report.count;
  result["message"] = text_of(describe(report));
  return result;
}

py::list list_of(const std::vector<Report>& reports) {
  py::list result;
  for (const Report& report : reports) result.append(dict_of(report));
  return result;
}

py::list json_of(const std::vector<std::shared_ptr<const KeptLaunch>>& launches) {
  py::list result;
  for (const auto& launch : launches) result.append(text_of(to_json(*launch)));
  return result;
}

const ptx::Function& syntax_of(const Module& module, const std::string& kernel) {
  for (const ptx::Function& function : module.syntax().functions) {
    if (function.is_entry && function.has_body && function.name == kernel) return function;
  }
  throw Error("there is no kernel " + kernel);
}

const Function& find(const Module& module, const std::string& kernel) {
  const Function* function = module.find(kernel);
  if (function == nullptr) throw Error("there is no kernel " + kernel);
  return *function;
}

py::dict kernel_dict(const Module& module, const std::string& kernel) {
  const FunctionInfo& info = find(module, kernel).info();
  const ptx::Function& syntax = syntax_of(module, kernel);
  py::dict result;
  py::list params;
  for (size_t i = 0; i < info.params.size(); ++i) {
    py::dict param;
    param["name"] = info.params[i].name;
    param["type"] = syntax.params[i].type;
    param["offset"] = info.params[i].offset;
    param["num_bytes"] = info.params[i].num_bytes;
    params.append(param);
  }
  result["params"] = params;
  result["params_bytes"] = info.params_bytes;
  result["static_smem"] = info.static_smem;
  result["local_bytes"] = info.local_bytes;
  result["registers"] = info.num_registers;
  result["max_threads"] = info.max_threads;
  return result;
}

// How often each instruction stands in a kernel: {"ld.global.f32": 3}.
std::map<std::string, int> instructions(const Module& module, const std::string& kernel) {
  std::map<std::string, int> result;
  for (const ptx::Instruction& instruction : syntax_of(module, kernel).instructions) ++result[instruction.text()];
  return result;
}

void launch_module(const Module& module, const std::string& kernel, const Dim& grid, const Dim& block,
                   const py::bytes& params, uint64_t dynamic_smem, const std::vector<AccessibleRange>& ranges) {
  Driver& driver = Driver::instance();
  const Function& function = find(module, kernel);
  LaunchShape shape;
  std::copy_n(grid.data(), 3, shape.grid);
  std::copy_n(block.data(), 3, shape.block);
  shape.dynamic_shared = dynamic_smem;
  const std::string bytes = params;
  const uint64_t most = static_cast<uint64_t>(driver.device().shared_per_block);
  const uint64_t static_smem = std::min<uint64_t>(function.info().static_smem, most);
  std::string why;
  if (driver.limits(function, shape, most - static_smem, &why) != Status::kSuccess) throw Error(why);
  const Accessible accessible(ranges);
  const py::gil_scoped_release others_may_run;
  driver.launch(module, function, shape, reinterpret_cast<const std::byte*>(bytes.data()), bytes.size(),
                most - static_smem);
}

void configure(std::optional<int> architecture, std::optional<int> num_sms, std::optional<bool> checks,
               std::optional<bool> counters, std::optional<int> threads, std::optional<uint64_t> max_instructions) {
  Options options = Driver::instance().options();
  options.architecture = architecture.value_or(options.architecture);
  options.num_sms = num_sms.value_or(options.num_sms);
  options.checks = checks.value_or(options.checks);
  options.counters = counters.value_or(options.counters);
  options.threads = threads.value_or(options.threads);
  options.max_instructions = max_instructions.value_or(options.max_instructions);
  Driver::instance().configure(options);
}

py::dict options() {
  const Options options = Driver::instance().options();
  py::dict result;
  result["architecture"] = options.architecture;
  result["num_sms"] = options.num_sms;
  result["checks"] = options.checks;
  result["counters"] = options.counters;
  result["threads"] = options.threads;
  result["max_instructions"] = options.max_instructions;
  return result;
}

// The PTX in the bytes of a file: (target, text) of each, and how many texts are compressed.
std::tuple<std::vector<std::pair<std::string, py::str>>, int> texts_of(const py::bytes& file) {
  const std::string bytes = file;
  std::vector<std::pair<std::string, py::str>> texts;
  int num_compressed = 0;
  for (const FatBinary& binary : read_file(std::as_bytes(std::span(bytes)))) {
    for (const PtxText& text : binary.texts) texts.emplace_back(text.target, text_of(text.text));
    num_compressed += binary.num_compressed;
  }
  return {texts, num_compressed};
}

}  // namespace
}  // namespace emulator

PYBIND11_MODULE(_emulator, m) {
  using namespace emulator;
  static const py::handle error_type = py::exception<Error>(m, "Error", PyExc_RuntimeError).release();
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      PyErr_SetObject(error_type.ptr(), text_of(error.what()).ptr());
    }
  });

  py::class_<Module, std::shared_ptr<Module>>(m, "Module")
      .def(py::init([](const std::string& text, const std::string& name) {
             return Module::parse(text, name, Driver::instance().options());
           }),
           py::arg("text"), py::arg("name"))
      .def("kernel_names", &Module::kernel_names)
      .def("kernel", &kernel_dict)
      .def("instructions", &instructions)
      .def("launch", &launch_module)
      .def(
          "symbol",
          [](const Module& module, const std::string& name) -> std::optional<py::memoryview> {
            uint64_t num_bytes = 0;
            void* const data = module.symbol(name, &num_bytes);
            if (data == nullptr) return std::nullopt;
            return py::memoryview::from_memory(data, static_cast<py::ssize_t>(num_bytes));
          },
          py::keep_alive<0, 1>());

  m.def("configure", &configure);
  m.def("options", &options);
  // Without the GIL, for which an edit may wait that is under way.
  m.def(
      "edit_images", [](Driver::Edit edit) { Driver::instance().edit_images(std::move(edit)); },
      py::call_guard<py::gil_scoped_release>());
  m.def("reports", [] { return list_of(Driver::instance().reports()); });
  m.def("take_reports", [] { return list_of(Driver::instance().take_reports()); });
  m.def("launches", [] { return json_of(Driver::instance().launches()); });
  m.def("take_launches", [] { return json_of(Driver::instance().take_launches()); });
  m.def("architectures", &emulated_architectures);
  m.def("demangle", &demangle);
  m.def("texts_of", &texts_of);
  bind_counters(m);
}
