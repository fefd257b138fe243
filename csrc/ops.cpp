// Every op of the extension: the table of contents of the native side.
//
// Tensors are [N] or [K, N]; per-row scalars are [] or [K]. A trailing underscore marks an op that writes its inputs,
// which the schema declares. Semantics are documented at the Python wrappers, mlopt/ops/.
#include <torch/library.h>

TORCH_LIBRARY(mlopt, m) {
  // vector
  m.def("dot(Tensor a, Tensor b) -> Tensor");
  m.def("norm(Tensor a) -> Tensor");
  m.def("cg_step_(Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor ap, Tensor(d!) state) -> ()");
  m.def("neumann_step_(Tensor(a!) v, Tensor(b!) acc, Tensor av, float scale) -> ()");
  m.def("perturb(Tensor x, Tensor direction, Tensor step) -> Tensor");
}
