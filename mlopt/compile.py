"""The main path of the compiler: start reading here.

``compile`` captures every loss (`mlopt.capture`), finds the problem graph in them (`mlopt.graph`), plans what each
problem's step needs (`mlopt.planner`), differentiates just that (`mlopt.autodiff`, which also runs `mlopt.passes`),
lowers the graphs (`mlopt.backends`), checks them against eager autograd, and hands back a `Plan` (`mlopt.runtime`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from tqdm import tqdm

from mlopt.backends import get_backend
from mlopt.compiler import Compiler
from mlopt.errors import GraphError, MloptError
from mlopt.graph import Graph
from mlopt.runtime.execute import Executor
from mlopt.runtime.plan import Plan


def compile(  # noqa: A001 - the name users know from torch.compile and re.compile
    graph: Graph,
    *,
    backend: str = "auto",
    verify: bool = True,
    strict: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    residual_budget: int | None = None,
    progress: bool = True,
) -> Plan:
    """Compile a multilevel program.

    Runs every `training_step` a fixed number of times (once to capture it; with ``verify``, up to four times more, on
    the first batch); the steps that follow run the captured graphs. The first batch of each problem's data is fetched
    and is the one its first step uses. No parameter, buffer, optimizer or random generator is changed.

    Args:
        graph: The problems.
        backend: What runs the graphs. ``"eager"``: torch calls. ``"inductor"``: machine code by AOTInductor, compiled
            in parallel processes and kept on disk; the first compilation of a program takes 10 seconds to minutes,
            the next ones under a second. ``"native"``: the kernels of mlopt where graphs have the structure they are
            written for (`explain` says which), torch calls elsewhere. ``"auto"``: the fastest of all these on the first
            batch, graph by graph, of what can be used here; ``$MLOPT_BACKEND`` overrides it, and ``MLOPT_KERNELS=0``
            leaves the kernels out. Whatever has to be captured later (a batch of another structure, a size that a graph
            does not hold for) runs by torch calls unless the cache has it: training is never stopped to compile.
        verify: Compare every derivative with plain autograd on the first batch. Where they disagree, that problem's
            derivatives are taken by plain autograd from then on, and a `VerificationWarning` says so.
        strict: Raise instead of falling back.
        cache_dir: Where compiled graphs are kept; default: ``$MLOPT_CACHE_DIR``, else ``~/.cache/mlopt``.
        residual_budget: The most bytes that may be kept of one problem's forward and backward pass for its
            second-order products. Default: what is fastest: everything but what compiled code gets for nothing. With
            less, more is computed again in every product, convolutions and matrix products last of all; `explain` says
            what is kept.
        progress: Show a progress bar on a terminal.

    Returns:
        The compiled program.

    Raises:
        ValueError: An unknown backend, or a `residual_budget` that is not an integer >= 0.
        GraphError: `graph` is no graph, or its declared dependencies differ from what the losses read.
        ProblemError: The parameters of one program lie on different devices, an optimizer cannot step or has no part in
            the problem's scheduler, or an estimator refuses a problem.
        LossError: A `training_step` returns no differentiable scalar, or a loss without the structure that the
            curvature of its estimator needs.
        CaptureError: A `training_step` cannot be captured (with ``strict``), or fails by itself.
        DataError: A problem's data is empty.
        VerificationError: With ``strict``, a derivative disagrees with plain autograd.
    """
    if not isinstance(graph, Graph):
        raise GraphError(
            f"compile, argument `graph`: expected an mlopt.Graph, got {type(graph).__name__}; put the problems into "
            "one: mlopt.compile(mlopt.Graph([lower, upper]))"
        )
    if residual_budget is not None and (not isinstance(residual_budget, int) or residual_budget < 0):
        raise ValueError(f"compile, argument `residual_budget`: expected bytes >= 0 or None, got {residual_budget!r}")
    compiler = Compiler(
        graph,
        get_backend(backend, cache_dir),
        verify=verify,
        strict=strict,
        residual_budget=residual_budget,
        cache_dir=cache_dir,
    )
    with tqdm(total=2 * len(graph.problems), desc="compile", leave=False, disable=None if progress else True) as bar:
        for name in graph.problems:
            bar.set_postfix_str(f"capture {name}")
            with _named(name):
                compiler.capture(name)
            bar.update()
        program = compiler.plan()
        for name in graph.problems:
            bar.set_postfix_str(f"differentiate {name}")
            with _named(name):
                compiler.differentiate(name)
        compiler.lower(lambda done, total: bar.set_postfix_str(f"{done} of {total} graphs compiled"))
        for name in graph.problems:
            bar.set_postfix_str(f"verify {name}")
            with _named(name):
                compiler.derive(name, compiler.streams[name].peek())
            bar.update()
    compiler.backend.seal()
    seen = {name: compiler.seen(name) for name in graph.problems}
    executor = Executor(program, graph.problems, compiler.layouts, compiler.derive, compiler.streams, seen=seen)
    return Plan(graph, program, executor, compiler.report, compiler.autograd, compiler.warm_up)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Let an error of the user's code, which knows of no problems, say whose code it was, as those of steps do."""
    try:
        yield
    except MloptError:
        raise
    except Exception as error:
        error.add_note(f"(in problem {name!r}, on its first batch, while it was compiled)")
        raise
