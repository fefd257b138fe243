#include "call.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <utility>

namespace py = pybind11;

namespace mlopt {
namespace {

const at::Tensor& tensor_of(py::handle object) {
  TORCH_CHECK(THPVariable_Check(object.ptr()), "package: expected a tensor, got ", Py_TYPE(object.ptr())->tp_name);
  return THPVariable_Unpack(object.ptr());
}

}  // namespace

Call::Call(std::shared_ptr<Package> package, size_t num_arguments, std::vector<Binding> bindings,
           std::vector<size_t> arguments, std::vector<at::Tensor> constants, std::vector<Output> outputs)
    : package_(std::move(package)),
      num_arguments_(num_arguments),
      bindings_(std::move(bindings)),
      arguments_(std::move(arguments)),
      constants_(std::move(constants)),
      outputs_(std::move(outputs)) {}

std::vector<int64_t> Call::sizes_of(const py::sequence& arguments) const {
  TORCH_CHECK(arguments.size() == num_arguments_, "package: expected ", num_arguments_, " arguments, got ",
              arguments.size());
  std::vector<int64_t> sizes;
  sizes.reserve(bindings_.size());
  for (const Binding& b : bindings_) {
    const py::object argument = arguments[static_cast<size_t>(b.argument)];
    if (b.dim < 0)
      sizes.push_back(argument.cast<int64_t>());
    else
      sizes.push_back(tensor_of(argument).size(b.dim) / b.factor);
  }
  return sizes;
}

void Call::add_sizes(const std::vector<int64_t>& sizes, std::vector<Layout> layouts, std::vector<at::Tensor> carriers,
                     std::vector<py::object> values) {
  TORCH_CHECK(layouts.size() == package_->num_inputs() &&
                  arguments_.size() + constants_.size() + carriers.size() == layouts.size(),
              "package: expected ", package_->num_inputs(), " layouts");
  sizes_[sizes] = {std::move(layouts), std::move(carriers), std::move(values)};
}

const Call::Sizes* Call::find(const py::sequence& arguments) const {
  const auto found = sizes_.find(sizes_of(arguments));
  return found == sizes_.end() ? nullptr : &found->second;
}

std::optional<Call::Prepared> Call::prepare(const py::sequence& arguments, int64_t hole) {
  const Sizes* sizes = find(arguments);
  if (sizes == nullptr) return std::nullopt;
  Prepared prepared;
  auto& inputs = prepared.inputs;
  inputs.reserve(sizes->layouts.size());
  for (size_t position : arguments_) {
    const Layout& layout = sizes->layouts[inputs.size()];
    if (static_cast<int64_t>(position) == hole) {
      prepared.hole_layout = &layout;
      prepared.hole_input = inputs.size();
      inputs.emplace_back();
    } else {
      const py::object argument = arguments[position];
      inputs.push_back(package_->fit(inputs.size(), tensor_of(argument), layout));
    }
  }
  inputs.insert(inputs.end(), constants_.begin(), constants_.end());
  inputs.insert(inputs.end(), sizes->carriers.begin(), sizes->carriers.end());
  return prepared;
}

py::object Call::operator()(const py::args& arguments) {
  auto prepared = prepare(arguments, -1);
  if (!prepared) return py::none();
  std::vector<at::Tensor> computed;
  {
    const py::gil_scoped_release no_gil;
    computed = package_->run(std::move(prepared->inputs));
  }
  return results(arguments, computed);
}

py::tuple Call::results(const py::sequence& arguments, const std::vector<at::Tensor>& computed) const {
  const Sizes* sizes = find(arguments);
  TORCH_CHECK(sizes != nullptr, "package: unknown sizes");
  py::tuple returned(outputs_.size());
  for (size_t k = 0; k < outputs_.size(); ++k) {
    const size_t index = outputs_[k].index;
    switch (outputs_[k].kind) {
      case OutputKind::kComputed:
        returned[k] = py::cast(computed.at(index));
        break;
      case OutputKind::kArgument:
        returned[k] = arguments[index];
        break;
      case OutputKind::kValue:
        returned[k] = sizes->values.at(index);
        break;
    }
  }
  return returned;
}

std::optional<BoundCall> Call::bind(const py::sequence& arguments) {
  auto prepared = prepare(arguments, -1);
  if (!prepared) return std::nullopt;
  BoundCall bound{package_, find(arguments)->layouts, std::move(prepared->inputs), {}, {}, {}};
  for (size_t k = 0; k < bound.fixed.size(); ++k) {
    const bool is_argument = k < arguments_.size();
    bound.arguments.push_back(is_argument ? static_cast<int64_t>(arguments_[k]) : BoundCall::kNothing);
    if (is_argument) bound.fixed[k] = at::Tensor();
  }
  for (const Output& output : outputs_) {
    const auto index = static_cast<int64_t>(output.index);
    bound.computed.push_back(output.kind == OutputKind::kComputed ? index : BoundCall::kNothing);
    bound.passed_on.push_back(output.kind == OutputKind::kArgument ? index : BoundCall::kNothing);
  }
  return bound;
}

std::shared_ptr<Steps> Call::steps(const py::sequence& arguments,
                                   const std::vector<std::pair<size_t, size_t>>& feedback,
                                   const std::vector<size_t>& batch, const std::vector<size_t>& numbers,
                                   size_t num_kept) {
  auto prepared = prepare(arguments, -1);
  if (!prepared) return nullptr;
  const auto input_of = [&](size_t argument) {
    const auto found = std::find(arguments_.begin(), arguments_.end(), argument);
    return found == arguments_.end() ? int64_t{-1} : static_cast<int64_t>(found - arguments_.begin());
  };
  StepChanges changing;
  for (const auto& [output, argument] : feedback) {
    const int64_t input = input_of(argument);
    if (outputs_.at(output).kind != OutputKind::kComputed || input < 0) return nullptr;
    changing.feedback.emplace_back(outputs_[output].index, static_cast<size_t>(input));
  }
  // An argument that is handed through may be one that is fed back.
  for (const Output& output : outputs_)
    if (output.kind == OutputKind::kArgument) return nullptr;
  for (size_t k = 0; k < arguments_.size(); ++k) {  // checked by `prepare`; not its copies
    const py::object argument = arguments[arguments_[k]];
    prepared->inputs[k] = tensor_of(argument);
  }
  for (size_t argument : batch) changing.batch.push_back(input_of(argument));
  for (size_t argument : numbers) changing.numbers.push_back(input_of(argument));
  for (size_t k = 0; k < std::min(num_kept, outputs_.size()); ++k)
    changing.kept.push_back(outputs_[k].kind == OutputKind::kComputed ? static_cast<int64_t>(outputs_[k].index) : -1);
  return std::make_shared<Steps>(package_, std::move(prepared->inputs), find(arguments)->layouts, std::move(changing));
}

}  // namespace mlopt
