"""Imports follow the arrows: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "mlopt"

# package or module of mlopt -> what it may import of mlopt besides itself
ALLOWED = {
    "errors": set(),
    "ops": {"precision"},
    "linalg": {"ops"},
    "hypergradient": {"linalg"},
    "precision": set(),
    "problem": {"errors", "hypergradient", "precision"},
    "capture": {"errors", "passes", "precision", "problem"},
    "passes": {"precision"},
    "autodiff": {"capture", "errors", "passes", "precision"},
    "drawing": {"graph", "planner"},  # for annotations only
    "graph": {"drawing", "errors", "problem"},
    "planner": {"graph", "hypergradient"},
    "backends": {"errors", "ops", "passes"},
    "runtime": {
        "autodiff",
        "backends",
        "capture",
        "drawing",
        "errors",
        "graph",
        "hypergradient",
        "linalg",
        "ops",
        "planner",
        "precision",
        "problem",
    },
    "checks": {"autodiff", "errors", "graph", "planner", "problem"},
    "compiler": {"autodiff", "backends", "capture", "checks", "errors", "graph", "planner", "runtime"},
    "compile": {"backends", "compiler", "errors", "graph", "runtime"},
    "engine": {"errors", "graph", "runtime"},
    "compat": {"engine", "errors"},  # and the public names
    "cli": {"backends", "ops"},  # and the public names
    "__main__": {"cli"},
}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def unit(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"mlopt.{a.name}" for a in node.names] if node.module == "mlopt" else [node.module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "mlopt" and len(parts) > 1 and parts[1] != "_C":
                yield parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    name = unit(path)
    assert name in ALLOWED, f"{name} is new: say in this table what it may import"
    forbidden = set(imported(path)) - ALLOWED[name] - {name}
    assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}"


def test_reference_never_imports_the_extension():
    for path in (ROOT / "ops" / "reference").rglob("*.py"):
        assert "_C" not in {part for n in ast.walk(ast.parse(path.read_text())) for part in _names(n)}


def _names(node):
    if isinstance(node, ast.ImportFrom):
        return [a.name for a in node.names]
    return [a.name for a in node.names] if isinstance(node, ast.Import) else []


def test_networkx_stays_where_graphs_are():
    users = {str(p.relative_to(ROOT)) for p in FILES if "networkx" in p.read_text()}
    assert users == {"autodiff/recompute.py", "graph.py", "planner/adjoint.py"}
