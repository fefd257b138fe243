// `Steps`: a package whose outputs are its next inputs, run many times without Python in between.
//
// The package is one optimizer step of a problem. The caller's tensors are not written: a step's new values become the
// next step's inputs by handing over the tensors, and the caller copies the last ones into the live parameters and
// optimizer state. So an error or Ctrl-C in the middle leaves the values after the last whole step. Where steps are
// recorded (see repeated.h), inputs stay where they are, as tensors of the loop's own, and new values are copied in.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <memory>
#include <utility>
#include <vector>

#include "package.h"

namespace mlopt {

struct StepsResult {
  int64_t num_steps = 0;             // whole steps made
  std::vector<at::Tensor> fed;       // present value of each input that is fed back
  std::vector<at::Tensor> computed;  // what the package returned in the last whole step; empty if there was none
  std::vector<at::Tensor> kept;      // one per `StepChanges::kept`: [num_steps], or undefined where not computed
  std::exception_ptr error;          // why fewer steps were made than asked for
};

// Which inputs of the package change from step to step, and which outputs are kept. -1 stands for an argument that the
// package does not take.
struct StepChanges {
  std::vector<std::pair<size_t, size_t>> feedback;  // (output, input): what a step returns and the next one takes
  std::vector<int64_t> batch;                       // the tensors of a batch
  std::vector<int64_t> numbers;                     // 0-d float64 tensors
  std::vector<int64_t> kept;  // outputs of one element whose values in every step are wanted; -1 for none
};

class Steps {
 public:
  // inputs: of the first step, as the caller has them; `run` takes their values then.
  Steps(std::shared_ptr<Package> package, std::vector<at::Tensor> inputs, std::vector<Layout> layouts,
        StepChanges changing);

  // batches: each distinct one once; order: which of them each step takes; numbers: [steps, H] float64, a row per step,
  // or one row for all of them, and more, by a stride of 0. Then, and with a single batch, all steps but the last ones
  // are made `times` at a time by `leap`, if there is one: a graph that makes so many, feeds back the same values in
  // the same order, and returns nothing else. fed_before: what takes the place of the inputs that are fed back, or
  // nothing. recorder: see repeated.h; only for steps that are the same whatever the values on the host are: no random
  // numbers, no batch, number or fed value there that changes. Call it without the GIL. What is wrong with the
  // arguments is thrown; what happens in a step is in the result.
  StepsResult run(const std::vector<std::vector<at::Tensor>>& batches, const std::vector<size_t>& order,
                  const at::Tensor& numbers, const std::shared_ptr<Steps>& leap, size_t times,
                  std::vector<at::Tensor> fed_before, pybind11::handle recorder) const;

 private:
  // The columns of `numbers` are read by its stride, so it may have more rows than there are steps.
  StepsResult loop(const std::vector<std::vector<at::Tensor>>& batches, const std::vector<size_t>& order,
                   const at::Tensor& numbers, std::vector<at::Tensor> fed_before, pybind11::handle recorder) const;

  std::shared_ptr<Package> package_;
  std::vector<at::Tensor> inputs_;
  std::vector<Layout> layouts_;
  StepChanges changing_;
};

}  // namespace mlopt
