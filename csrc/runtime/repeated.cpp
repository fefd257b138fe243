#include "repeated.h"

#include <utility>

namespace py = pybind11;

namespace mlopt {

bool worth_recording(const std::vector<at::Tensor>& inputs) {
  int64_t num_read = 0;
  for (const at::Tensor& input : inputs) num_read += input.defined() ? input.numel() : 0;
  return num_read <= kMostWorthRecording;
}

Repeated::Repeated(py::handle recorder, int64_t times, std::function<void()> body) : body_(std::move(body)) {
  if (recorder && !recorder.is_none() && times >= kFewestWorthRecording) recorder_ = recorder;
}

Repeated::~Repeated() {
  if (!replay_) return;
  const py::gil_scoped_acquire gil;
  replay_ = py::object();
}

void Repeated::operator()() {
  // The first time runs as it is: it loads kernels and makes the memory that later times find.
  if (times_done_++ == 1 && recorder_) {
    const py::gil_scoped_acquire gil;
    py::object made = recorder_.attr("record")(py::cpp_function([this] {
      const py::gil_scoped_release no_gil;
      body_();
    }));
    if (!made.is_none()) replay_ = std::move(made);
  }
  if (!replay_) return body_();
  const py::gil_scoped_acquire gil;
  replay_();
}

}  // namespace mlopt
