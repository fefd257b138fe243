"""`Graph`: the problems and who reads whom.

Edges are facts of the captured losses: if A's loss depends on parameters that B trains, there is an edge B -> A. With
B before A in the list (lowest first) it is a *lower_to_upper* edge: A is optimized on top of B's solution. With B after
A it is an *upper_to_lower* edge: B shapes A's loss. Declared dependencies are checked against these facts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import networkx as nx

from mlopt.errors import GraphError, StructureWarning
from mlopt.problem import Problem

LOWER_TO_UPPER = "lower_to_upper"
UPPER_TO_LOWER = "upper_to_lower"

Dependencies = Mapping[str, Mapping["str | Problem", "Sequence[str | Problem]"]]


class Graph:
    """The problems of one multilevel program.

    Args:
        problems: The problems, lowest level first.
        dependencies: Optional declaration ``{"u2l": {upper: [lower, ...]}, "l2u": {lower: [upper, ...]}}`` (names or
            problems). `mlopt.compile` checks that it equals what the losses read.

    Attributes:
        problems: Name -> problem, lowest first.

    Raises:
        GraphError: No list of problems, or an empty one, two problems of one name, a problem name that another problem
            uses as an attribute, or a declaration that names an unknown problem or a cycle.
    """

    def __init__(self, problems: Sequence[Problem], dependencies: Dependencies | None = None) -> None:
        self.problems: dict[str, Problem] = {}
        if not isinstance(problems, Iterable):
            raise GraphError(
                f"Graph, argument `problems`: expected a list of problems, got {type(problems).__name__}; write "
                "mlopt.Graph([lower, upper])"
            )
        problems = list(problems)
        if not problems:
            raise GraphError("Graph, argument `problems`: expected at least one problem, got none")
        for i, problem in enumerate(problems):
            if not isinstance(problem, Problem):
                raise GraphError(
                    f"Graph, argument `problems`[{i}]: expected a mlopt.Problem, got {type(problem).__name__}"
                )
            if problem.name in self.problems:
                raise GraphError(
                    f"Graph, argument `problems`: two problems are named {problem.name!r}; names must be unique"
                )
            self.problems[problem.name] = problem
        for problem in problems:
            for name in self.problems:
                if name != problem.name and name in problem.__dict__:
                    raise GraphError(
                        f"problem {problem.name!r} has an attribute {name!r}, which hides the problem of that name; "
                        "rename one of them"
                    )
        _check_owners(problems)
        tasks = {p.tasks: p.name for p in problems if p.tasks}
        if len(tasks) > 1:
            (a, first), (b, second) = list(tasks.items())[:2]
            raise GraphError(
                f"problem {second!r} has tasks={b}, problem {first!r} tasks={a}; one graph has one number of tasks"
            )
        self._declared = None if dependencies is None else self._read_dependencies(dependencies)
        self._reads: dict[str, dict[str, tuple[str, ...]]] | None = None
        for problem in problems:
            problem.bind(self.problems)

    @property
    def nx(self) -> nx.DiGraph:
        """The problem graph: nodes with ``level`` and ``problem``; edges with ``kind`` and ``parameters``.

        An edge B -> A means that A's loss reads B. ``kind`` is ``"lower_to_upper"`` or ``"upper_to_lower"``,
        ``parameters`` the names of the parameters of B that A's loss depends on.

        Raises:
            GraphError: The graph was not compiled yet: edges are found in the captured losses.
        """
        graph = nx.DiGraph()
        levels = self.levels()
        for name, problem in self.problems.items():
            graph.add_node(name, problem=problem, level=levels[name])
        for reader in self.problems:
            for name, parameters in self.reads(reader).items():
                graph.add_edge(name, reader, kind=self._kind(name, reader), parameters=parameters)
        return graph

    def reads(self, name: str) -> dict[str, tuple[str, ...]]:
        """Return, for each problem that the loss of `name` reads, the names of the parameters read."""
        if self._reads is None:
            raise GraphError(
                "the edges of this graph are not known yet: they are found in the losses by mlopt.compile(graph)"
            )
        return self._reads[name]

    def lowers(self, name: str) -> list[str]:
        """Return the problems with a lower_to_upper edge into `name`, lowest first."""
        return [other for other in self.problems if other in self.reads(name) and self.is_below(other, name)]

    def below(self, name: str) -> list[str]:
        """Return the problems from which lower_to_upper edges lead to `name`, lowest first."""
        found: set[str] = set()
        stack = self.lowers(name)
        while stack:
            lower = stack.pop()
            if lower not in found:
                found.add(lower)
                stack += self.lowers(lower)
        return [other for other in self.problems if other in found]

    def is_below(self, a: str, b: str) -> bool:
        """Whether problem `a` comes before `b` in the list."""
        order = list(self.problems)
        return order.index(a) < order.index(b)

    def levels(self) -> dict[str, int]:
        """Return each problem's level: 1 for problems that read no lower problem, else one above the highest read."""
        levels: dict[str, int] = {}
        for name in self.problems:  # a lower_to_upper edge always points to a later problem
            levels[name] = 1 + max((levels[lower] for lower in self.lowers(name)), default=0)
        return levels

    def set_reads(self, reads: Mapping[str, Mapping[str, tuple[str, ...]]]) -> None:
        """Take what the captured losses read, and check it (called by `mlopt.compile`).

        Raises:
            GraphError: A declared edge that no loss reads, or an edge that was not declared.
        """
        self._reads = {name: dict(reads[name]) for name in self.problems}
        if self._declared is not None:
            self._check_declared(self._declared)
        self._check_tasks()
        self._warn_about_structure()

    def advice_on_order(self, names: Sequence[str]) -> str:
        """Say that these problems in this order are probably what was meant, and how to have it."""
        return f"did you mean Graph([{', '.join(names)}])? The lowest comes first"

    def draw(self, path: str) -> None:
        """Write the problem graph as an SVG picture.

        Args:
            path: Where to write; by convention it ends in ``.svg``.
        """
        from mlopt.drawing import write_svg

        write_svg(path, self)

    def __repr__(self) -> str:
        """List the problems."""
        return f"Graph([{', '.join(self.problems)}])"

    def _kind(self, read: str, reader: str) -> str:
        return LOWER_TO_UPPER if self.is_below(read, reader) else UPPER_TO_LOWER

    def _read_dependencies(self, dependencies: Dependencies) -> set[tuple[str, str, str]]:
        unknown = set(dependencies) - {"u2l", "l2u"}
        if unknown:
            raise GraphError(
                f"Graph, argument `dependencies`: expected the keys 'u2l' and 'l2u', got {sorted(map(str, unknown))}"
            )
        edges = set()
        for key, kind in (("u2l", UPPER_TO_LOWER), ("l2u", LOWER_TO_UPPER)):
            for source, readers in dependencies.get(key, {}).items():
                for reader in readers:
                    edges.add((self._name(source), self._name(reader), kind))
        lower_to_upper = nx.DiGraph((a, b) for a, b, kind in edges if kind == LOWER_TO_UPPER)
        if not nx.is_directed_acyclic_graph(lower_to_upper):
            cycle = [a for a, _ in nx.find_cycle(lower_to_upper)]
            raise GraphError(
                f"Graph, argument `dependencies`: the l2u edges form a cycle {' -> '.join([*cycle, cycle[0]])}; "
                "a problem cannot be above itself"
            )
        for a, b, kind in sorted(edges):
            if self._kind(a, b) != kind:
                short = "u2l" if kind == UPPER_TO_LOWER else "l2u"
                order = "after" if kind == UPPER_TO_LOWER else "before"
                raise GraphError(
                    f"Graph, argument `dependencies`: {short} declares {a!r} -> {b!r}, so {a!r} must come {order} "
                    f"{b!r} in `problems` (lowest first), got the order {', '.join(self.problems)}"
                )
        return edges

    def _name(self, reference: str | Problem) -> str:
        name = reference.name if isinstance(reference, Problem) else reference
        if name not in self.problems:
            raise GraphError(
                f"Graph, argument `dependencies`: unknown problem {name!r} (problems: {', '.join(self.problems)})"
            )
        return name

    def _check_declared(self, declared: set[tuple[str, str, str]]) -> None:
        found = {(r, name, self._kind(r, name)) for name in self.problems for r in self.reads(name)}
        for read, reader, kind in sorted(declared - found):
            names = ", ".join(self.problems[read].trained_parameters())
            raise GraphError(
                f"the dependencies declare the {kind} edge {read!r} -> {reader!r}, but the loss of {reader!r} reads no "
                f"trained parameter of {read!r} (it has: {names}); use self.{read}(...) in its training_step, or "
                "remove the declaration"
            )
        for read, reader, kind in sorted(found - declared):
            raise GraphError(
                f"the loss of {reader!r} reads parameters of {read!r} ({', '.join(self.reads(reader)[read])}), but the "
                f"dependencies do not declare the {kind} edge {read!r} -> {reader!r}; declare it, detach the value, or "
                "leave out `dependencies` to have the edges found"
            )

    def _check_tasks(self) -> None:
        for name, problem in self.problems.items():
            for lower in self.lowers(name):
                if problem.tasks and not self.problems[lower].tasks:
                    raise GraphError(
                        f"problem {name!r} has {problem.tasks} tasks and reads the lower problem {lower!r}, which has "
                        f"none: every task would need a hypergradient of its own through it; give {lower!r} "
                        f"tasks={problem.tasks}, too"
                    )

    def _warn_about_structure(self) -> None:
        for name in self.problems:
            readers = [other for other in self.problems if name in self.reads(other)]
            if self.lowers(name) or not readers:
                continue
            below = [other for other in readers if self.is_below(other, name)]
            later = ", ".join(map(repr, self.reads(name)))  # it reads no lower one
            if below:
                warnings.warn(
                    f"problem {name!r} shapes the loss of {', '.join(map(repr, below))} but its own loss reads none of "
                    "the problems below it: its hypergradient is its direct gradient only"
                    + (
                        f". It reads {later}, which comes after it in the list; the lowest comes first" if later else ""
                    ),
                    StructureWarning,
                    stacklevel=5,
                )


def _check_owners(problems: Sequence[Problem]) -> None:
    owners: dict[int, tuple[str, str]] = {}
    for problem in problems:
        for name, parameter in problem.trained_parameters().items():
            other = owners.setdefault(id(parameter), (problem.name, name))
            if other != (problem.name, name):
                raise GraphError(
                    f"parameter {name!r} of problem {problem.name!r} is also trained by problem {other[0]!r} (as "
                    f"{other[1]!r}); give it to one optimizer only"
                )
