// `Package`: an AOTInductor package that checks what it is given.
//
// A package is machine code for one layout of its inputs and checks nothing: a wrong stride is a wrong number. Here
// every input is compared with the layout that was compiled for, which costs nanoseconds, and copied into it where it
// differs. Free sizes are read from the arguments; the layouts that belong to them are registered once per set of
// sizes, by the caller, who knows the expressions.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace mlopt {

// Sizes and strides of every input of a package.
struct Layout {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
};

class Package {
 public:
  using Body = std::function<std::vector<at::Tensor>(std::vector<at::Tensor>)>;

  // dtypes, devices: of the inputs. The package is loaded onto the first device that is no CPU.
  Package(const std::string& path, std::vector<at::ScalarType> dtypes, std::vector<at::Device> devices);

  // A function in place of machine code, for tests of what is built on packages: compiling one takes seconds.
  Package(Body body, std::vector<at::ScalarType> dtypes, std::vector<at::Device> devices);

  size_t num_inputs() const { return dtypes_.size(); }

  // Throws unless the input is of the layout's size and the right dtype, on the right device; returns it in the
  // layout's strides.
  at::Tensor fit(size_t k, const at::Tensor& input, const Layout& layout) const;

  // Inputs must be as `fit` returns them. Builds no autograd graph. Call it without the GIL.
  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs);

  // Makes every later run an error: whoever else holds the package is not to use it either.
  void give_up() { given_up_ = true; }

 private:
  std::vector<at::ScalarType> dtypes_;
  std::vector<at::Device> devices_;
  Body body_;
  bool given_up_ = false;
};

}  // namespace mlopt
