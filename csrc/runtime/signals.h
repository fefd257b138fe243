#pragma once

#include <pybind11/pybind11.h>

#include <chrono>

namespace mlopt {

// Lets Ctrl-C end a loop: every so often, and not every step, because it needs the GIL.
class SignalPoll {
 public:
  // Throws the exception of the Python signal handler that ran, if one did and raised.
  void operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now < next_) return;
    next_ = now + std::chrono::milliseconds(50);
    const pybind11::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
  }

 private:
  std::chrono::steady_clock::time_point next_ = std::chrono::steady_clock::now() + std::chrono::milliseconds(50);
};

}  // namespace mlopt
