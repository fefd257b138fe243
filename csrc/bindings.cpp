// The Python module mlopt._C. Importing it registers the ops (ops.cpp and the families' _op.cpp files); what is bound
// here is only what is not a tensor op.
#include "runtime/bindings.h"

#include <pybind11/pybind11.h>
#include <torch/version.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of mlopt.";
  m.def("build_config", [] {
    pybind11::dict config;
    config["torch"] = TORCH_VERSION;
    config["compiler"] = __VERSION__;
#ifdef MLOPT_WITH_CUDA
    config["cuda"] = MLOPT_WITH_CUDA;
#else
    config["cuda"] = pybind11::none();
#endif
    return config;
  });
  mlopt::bind_runtime(m);
}
