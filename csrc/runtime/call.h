// `Call`: a package called in place of the graph it was made from, with that graph's arguments and outputs.
//
// The plan of the call (what is a tensor, a size, a constant, an argument handed through) is decided in Python, see
// mlopt/backends/inductor/interface.py; this class only follows it, so that a call costs no Python per tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <optional>

#include "package.h"
#include "program.h"
#include "steps.h"

namespace mlopt {

// Argument `argument` is a number (dim < 0), or has it, times `factor`, as its size `dim`.
struct Binding {
  int64_t argument, dim, factor;
};

// What an output is: a computed one, an argument, or a value that belongs to the sizes.
enum class OutputKind : int { kComputed = 0, kArgument = 1, kValue = 2 };
struct Output {
  OutputKind kind;
  size_t index;
};

class Call {
 public:
  Call(std::shared_ptr<Package> package, size_t num_arguments, std::vector<Binding> bindings,
       std::vector<size_t> arguments, std::vector<at::Tensor> constants, std::vector<Output> outputs);

  // What the free sizes are in a call with these arguments.
  std::vector<int64_t> sizes_of(const pybind11::sequence& arguments) const;

  // Declares a set of free sizes: the layouts of the inputs, the last inputs themselves, the values among the outputs.
  void add_sizes(const std::vector<int64_t>& sizes, std::vector<Layout> layouts, std::vector<at::Tensor> carriers,
                 std::vector<pybind11::object> values);

  // Returns None for free sizes that were not declared.
  pybind11::object operator()(const pybind11::args& arguments);

  // The inputs of the package for these arguments, or nothing where the sizes were not declared. The argument at
  // position `hole` is left undefined; `hole_input` tells which input that is.
  struct Prepared {
    std::vector<at::Tensor> inputs;
    const Layout* hole_layout = nullptr;
    size_t hole_input = 0;
  };
  std::optional<Prepared> prepare(const pybind11::sequence& arguments, int64_t hole);

  // What the graph returns, for arguments of declared sizes and what the package computed.
  pybind11::tuple results(const pybind11::sequence& arguments, const std::vector<at::Tensor>& computed) const;

  // The graph as steps that follow each other: outputs of the graph that are arguments of the next call, and arguments
  // that the caller changes. The first `num_kept` outputs are kept of every step. Null where the sizes were not
  // declared, or where the package neither computes what is fed back nor takes it.
  std::shared_ptr<Steps> steps(const pybind11::sequence& arguments,
                               const std::vector<std::pair<size_t, size_t>>& feedback, const std::vector<size_t>& batch,
                               const std::vector<size_t>& numbers, size_t num_kept);

  // The call for the sizes of these arguments; nothing where they were not declared.
  std::optional<BoundCall> bind(const pybind11::sequence& arguments);

  const std::shared_ptr<Package>& package() const { return package_; }
  bool returns_one_tensor() const { return outputs_.size() == 1 && outputs_[0].kind == OutputKind::kComputed; }

 private:
  struct Sizes {
    std::vector<Layout> layouts;
    std::vector<at::Tensor> carriers;
    std::vector<pybind11::object> values;
  };
  const Sizes* find(const pybind11::sequence& arguments) const;

  std::shared_ptr<Package> package_;
  size_t num_arguments_;
  std::vector<Binding> bindings_;
  std::vector<size_t> arguments_;
  std::vector<at::Tensor> constants_;
  std::vector<Output> outputs_;
  std::map<std::vector<int64_t>, Sizes> sizes_;
};

}  // namespace mlopt
