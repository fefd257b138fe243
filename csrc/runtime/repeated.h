// `Repeated`: a piece of work that is done again and again on the same tensors.
//
// On a GPU the second time is recorded as a CUDA graph, and every later time replays it: one launch in place of one per
// kernel, which is what small problems spend their time on. Recording goes through torch's own CUDA graphs, in
// mlopt/ops/recorder.py, because torch's allocator has to know of it; nothing here links CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace mlopt {

// Below this many times, recording (about the price of doing the work once more, on the host) does not pay.
constexpr int64_t kFewestWorthRecording = 4;
// Above this many elements read, the work takes longer than its launches, and a recording would hold the memory of its
// intermediates for nothing.
constexpr int64_t kMostWorthRecording = int64_t(1) << 24;

// Whether work that reads these tensors is small enough; undefined ones count nothing.
bool worth_recording(const std::vector<at::Tensor>& inputs);

class Repeated {
 public:
  // recorder: nothing, None, or an object whose `record(function)` records what a call launches, without running it,
  // and returns a function that runs it, or None where that cannot be. body: has to read and write the same tensors
  // every time, and decide nothing by their values. times: how often it will be called, at most.
  Repeated(pybind11::handle recorder, int64_t times, std::function<void()> body);
  ~Repeated();
  Repeated(const Repeated&) = delete;
  Repeated& operator=(const Repeated&) = delete;

  // Does the work. Call it without the GIL.
  void operator()();

 private:
  std::function<void()> body_;
  pybind11::handle recorder_;  // the caller's, who keeps it
  pybind11::object replay_;
  int64_t times_done_ = 0;
};

}  // namespace mlopt
