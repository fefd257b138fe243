// The runtime classes in Python: mlopt._C.Package, Call. Documented where they are used, mlopt/backends/inductor/.
#include "bindings.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "call.h"

namespace py = pybind11;

namespace mlopt {

void bind_runtime(py::module& m) {
  py::class_<Package, std::shared_ptr<Package>>(m, "Package")
      .def(py::init<const std::string&, std::vector<at::ScalarType>>(), py::call_guard<py::gil_scoped_release>());

  using Pairs = std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>>;
  py::class_<Call, std::shared_ptr<Call>>(m, "Call")
      .def(py::init([](std::shared_ptr<Package> package, size_t num_arguments,
                       const std::vector<std::tuple<int64_t, int64_t, int64_t>>& bindings,
                       std::vector<size_t> arguments, std::vector<at::Tensor> constants,
                       const std::vector<std::pair<int, size_t>>& outputs) {
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
      .def("__call__", &Call::operator());
}

}  // namespace mlopt
