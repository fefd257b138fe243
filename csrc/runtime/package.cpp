#include "package.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_strided.h>
#include <dlfcn.h>

#include <utility>

#include "workspace.h"

namespace mlopt {
namespace {

at::DeviceIndex index_of(const std::vector<at::Device>& devices) {
  for (const at::Device& device : devices)
    if (!device.is_cpu()) return device.index();
  return -1;
}

// Packages call kernels of this library by name, and Python has loaded it without showing its names to others. Returns
// the path, so that this is done before the loader opens the package.
const std::string& show_names_to(const std::string& path) {
  static const bool shown = [] {
    Dl_info here;
    return dladdr(reinterpret_cast<void*>(&show_names_to), &here) != 0 &&
           dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL) != nullptr;
  }();
  TORCH_CHECK(shown, "package: the kernels of mlopt cannot be shown to packages");
  return path;
}

}  // namespace

// run_single_threaded: a plan makes one call at a time, so the loader's own locks have nothing to protect.
Package::Package(const std::string& path, std::vector<at::ScalarType> dtypes, std::vector<at::Device> devices)
    : dtypes_(std::move(dtypes)), devices_(std::move(devices)) {
  using Loader = torch::inductor::AOTIModelPackageLoader;
  const auto loader = std::make_shared<Loader>(show_names_to(path), "model", /*run_single_threaded=*/true,
                                               /*num_runners=*/1, index_of(devices_));
  body_ = [loader](std::vector<at::Tensor> inputs) { return loader->boxed_run(std::move(inputs)); };
}

Package::Package(Body body, std::vector<at::ScalarType> dtypes, std::vector<at::Device> devices)
    : dtypes_(std::move(dtypes)), devices_(std::move(devices)), body_(std::move(body)) {}

at::Tensor Package::fit(size_t k, const at::Tensor& input, const Layout& layout) const {
  TORCH_CHECK(input.scalar_type() == dtypes_[k] && input.sizes() == at::IntArrayRef(layout.sizes), "package: input ", k,
              " is ", input.scalar_type(), " of shape ", input.sizes(), ", expected ", dtypes_[k], " of shape ",
              at::IntArrayRef(layout.sizes));
  const at::Device& device = devices_[k];
  TORCH_CHECK(input.device() == device || (!device.has_index() && input.device().type() == device.type()),
              "package: input ", k, " is on ", input.device(), ", expected ", device);
  bool same = true;
  for (size_t d = 0; d < layout.sizes.size(); ++d)
    same = same && (layout.sizes[d] == 1 || input.stride(static_cast<int64_t>(d)) == layout.strides[d]);
  // Code for a GPU loads vectors of 16 bytes from where a tensor begins.
  const bool aligned = input.is_cpu() || reinterpret_cast<uintptr_t>(input.const_data_ptr()) % 16 == 0;
  if ((same && aligned) || input.numel() == 0) return input;
  const at::NoGradGuard no_grad;
  at::Tensor copy = at::empty_strided(layout.sizes, layout.strides, input.options().requires_grad(false));
  copy.copy_(input);
  return copy;
}

std::vector<at::Tensor> Package::run(std::vector<at::Tensor> inputs) {
  TORCH_CHECK(!given_up_, "package: it has failed before");
  const at::NoGradGuard no_grad;
  const WorkspaceScope scope;
  return body_(std::move(inputs));
}

}  // namespace mlopt
