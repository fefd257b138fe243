#include "program.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/add.h>
#include <ATen/ops/mul.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "../glm/glm_steps.h"
#include "signals.h"
#include "solvers.h"
#include "workspace.h"

namespace mlopt {
namespace {

constexpr int64_t kNothing = BoundCall::kNothing;

// The inputs of a package; the one that is argument `hole` is left undefined.
std::vector<at::Tensor> inputs_of(const BoundCall& call, const std::vector<int64_t>& arguments,
                                  const std::vector<at::Tensor>& registers, int64_t hole) {
  std::vector<at::Tensor> inputs = call.fixed;
  for (size_t k = 0; k < inputs.size(); ++k) {
    const int64_t argument = call.arguments[k];
    if (argument == kNothing || argument == hole) continue;
    const auto at = static_cast<size_t>(arguments[static_cast<size_t>(argument)]);
    inputs[k] = call.package->fit(k, registers[at], call.layouts[k]);
  }
  return inputs;
}

std::shared_ptr<LinearOperator> operator_of(const BoundCall& call, const std::vector<int64_t>& arguments,
                                            const std::vector<at::Tensor>& registers, size_t hole, size_t hole_input) {
  return std::make_shared<PackageOperator>(call.package,
                                           inputs_of(call, arguments, registers, static_cast<int64_t>(hole)),
                                           hole_input, call.layouts[hole_input]);
}

size_t input_at(const BoundCall& call, size_t hole) {
  for (size_t k = 0; k < call.arguments.size(); ++k)
    if (call.arguments[k] == static_cast<int64_t>(hole)) return k;
  TORCH_CHECK(false, "program: argument ", hole, " is not used");
}

// Whether no row of a state of conjugate gradients has broken down or is not finite; see mlopt/ops/state.py.
bool is_sound(const at::Tensor& state) {
  constexpr int64_t kSquare = 0, kStatus = 2, kConverged = 1, kColumns = 5;
  const at::Tensor rows = state.to(at::kCPU, at::kDouble).contiguous();
  const double* row = rows.const_data_ptr<double>();
  for (int64_t k = 0; k < rows.numel(); k += kColumns)
    if (!std::isfinite(row[k + kSquare]) || row[k + kStatus] > kConverged) return false;
  return true;
}

const c10::StorageImpl* memory_of(const at::Tensor& tensor) { return tensor.storage().unsafeGetStorageImpl(); }

}  // namespace

void Program::check(Register value) const {
  TORCH_CHECK(value >= 0 && static_cast<size_t>(value) < num_registers_, "program: there is no register ", value);
}

void Program::check(const BoundCall& call, const std::vector<Register>& arguments, int64_t hole) const {
  for (int64_t argument : call.arguments)
    if (argument != kNothing && argument != hole) check(arguments.at(static_cast<size_t>(argument)));
}

std::vector<Program::Register> Program::add_call(const BoundCall& call, const std::vector<Register>& arguments) {
  check(call, arguments, kNothing);
  std::vector<Register> outputs;
  std::vector<std::pair<size_t, size_t>> stored;  // (output of the package, register)
  for (size_t k = 0; k < call.computed.size(); ++k) {
    Register output = kNothing;
    if (call.computed[k] != kNothing) {
      output = next();
      stored.emplace_back(call.computed[k], output);
    } else if (call.passed_on[k] != kNothing) {
      output = arguments.at(static_cast<size_t>(call.passed_on[k]));
    }
    outputs.push_back(output);
  }
  operations_.push_back([call, arguments, stored](Registers& registers, pybind11::handle) {
    const auto computed = call.package->run(inputs_of(call, arguments, registers, kNothing));
    for (const auto& [output, at] : stored) registers[at] = computed.at(output);
  });
  return outputs;
}

std::vector<Program::Register> Program::add_cg(const BoundCall& call, const std::vector<Register>& arguments,
                                               size_t hole, double damping, Register b, double rtol, int64_t max_steps,
                                               int64_t check_every) {
  check(call, arguments, static_cast<int64_t>(hole));
  check(b);
  const size_t input = input_at(call, hole);
  const Register x = next(), state = next(), scale = next();
  states_.push_back(state);
  operations_.push_back([=](Registers& registers, pybind11::handle recorder) {
    std::shared_ptr<LinearOperator> a = operator_of(call, arguments, registers, hole, input);
    if (damping != 0) a = std::make_shared<DampedOperator>(std::move(a), damping);
    CgResult made = cg_solve(*a, registers[b], std::nullopt, rtol, max_steps, check_every, recorder);
    registers[x] = std::move(made.x);
    registers[state] = std::move(made.state);
    registers[scale] = std::move(made.scale);
  });
  return {x, state, scale};
}

std::vector<Program::Register> Program::add_neumann(const BoundCall& call, const std::vector<Register>& arguments,
                                                    size_t hole, Register b, int64_t num_terms, double scale) {
  check(call, arguments, static_cast<int64_t>(hole));
  check(b);
  const size_t input = input_at(call, hole);
  const Register sum = next(), term = next();
  has_series_ = true;  // whether its terms grow is for the caller to see
  operations_.push_back([=](Registers& registers, pybind11::handle recorder) {
    const auto a = operator_of(call, arguments, registers, hole, input);
    at::Tensor last = registers[b].clone(at::MemoryFormat::Contiguous), total = last.clone();
    neumann_loop(*a, last, total, num_terms, scale, recorder);
    registers[sum] = total.mul_(scale);
    registers[term] = std::move(last);
  });
  return {sum, term};
}

std::vector<Program::Register> Program::add_descent(std::shared_ptr<const GlmSteps> steps,
                                                    const std::vector<Register>& tables,
                                                    const std::vector<Register>& present, int64_t num_steps) {
  TORCH_CHECK(tables.size() == 5, "program: expected 5 tables, got ", tables.size());
  for (Register value : tables) check(value);
  std::vector<Register> changed;
  for (Register value : present) {
    check(value);
    changed.push_back(next());
  }
  operations_.push_back([=](Registers& registers, pybind11::handle) {
    TORCH_CHECK(registers[tables[4]].item<bool>(), "program: the steps are not what they were found to be");
    std::vector<at::Tensor> values;
    for (Register value : present) values.push_back(registers[value]);
    StepsResult made = steps->run(registers[tables[0]], registers[tables[1]], registers[tables[2]],
                                  registers[tables[3]], values, num_steps);
    if (made.error) std::rethrow_exception(made.error);
    for (size_t k = 0; k < changed.size(); ++k) registers[changed[k]] = std::move(made.fed[k]);
  });
  return changed;
}

Program::Register Program::add_sum(Register base, double sign, Register a) {
  check(a);
  if (base != kNothing) check(base);
  const Register result = next();
  operations_.push_back([=](Registers& registers, pybind11::handle) {
    registers[result] = base == kNothing ? at::mul(registers[a], sign) : at::add(registers[base], registers[a], sign);
  });
  return result;
}

void Program::write(Register value, at::Tensor target) {
  check(value);
  written_.push_back(value);
  targets_.push_back(std::move(target));
}

void Program::Made::write() const {
  const at::NoGradGuard no_grad;
  if (!targets.empty()) at::_foreach_copy_(targets, written);
}

Program::Made Program::run(std::vector<at::Tensor> given, const std::vector<Register>& wanted,
                           pybind11::handle recorder) const {
  TORCH_CHECK(given.size() == num_given_, "program: expected ", num_given_, " tensors, got ", given.size());
  for (Register value : wanted) check(value);
  const at::NoGradGuard no_grad;
  const WorkspaceScope scope;
  SignalPoll poll;
  Registers registers = std::move(given);
  registers.resize(num_registers_);
  for (const auto& operation : operations_) {
    operation(registers, recorder);
    poll();
  }
  // A value may be one of the tensors that will be written, or share its memory: what is meant is what it is now.
  std::vector<const c10::StorageImpl*> memories;
  for (const at::Tensor& target : targets_) memories.push_back(memory_of(target));
  std::sort(memories.begin(), memories.end());
  const auto kept = [&](const at::Tensor& value) {
    return std::binary_search(memories.begin(), memories.end(), memory_of(value)) ? value.clone() : value;
  };
  Made made;
  made.is_sound = !has_series_ && std::all_of(states_.begin(), states_.end(),
                                              [&](Register state) { return is_sound(registers[state]); });
  made.targets = targets_;
  for (Register value : wanted) made.values.push_back(kept(registers[value]));
  for (size_t k = 0; k < written_.size(); ++k) {
    const at::Tensor value = kept(registers[written_[k]]);
    made.written.push_back(value.sizes() == targets_[k].sizes() ? value : value.reshape(targets_[k].sizes()));
  }
  return made;
}

ProgramsResult run_programs(const std::vector<ProgramCall>& calls, const std::vector<size_t>& order,
                            pybind11::handle recorder) {
  for (size_t k : order) TORCH_CHECK(k < calls.size(), "programs: there is no call ", k);
  ProgramsResult result;
  result.values.reserve(order.size());
  try {
    for (size_t k : order) {
      const ProgramCall& call = calls[k];
      Program::Made made = call.program->run(call.given, call.wanted, recorder);
      if (!made.is_sound) {
        result.doubtful = std::move(made);
        break;
      }
      made.write();
      result.values.push_back(std::move(made.values));
    }
  } catch (...) {
    result.error = std::current_exception();
  }
  return result;
}

}  // namespace mlopt
