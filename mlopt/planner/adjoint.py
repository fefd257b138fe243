"""The hypergradient of one problem as a walk over the problem graph.

For an upper problem U one backward of its loss gives the direct gradient and a cotangent for every problem it reads.
Lower problems are then visited in reverse topological order: at each one the arriving cotangents are *summed*, one
system is solved, and one mixed product sends the result on to every problem its loss reads. This is reverse-mode
differentiation of the program at the level of problems, so the cost is linear in the edges; enumerating paths (Choe
et al. 2022, arXiv 2207.02849, section 3) is exponential.

Conventions:

- H at a problem is the partial Hessian of that problem's own loss (as in the paper above), also where the problem is
  itself an upper one.
- A problem is below U if U's loss reads it, or the loss of one below U reads it, along lower_to_upper edges. Only
  problems below U whose optimum can depend on U are visited; the parameters of all others are constants. So two upper
  problems that share a lower one, and do not read each other, each take the other's parameters as given.
- Where two problems read each other (a problem B and one above it, W, whose loss reads B's optimum), there is no
  topological order. Let W's condition be ``dg_W/dw (w, b*(w), u) = 0``. The upper loss depends on w also through b*(w),
  so B is visited first and sends to w; W is solved next; its condition depends on u also through b*, so B is visited
  once more on W's behalf, and what that visit would send back to w is dropped (this is the partial-Hessian
  convention). `_walk` does so for any number of problems that read each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import networkx as nx

from mlopt.hypergradient import AbstractEstimator
from mlopt.planner.instructions import (
    HYPERGRADIENT,
    Gradient,
    Instruction,
    Linearize,
    MixedProduct,
    ReverseSteps,
    Solve,
    Update,
)


def plan_hypergradient(
    upper: str, order: list[str], reads: Mapping[str, Collection[str]], estimators: Mapping[str, AbstractEstimator]
) -> tuple[Instruction, ...]:
    """Plan one step of a problem: its gradient, what flows through the problems below it, its update.

    Args:
        upper: The problem to differentiate for.
        order: All problems, lowest first.
        reads: For each problem, the others whose trained parameters its loss reads.
        estimators: The estimator of each problem.

    Returns:
        The instructions, in order.
    """
    return _AdjointPlanner(upper, order, reads, estimators).plan()


class _AdjointPlanner:
    def __init__(
        self,
        upper: str,
        order: list[str],
        reads: Mapping[str, Collection[str]],
        estimators: Mapping[str, AbstractEstimator],
    ) -> None:
        self.upper = upper
        self.rank = {name: i for i, name in enumerate(order)}
        self.estimators = estimators
        down = nx.DiGraph((a, b) for a in order for b in reads[a] if self.rank[b] < self.rank[a])
        down.add_nodes_from(order)
        below = nx.descendants(down, upper)
        self.reads = {n: [r for r in order if r in reads[n]] for n in order if n in below or n == upper}
        within = nx.DiGraph((a, b) for a in self.reads for b in self.reads[a] if b in self.reads)
        within.add_nodes_from(self.reads)
        dependent = nx.ancestors(within, upper)  # problems from which the upper parameters can be reached
        self.relevant = [n for n in self.reads if n in dependent]
        self.graph = within.subgraph(self.relevant)
        self.instructions: list[Instruction] = []
        self.linearized: set[str] = set()
        self.filled: set[str] = set()
        self.num_slots: dict[str, int] = {}

    def plan(self) -> tuple[Instruction, ...]:
        slots = {name: self.new_slot("v", name) for name in self.relevant}
        cotangents = tuple((r, slots[r]) for r in self.reads[self.upper] if r in slots)
        self.filled.update(slot for _, slot in cotangents)
        self.instructions.append(Gradient(self.upper, cotangents))
        self._walk(self.relevant, slots, {self.upper: HYPERGRADIENT})
        self.instructions.append(Update(self.upper))
        return _without_unused(self.instructions)

    def new_slot(self, kind: str, name: str) -> str:
        key = f"{kind}[{name}]"
        self.num_slots[key] = self.num_slots.get(key, 0) + 1
        count = self.num_slots[key]
        return key if count == 1 else f"{kind}{count}[{name}]"

    def _walk(self, nodes: Collection[str], slots: Mapping[str, str], outside: Mapping[str, str]) -> None:
        """Visit `nodes`, whose cotangents are in `slots`; what they send elsewhere goes to `outside` or is dropped."""
        graph = self.graph.subgraph(nodes)
        components = nx.condensation(graph)

        def highest_first(component: int) -> int:
            return -max(self.rank[name] for name in components.nodes[component]["members"])

        for component in nx.lexicographical_topological_sort(components, key=highest_first):
            members = sorted(components.nodes[component]["members"], key=self.rank.__getitem__)
            for name in members:
                lower = [m for m in members if self.rank[m] < self.rank[name]]
                if slots[name] not in self.filled:
                    continue
                inner = {m: self.new_slot("v", m) for m in lower if len(members) > 1}
                sent = self._visit(name, slots[name], {**outside, **slots, **inner})
                if any(m in sent for m in inner):
                    rest = {m: slot for m, slot in {**outside, **slots}.items() if m not in inner and m != name}
                    self._walk(list(inner), inner, rest)

    def _visit(self, name: str, slot: str, destinations: Mapping[str, str]) -> list[str]:
        """Solve at one problem and send the mixed products on; return the problems that were sent to."""
        estimator = self.estimators[name]
        targets = tuple((r, destinations[r]) for r in self.reads[name] if r in destinations and r != name)
        if not targets:
            return []
        if estimator.unrolled_steps is not None:
            self.instructions.append(ReverseSteps(name, slot, targets, estimator.unrolled_steps))
            self.filled.update(s for _, s in targets)
            return [r for r, _ in targets]
        if name not in self.linearized and (estimator.uses_hvp or estimator.mixed_step is None):
            self.linearized.add(name)
            self.instructions.append(Linearize(name))
        out = self.new_slot("q", name)
        self.instructions.append(Solve(name, slot, out, estimator))
        self.instructions.append(MixedProduct(name, out, targets, estimator.mixed_step))
        self.filled.update(s for _, s in targets)
        return [r for r, _ in targets]


def _without_unused(instructions: list[Instruction]) -> tuple[Instruction, ...]:
    """Drop what does not end in the hypergradient: cotangents may arrive where nothing leads on to the upper."""
    used = {HYPERGRADIENT}
    linearized: set[str] = set()
    kept: list[Instruction] = []
    for instruction in reversed(instructions):
        if isinstance(instruction, MixedProduct):
            targets = tuple((r, slot) for r, slot in instruction.targets if slot in used)
            if not targets:
                continue
            used.add(instruction.vector)
            if instruction.step is None:
                linearized.add(instruction.problem)
            instruction = dataclasses.replace(instruction, targets=targets)
        elif isinstance(instruction, ReverseSteps):
            targets = tuple((r, slot) for r, slot in instruction.targets if slot in used)
            if not targets:
                continue
            used.add(instruction.rhs)
            instruction = dataclasses.replace(instruction, targets=targets)
        elif isinstance(instruction, Solve):
            if instruction.out not in used:
                continue
            used.add(instruction.rhs)
            if instruction.estimator.uses_hvp:
                linearized.add(instruction.problem)
        elif isinstance(instruction, Linearize):
            if instruction.problem not in linearized:
                continue
        elif isinstance(instruction, Gradient):
            cotangents = tuple((r, slot) for r, slot in instruction.cotangents if slot in used)
            instruction = dataclasses.replace(instruction, cotangents=cotangents)
        kept.append(instruction)
    return tuple(reversed(kept))
