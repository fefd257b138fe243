"""Runs the scripts of this folder with mlopt's names in place of Betty's, and with Betty where it is installed.

python -m tests.compat.running        # where Betty 0.1.1 is installed: write betty_results.json, print differences
"""

import importlib.util
import inspect
import json
import logging
import sys
import warnings
from pathlib import Path

import torch

from mlopt.compat import betty as ours

RECORDED = Path(__file__).parent / "betty_results.json"  # what Betty 0.1.1 makes of CASES
SCRIPTS = Path(__file__).parent / "scripts"
NAMES = ("betty", "betty.configs", "betty.engine", "betty.problems", "betty.envs")


def load(name, betty=ours):
    """Import a script; with `betty` for Betty, or with the real one, if that is None."""
    hidden = {}
    if betty is not None:
        hidden = {k: sys.modules.pop(k) for k in list(sys.modules) if k.split(".")[0] == "betty"}
        sys.modules.update(dict.fromkeys(NAMES, betty))
    try:
        spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        if betty is not None:
            for key in NAMES:
                del sys.modules[key]
            sys.modules.update(hidden)
    return module


def repair_betty():
    """Let Betty's finite difference put the parameters back, which an ``add`` in place of ``add_`` prevents."""
    importlib.import_module("betty.hypergradient")
    package, module = sys.modules["betty.hypergradient"], sys.modules["betty.hypergradient.darts"]
    names = dict(vars(module))
    exec(inspect.getsource(module.darts).replace("p.data.add(v.data", "p.data.add_(v.data"), names)
    package.jvp_fn_mapping["darts"] = names["darts"]


def train(name, betty=ours, **options):
    """Run a script in float64; return the trained parameters, flat, by module."""
    results = load(name, betty).main(**options)
    modules = {key: found for key, found in results.items() if isinstance(found, torch.nn.Module)}
    return {key: torch.cat([p.detach().reshape(-1) for p in m.parameters()]) for key, m in modules.items()}


def difference(a, b):
    """Return the largest relative difference."""
    return max(float((a[key] - b[key]).norm() / a[key].norm()) for key in a)


# Not imaml: Betty fetches the first batches in another order; not dirty: 0.1.1 cannot read its batches.
CASES = {
    "quick_start neumann": ("quick_start", {"type": "neumann", "neumann_iterations": 3, "neumann_alpha": 0.1}),
    "quick_start darts": ("quick_start", {"type": "darts"}),
    "quick_start cg": ("quick_start", {"type": "cg", "cg_iterations": 1}),
    "logging_and_memory neumann": ("logging_and_memory", {}),
    "hpo neumann": ("hpo", {"type": "neumann", "neumann_iterations": 5, "neumann_alpha": 0.5}),
    "hpo darts": ("hpo", {"type": "darts"}),
    "hpo cg": ("hpo", {"type": "cg", "cg_iterations": 1}),
    "three_levels darts": ("three_levels", {"type": "darts"}),
}


def main():
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    repair_betty()
    recorded = {}
    for case, (name, options) in CASES.items():
        theirs = train(name, None, **options)
        print(f"{case:30} {difference(theirs, train(name, **options)):.1e}")
        recorded[case] = {key: values.tolist() for key, values in theirs.items()}
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
