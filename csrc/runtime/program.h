// `Program`: a whole step of a problem, or several, without Python between their parts.
//
// A program is a list of operations on registers, each of which holds a tensor: calls of packages, solves, sums, and at
// the end new values of the caller's tensors. It is put together in Python, which has made the same step by itself
// before: see mlopt/runtime/native_step.py and step_program.py. A run writes nothing of the caller's, so an error or
// Ctrl-C on the way leaves everything as it was; the new values are written when the caller, who may want to look
// first, says so.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "operator.h"
#include "package.h"

namespace mlopt {

class GlmSteps;

// A package with the sizes it is called for: which argument each input is, or the fixed tensor that it is.
struct BoundCall {
  // What an output of the graph is: computed, one of the arguments, or no tensor.
  static constexpr int64_t kNothing = -1;

  std::shared_ptr<Package> package;
  std::vector<Layout> layouts;
  std::vector<at::Tensor> fixed;   // undefined where the input is an argument
  std::vector<int64_t> arguments;  // per input: the position of the argument, or kNothing
  std::vector<int64_t> computed;   // per output of the graph: that of the package, or kNothing
  std::vector<int64_t> passed_on;  // per output of the graph: the argument it is, or kNothing
};

class Program {
 public:
  using Register = int64_t;

  // What a run came to.
  struct Made {
    std::vector<at::Tensor> values;  // of the registers that were wanted

    // Whether every solve ended in a way that nobody has to be told of, as far as that is known here.
    bool is_sound = true;

    // Writes the new values.
    void write() const;

    std::vector<at::Tensor> targets, written;
  };

  // The first `num_given` registers are what `run` is given.
  explicit Program(size_t num_given) : num_registers_(num_given), num_given_(num_given) {}

  // A call with these arguments, kNothing for what is no tensor. Returns the registers of the graph's outputs.
  std::vector<Register> add_call(const BoundCall& call, const std::vector<Register>& arguments);

  // Conjugate gradients from zero on the call, as an operator in argument `hole`, plus damping I. Returns the registers
  // of the solution, the state and the size of b: see CgResult.
  std::vector<Register> add_cg(const BoundCall& call, const std::vector<Register>& arguments, size_t hole,
                               double damping, Register b, double rtol, int64_t max_steps, int64_t check_every);

  // A Neumann series likewise. Returns the registers of the sum times the scale, and of its last term.
  std::vector<Register> add_neumann(const BoundCall& call, const std::vector<Register>& arguments, size_t hole,
                                    Register b, int64_t num_terms, double scale);

  // Steps of descent on a linear model; tables: see `GlmSteps::run`, and whether they hold. Returns the registers of
  // the new values of `present`.
  std::vector<Register> add_descent(std::shared_ptr<const GlmSteps> steps, const std::vector<Register>& tables,
                                    const std::vector<Register>& present, int64_t num_steps);

  // sign * a, or base + sign * a.
  Register add_sum(Register base, double sign, Register a);

  // The register's value is a new value of a tensor of as many elements.
  void write(Register value, at::Tensor target);

  // wanted: registers whose values are returned. recorder: of the solves, see repeated.h. What is wrong with a tensor
  // that is given is thrown, and so is Ctrl-C. Call it without the GIL.
  Made run(std::vector<at::Tensor> given, const std::vector<Register>& wanted, pybind11::handle recorder) const;

 private:
  using Registers = std::vector<at::Tensor>;

  Register next() { return static_cast<Register>(num_registers_++); }
  void check(Register value) const;
  // Checks the arguments of a call; `hole` is left out.
  void check(const BoundCall& call, const std::vector<Register>& arguments, int64_t hole) const;

  size_t num_registers_, num_given_;
  std::vector<std::function<void(Registers&, pybind11::handle)>> operations_;
  std::vector<Register> written_;
  std::vector<at::Tensor> targets_;
  std::vector<Register> states_;  // of conjugate gradients
  bool has_series_ = false;
};

// A program and what it is run with.
struct ProgramCall {
  const Program* program;
  std::vector<at::Tensor> given;
  std::vector<Program::Register> wanted;
};

struct ProgramsResult {
  std::vector<std::vector<at::Tensor>> values;  // of each run that was made and written, those that were wanted
  std::optional<Program::Made> doubtful;        // the run after these, not written, if it is not sound
  std::exception_ptr error;                     // why it could not be made, if there is one and it was not
};

// Runs programs one after the other, each of which writes before the next one reads, up to the first run that is not
// sound. order: which of the calls come when. Call it without the GIL.
ProgramsResult run_programs(const std::vector<ProgramCall>& calls, const std::vector<size_t>& order,
                            pybind11::handle recorder);

}  // namespace mlopt
