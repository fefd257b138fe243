#include "steps.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>

#include <algorithm>

#include "repeated.h"
#include "signals.h"
#include "workspace.h"

namespace mlopt {

Steps::Steps(std::shared_ptr<Package> package, std::vector<at::Tensor> inputs, std::vector<Layout> layouts,
             StepChanges changing)
    : package_(std::move(package)),
      inputs_(std::move(inputs)),
      layouts_(std::move(layouts)),
      changing_(std::move(changing)) {
  for (int64_t input : changing_.batch)
    if (input >= 0) inputs_[static_cast<size_t>(input)] = at::Tensor();  // `run` brings its own; this one may be large
}

StepsResult Steps::run(const std::vector<std::vector<at::Tensor>>& batches, const std::vector<size_t>& order,
                       const at::Tensor& numbers, const std::shared_ptr<Steps>& leap, size_t times,
                       std::vector<at::Tensor> fed_before, pybind11::handle recorder) const {
  for (size_t b : order) TORCH_CHECK(b < batches.size(), "steps: no batch ", b);
  const auto columns = static_cast<int64_t>(changing_.numbers.size());
  const auto steps = static_cast<int64_t>(order.size());
  TORCH_CHECK(numbers.scalar_type() == at::kDouble && numbers.dim() == 2 &&
                  (numbers.size(0) == steps || (numbers.size(0) > steps && numbers.stride(0) == 0)) &&
                  numbers.size(1) == columns && (columns <= 1 || numbers.stride(1) == 1),
              "steps: expected float64 numbers of shape [", order.size(), ", ", columns, "] with contiguous rows");
  TORCH_CHECK(fed_before.empty() || fed_before.size() == changing_.feedback.size(), "steps: expected ",
              changing_.feedback.size(), " values in place of those fed back, got ", fed_before.size());
  const bool uniform = batches.size() == 1 && numbers.stride(0) == 0;
  const size_t leaps = leap != nullptr && uniform && !order.empty() ? (order.size() - 1) / times : 0;
  if (leaps == 0) return loop(batches, order, numbers, std::move(fed_before), recorder);
  StepsResult first = leap->loop(batches, std::vector<size_t>(leaps, 0), numbers, std::move(fed_before), recorder);
  first.num_steps *= static_cast<int64_t>(times);
  first.computed.clear();
  if (first.error) return first;
  const std::vector<size_t> rest(order.size() - leaps * times, 0);
  StepsResult last = loop(batches, rest, numbers, std::move(first.fed), recorder);
  last.num_steps += first.num_steps;
  return last;
}

StepsResult Steps::loop(const std::vector<std::vector<at::Tensor>>& batches, const std::vector<size_t>& order,
                        const at::Tensor& numbers, std::vector<at::Tensor> fed_before,
                        pybind11::handle recorder) const {
  const at::NoGradGuard no_grad;
  const WorkspaceScope scope;
  std::vector<at::Tensor> inputs = inputs_;
  for (size_t k = 0; k < fed_before.size(); ++k) inputs[changing_.feedback[k].second] = std::move(fed_before[k]);
  for (size_t k = 0; k < inputs.size(); ++k)  // again in every run: the values in the caller's tensors have changed
    if (inputs[k].defined()) inputs[k] = package_->fit(k, inputs[k], layouts_[k]);
  std::vector<std::vector<at::Tensor>> fitted;  // in the package's strides: copied once, not once per step
  for (const auto& batch : batches) {
    TORCH_CHECK(batch.size() == changing_.batch.size(), "steps: expected ", changing_.batch.size(),
                " tensors per batch, got ", batch.size());
    auto& tensors = fitted.emplace_back(batch.size());
    for (size_t j = 0; j < batch.size(); ++j) {
      if (changing_.batch[j] < 0) continue;
      const auto input = static_cast<size_t>(changing_.batch[j]);
      tensors[j] = package_->fit(input, batch[j], layouts_[input]);
    }
  }
  std::vector<std::pair<double*, int64_t>> slots;  // where a number goes, and its column
  for (size_t h = 0; h < changing_.numbers.size(); ++h) {
    const int64_t input = changing_.numbers[h];
    if (input < 0) continue;
    at::Tensor own = at::empty({}, at::dtype(at::kDouble));  // the caller's is not written
    slots.emplace_back(own.mutable_data_ptr<double>(), static_cast<int64_t>(h));
    inputs[static_cast<size_t>(input)] = std::move(own);
  }

  bool in_place = recorder && !recorder.is_none() && static_cast<int64_t>(order.size()) >= kFewestWorthRecording &&
                  worth_recording(inputs);
  // A copy keeps the strides that were compiled for if no element is missing or there twice.
  for (const auto& pair : changing_.feedback) in_place = in_place && inputs[pair.second].is_non_overlapping_and_dense();
  for (size_t j = 0; j < changing_.batch.size(); ++j)
    in_place = in_place && (changing_.batch[j] < 0 || fitted[0][j].is_non_overlapping_and_dense());
  std::vector<at::Tensor> written;  // the inputs that are fed back, where they stay in place
  if (in_place) {
    for (const auto& [output, input] : changing_.feedback) {
      inputs[input] = inputs[input].clone();
      written.push_back(inputs[input]);
    }
    for (size_t j = 0; j < changing_.batch.size(); ++j)
      if (changing_.batch[j] >= 0) inputs[static_cast<size_t>(changing_.batch[j])] = at::empty_like(fitted[0][j]);
  }

  StepsResult result;
  std::vector<at::Tensor> computed;
  Repeated make_step(in_place ? recorder : pybind11::handle(), static_cast<int64_t>(order.size()),
                     [&] { computed = package_->run(inputs); });
  std::vector<std::vector<at::Tensor>> kept(changing_.kept.size());
  SignalPoll poll;
  size_t present = batches.size();  // none
  const double* row = numbers.const_data_ptr<double>();
  try {
    for (size_t batch : order) {
      if (batch != present) {
        present = batch;
        for (size_t j = 0; j < changing_.batch.size(); ++j) {
          if (changing_.batch[j] < 0) continue;
          at::Tensor& input = inputs[static_cast<size_t>(changing_.batch[j])];
          if (in_place)
            input.copy_(fitted[batch][j]);
          else
            input = fitted[batch][j];
        }
      }
      for (const auto& [slot, h] : slots) *slot = row[h];
      row += numbers.stride(0);
      make_step();
      std::vector<at::Tensor> fed;
      fed.reserve(changing_.feedback.size());
      for (const auto& [output, input] : changing_.feedback)
        fed.push_back(package_->fit(input, computed.at(output), layouts_[input]));
      for (size_t k = 0; k < kept.size(); ++k) {
        if (changing_.kept[k] < 0) continue;
        const at::Tensor& value = computed.at(static_cast<size_t>(changing_.kept[k]));
        if (value.numel() == 1) kept[k].push_back(in_place ? value.reshape({}).clone() : value.reshape({}));
      }
      std::vector<at::Tensor> returned = in_place ? computed : std::move(computed);
      if (in_place)
        for (at::Tensor& value :
             returned)  // a view of an input belongs to this step, and must not become the next one's
          for (const at::Tensor& input : written)
            if (value.is_alias_of(input)) value = value.clone();
      // Nothing can fail between here and the count: either all values are the new ones or none is.
      if (in_place)
        at::_foreach_copy_(written, fed);
      else
        for (size_t k = 0; k < fed.size(); ++k) inputs[changing_.feedback[k].second] = std::move(fed[k]);
      result.computed = std::move(returned);
      ++result.num_steps;
      poll();
    }
  } catch (...) {
    result.error = std::current_exception();
  }
  for (const auto& pair : changing_.feedback) result.fed.push_back(inputs[pair.second]);
  for (auto& values : kept) {
    values.resize(std::min(values.size(), static_cast<size_t>(result.num_steps)));  // an error may have come after one
    result.kept.push_back(values.empty() ? at::Tensor() : at::stack(values));
  }
  return result;
}

}  // namespace mlopt
