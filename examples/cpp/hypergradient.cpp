// Evaluates a hypergradient that `Plan.export_hypergradient` wrote: no Python, and of torch only its C++ library.
//
//   hypergradient FOLDER [RESULT]
//
// An embedding program would hand its own tensors to `point`, in the order of hypergradient.json; here they are those
// that the plan had. RESULT is for torch.load.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <iterator>

using torch::Tensor;
using Package = torch::inductor::AOTIModelPackageLoader;
using Product = std::function<Tensor(const Tensor&)>;
using Settings = std::unordered_map<std::string, std::string>;

std::vector<Tensor> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const torch::IValue list = torch::pickle_load({std::istreambuf_iterator<char>(file), {}});
  std::vector<Tensor> tensors;
  for (const torch::IValue& value : list.toListRef()) tensors.push_back(value.toTensor());
  return tensors;
}

// Conjugate gradients on A + damping I (Hestenes and Stiefel 1952), from zero.
Tensor cg(const Product& a, const Tensor& b, int max_steps, double rtol, double damping) {
  Tensor x = torch::zeros_like(b), r = b.clone(), p = r.clone();
  double rr = r.dot(r).item<double>();
  const double enough = rtol * rtol * rr;
  for (int step = 0; step < max_steps && rr > enough; ++step) {
    const Tensor ap = a(p).add(p, damping);
    const double curvature = p.dot(ap).item<double>();
    if (!(curvature > 0)) break;  // A is not positive definite: what came before is the answer
    x.add_(p, rr / curvature);
    r.sub_(ap, rr / curvature);
    const double previous = std::exchange(rr, r.dot(r).item<double>());
    p.mul_(rr / previous).add_(r);
  }
  return x;
}

// scale * sum over k < num_terms of (I - scale A)^k b (Lorraine, Vicol and Duvenaud 2020).
Tensor neumann(const Product& a, const Tensor& b, int num_terms, double scale) {
  Tensor term = b.clone(), total = b.clone();
  for (int k = 1; k < num_terms; ++k) total.add_(term.sub_(a(term), scale));
  return total.mul_(scale);
}

int main(int argc, char** argv) {
  if (argc < 2) return std::cerr << "usage: hypergradient FOLDER [RESULT]\n", 2;
  const c10::InferenceMode no_autograd;
  const std::string folder = std::string(argv[1]) + "/";
  Package point(folder + "point.pt2"), hvp(folder + "hvp.pt2"), mixed(folder + "mixed.pt2");
  Settings settings = point.get_metadata();

  const std::vector<Tensor> made = point.run(read_tensors(folder + "inputs.pt"));
  const auto with_residuals = [&made](const Tensor& vector) {  // the arguments of both products
    std::vector<Tensor> arguments(made.begin() + 2, made.end());
    arguments.push_back(vector);
    return arguments;
  };
  const Product product = [&](const Tensor& p) { return hvp.run(with_residuals(p)).at(0); };
  const Tensor& v = made.at(1);
  const auto number = [&settings](const char* name) { return std::stod(settings.at(name)); };
  const Tensor q = settings.at("solver") == "CG"
                       ? cg(product, v, number("max_steps"), number("rtol"), number("damping"))
                       : neumann(product, v, number("num_terms"), number("scale"));
  const Tensor gradient = made.at(0) - mixed.run(with_residuals(q)).at(0);

  std::cout << "hypergradient of " << gradient.numel() << " elements, norm " << gradient.norm().item<double>() << "\n";
  if (argc > 2) {
    const std::vector<char> bytes = torch::pickle_save(gradient);
    std::ofstream(argv[2], std::ios::binary).write(bytes.data(), bytes.size());
  }
}
