#pragma once

#include <pybind11/pybind11.h>

namespace mlopt {

void bind_runtime(pybind11::module& m);

}  // namespace mlopt
