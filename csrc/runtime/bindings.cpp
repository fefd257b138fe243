// The runtime classes in Python. Package and Call are documented where they are used, mlopt/backends/inductor/, the
// operators and the loops in mlopt/linalg/, GlmSteps in mlopt/backends/native/, Program and
// run_programs in mlopt/runtime/, small_mm_times in csrc/matmul/matmul_op.h.
#include "bindings.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "../glm/glm_operator.h"
#include "../glm/glm_steps.h"
#include "../matmul/matmul_op.h"
#include "call.h"
#include "operator.h"
#include "program.h"
#include "solvers.h"
#include "steps.h"
#include "workspace.h"

namespace py = pybind11;

namespace mlopt {

void bind_runtime(py::module& m) {
  // torch's errors with their message alone; the C++ stack that follows it helps nobody in Python.
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const c10::Error& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what_without_backtrace());
    }
  });

  py::class_<Package, std::shared_ptr<Package>>(m, "Package")
      .def(py::init<const std::string&, std::vector<at::ScalarType>, std::vector<at::Device>>(),
           py::call_guard<py::gil_scoped_release>())
      .def(py::init<Package::Body, std::vector<at::ScalarType>, std::vector<at::Device>>());

  py::class_<LinearOperator, std::shared_ptr<LinearOperator>>(m, "LinearOperator")
      .def("apply", &LinearOperator::apply, py::call_guard<py::gil_scoped_release>())
      .def("apply_rows", &LinearOperator::apply_rows, py::call_guard<py::gil_scoped_release>());
  py::class_<PackageOperator, LinearOperator, std::shared_ptr<PackageOperator>>(m, "PackageOperator");
  py::class_<CallbackOperator, LinearOperator, std::shared_ptr<CallbackOperator>>(m, "CallbackOperator")
      .def(py::init<py::function>());
  py::class_<DampedOperator, LinearOperator, std::shared_ptr<DampedOperator>>(m, "DampedOperator")
      .def(py::init<std::shared_ptr<LinearOperator>, double>());
  py::class_<GlmOperator, LinearOperator, std::shared_ptr<GlmOperator>>(m, "GlmOperator")
      .def(py::init<const at::Tensor&, const std::string&, const at::Tensor&, const at::Tensor&, int64_t, bool,
                    std::optional<at::Tensor>>());
  m.def(
      "cg_solve",
      [](LinearOperator& a, const at::Tensor& b, const std::optional<std::pair<at::Tensor, at::Tensor>>& start,
         double rtol, int64_t max_steps, int64_t check_every, const py::object& recorder) {
        const CgResult made = cg_solve(a, b, start, rtol, max_steps, check_every, recorder);
        return std::make_tuple(made.x, made.state, made.scale);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "neumann_loop",
      [](LinearOperator& a, const at::Tensor& term, const at::Tensor& total, int64_t num_terms, double scale,
         const py::object& recorder) { neumann_loop(a, term, total, num_terms, scale, recorder); },
      py::call_guard<py::gil_scoped_release>());

  m.def("workspace_bytes", &workspace_bytes);
  m.def("small_mm_times", &small_mm_times, py::call_guard<py::gil_scoped_release>());

  py::class_<StepsResult>(m, "StepsResult")
      .def_readonly("num_steps", &StepsResult::num_steps)
      .def_readonly("fed", &StepsResult::fed)
      .def_readonly("computed", &StepsResult::computed)
      .def_readonly("kept", &StepsResult::kept)
      .def("raise_error", [](const StepsResult& result) {
        if (result.error) std::rethrow_exception(result.error);
      });
  py::class_<Steps, std::shared_ptr<Steps>>(m, "Steps")
      .def(
          "run",
          [](const Steps& steps, const std::vector<std::vector<at::Tensor>>& batches, const std::vector<size_t>& order,
             const at::Tensor& numbers, const std::shared_ptr<Steps>& leap, size_t times,
             std::vector<at::Tensor> fed_before, const py::object& recorder) {
            return steps.run(batches, order, numbers, leap, times, std::move(fed_before), recorder);
          },
          py::call_guard<py::gil_scoped_release>());
  py::class_<GlmSteps, std::shared_ptr<GlmSteps>>(m, "GlmSteps")
      .def(py::init<const std::string&, const at::Tensor&, int64_t, bool, int64_t>())
      .def("run", &GlmSteps::run, py::call_guard<py::gil_scoped_release>());

  py::class_<BoundCall>(m, "BoundCall");
  py::class_<Program::Made>(m, "ProgramMade")
      .def_readonly("values", &Program::Made::values)
      .def("write", &Program::Made::write, py::call_guard<py::gil_scoped_release>());
  py::class_<Program>(m, "Program")
      .def(py::init<size_t>())
      .def("add_call", &Program::add_call)
      .def("add_cg", &Program::add_cg)
      .def("add_neumann", &Program::add_neumann)
      .def("add_descent", &Program::add_descent)
      .def("add_sum", &Program::add_sum)
      .def("write", &Program::write)
      .def(
          "run",
          [](const Program& program, std::vector<at::Tensor> given, const std::vector<Program::Register>& wanted,
             const py::object& recorder) { return program.run(std::move(given), wanted, recorder); },
          py::call_guard<py::gil_scoped_release>());
  py::class_<ProgramsResult>(m, "ProgramsResult")
      .def_readonly("values", &ProgramsResult::values)
      .def_readonly("doubtful", &ProgramsResult::doubtful)
      .def("raise_error", [](const ProgramsResult& result) {
        if (result.error) std::rethrow_exception(result.error);
      });
  // shield: see mlopt/runtime/shield.py. Here, where no signal handler can run, is the only place to raise it between
  // the last run, which Ctrl-C may end, and the return to Python.
  m.def("run_programs",
        [](std::vector<std::tuple<const Program*, std::vector<at::Tensor>, std::vector<Program::Register>>> given,
           const std::vector<size_t>& order, const py::object& recorder, const py::object& shield) {
          std::vector<ProgramCall> calls;
          for (auto& [program, tensors, wanted] : given)
            calls.push_back({program, std::move(tensors), std::move(wanted)});
          ProgramsResult result;
          {
            const py::gil_scoped_release without_gil;
            result = run_programs(calls, order, recorder);
          }
          shield.attr("held") = true;
          return result;
        });

  using Pairs = std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>>;
  py::class_<Call, std::shared_ptr<Call>>(m, "Call")
      .def(
          py::init([](std::shared_ptr<Package> package, size_t num_arguments,
                      const std::vector<std::tuple<int64_t, int64_t, int64_t>>& bindings, std::vector<size_t> arguments,
                      std::vector<at::Tensor> constants, const std::vector<std::pair<int, size_t>>& outputs) {
            std::vector<Binding> read;
            for (const auto& [argument, dim, factor] : bindings) read.push_back({argument, dim, factor});
            std::vector<Output> returned;
            for (const auto& [kind, index] : outputs) returned.push_back({static_cast<OutputKind>(kind), index});
            return std::make_shared<Call>(std::move(package), num_arguments, std::move(read), std::move(arguments),
                                          std::move(constants), std::move(returned));
          }))
      .def("sizes_of", &Call::sizes_of)
      .def("add_sizes",
           [](Call& call, const std::vector<int64_t>& sizes, const Pairs& layouts, std::vector<at::Tensor> carriers,
              std::vector<py::object> values) {
             std::vector<Layout> pairs;
             for (const auto& [size, stride] : layouts) pairs.push_back({size, stride});
             call.add_sizes(sizes, std::move(pairs), std::move(carriers), std::move(values));
           })
      .def("__call__", &Call::operator())
      .def("results", &Call::results)
      .def("steps", &Call::steps)
      .def("bind", &Call::bind)
      .def("give_up", [](const Call& call) { call.package()->give_up(); })
      // The call as a linear operator in argument `hole`; None where the sizes were not declared.
      .def("operator", [](Call& call, const py::sequence& arguments, int64_t hole) -> std::shared_ptr<LinearOperator> {
        TORCH_CHECK(call.returns_one_tensor(), "package: an operator returns one tensor");
        auto prepared = call.prepare(arguments, hole);
        if (!prepared) return nullptr;
        TORCH_CHECK(prepared->hole_layout != nullptr, "package: argument ", hole, " is not used");
        return std::make_shared<PackageOperator>(call.package(), std::move(prepared->inputs), prepared->hole_input,
                                                 *prepared->hole_layout);
      });
}

}  // namespace mlopt
