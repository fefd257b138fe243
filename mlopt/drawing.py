"""The problem graph as an SVG picture, written directly so that no drawing program is needed.

Problems are boxes in rows by level, lowest at the bottom. Solid arrows are lower_to_upper edges (a solution is used
above), dashed arrows are upper_to_lower edges (an upper problem shapes the loss); with a program, the dashed ones also
tell how the hypergradient comes back along them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from mlopt.graph import Graph
    from mlopt.planner import ExecutionPlan

_FONT = "Helvetica, Arial, sans-serif"
_LINE = 18  # height of a text line
_WIDTH_OF_CHARACTER = 6.7  # at 12 px, a little more than the mean of the fonts above
_GAP_X, _GAP_Y, _MARGIN = 150, 120, 30
_SOLID, _DASHED = "#1f5fa8", "#b3541e"


@dataclasses.dataclass
class _Box:
    name: str
    lines: list[str]
    level: int
    is_island: bool = False
    x: float = 0.0  # centre
    y: float = 0.0  # top

    @property
    def width(self) -> float:
        return max(120.0, *(_text_width(line) + 28 for line in [self.name + "    ", *self.lines]))

    @property
    def height(self) -> float:
        return 34 + _LINE * len(self.lines)


def write_svg(
    path: str | os.PathLike[str], graph: Graph, program: ExecutionPlan | None = None, islands: Collection[str] = ()
) -> None:
    """Draw a problem graph whose edges are known.

    Args:
        path: File to write.
        graph: The problem graph.
        program: If given, boxes tell schedules and edges tell estimators and costs.
        islands: Problems that run by plain autograd; their boxes are dashed.
    """
    with open(path, "w", encoding="utf-8") as file:
        file.write(to_svg(graph, program, islands))


def to_svg(graph: Graph, program: ExecutionPlan | None = None, islands: Collection[str] = ()) -> str:
    """Return the picture as SVG text."""
    edges = list(graph.nx.edges(data=True))
    boxes = _place(_boxes(graph, program, islands), edges)
    body: list[str] = []
    labels: list[str] = []
    right = max(b.x + b.width / 2 for b in boxes.values())
    left = min(b.x - b.width / 2 for b in boxes.values())
    sides, num_around = (left, right), {True: 0, False: 0}
    legend_width = 470.0
    across = {(s, r) for s, r, _ in edges if _are_neighbours(boxes[s], boxes[r], boxes)}
    ports = _ports([e for e in edges if e[:2] not in across], boxes)
    for source, reader, data in edges:
        dashed = data["kind"] == "upper_to_lower"
        swing = None
        if abs(boxes[source].level - boxes[reader].level) > 1:
            # Around all boxes instead of behind those between: solid edges on the left, dashed ones on the right.
            num_around[dashed] += 1
            distance = 45 * num_around[dashed]
            swing = sides[1] + distance if dashed else sides[0] - distance
        if (source, reader) in across:
            points = _across(boxes[source], boxes[reader])
        else:
            points = _route(boxes[source], boxes[reader], *ports[source, reader], swing)
        curve, at = _bezier(points, 0.5 if swing is not None else 0.55 if dashed else 0.45)
        color = _DASHED if dashed else _SOLID
        style = ' stroke-dasharray="6 4"' if dashed else ""
        marker = "up" if dashed else "low"
        body.append(
            f'<path d="{curve}" fill="none" stroke="{color}" stroke-width="1.6"{style} marker-end="url(#{marker})"/>'
        )
        text = _edge_lines(source, reader, data, program)
        width = max(map(_text_width, text)) + 10
        # Beside its edge, outward: left of solid edges, right of dashed ones, so that a pair keeps clear of each other.
        # An edge along a row has its label below.
        centre, height_of_label = at[0] + (1 if dashed else -1) * (width / 2 + 5), at[1]
        if (source, reader) in across:
            centre, height_of_label = at[0], at[1] + 10 + _LINE * len(text) / 2
        labels.append(_label((centre, height_of_label), text, width, color))
        left, right = min(left, centre - width / 2), max(right, centre + width / 2)
    bottom = max(b.y + b.height for b in boxes.values())
    legend_y = bottom + 34
    middle = (left + right) / 2
    x0, x1 = min(left, middle - legend_width / 2) - _MARGIN, max(right, middle + legend_width / 2) + _MARGIN
    body += labels
    body += [_draw_box(box) for box in boxes.values()]  # last: a crowded label may cover an edge, never a box
    body.append(_legend(middle - legend_width / 2, legend_y))
    height = legend_y + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{x0:.0f} 0 {x1 - x0:.0f} {height:.0f}" '
        f'width="{x1 - x0:.0f}" height="{height:.0f}" font-family="{_FONT}" font-size="12">\n'
        f"<title>mlopt problem graph: {escape(', '.join(graph.problems))}</title>\n"
        f"<defs>{_marker('low', _SOLID)}{_marker('up', _DASHED)}</defs>\n"
        f'<rect x="{x0:.0f}" y="0" width="{x1 - x0:.0f}" height="{height:.0f}" fill="white"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _boxes(graph: Graph, program: ExecutionPlan | None, islands: Collection[str] = ()) -> dict[str, _Box]:
    boxes = {}
    for name, level in graph.levels().items():
        problem = graph.problems[name]
        count = sum(p.numel() for p in problem.trained_parameters().values())
        lines = [f"{type(problem.optimizer).__name__}, {count:,} parameters"]
        if program is not None:
            lowers = program[name].lowers
            due = ", ".join(f"{graph.problems[lower].unroll_steps} of {lower}" for lower in lowers)
            lines.append(f"steps after {due}" if lowers else "steps every time")
        if name in islands:
            lines.append("eager island")
        boxes[name] = _Box(name, lines, level, is_island=name in islands)
    return boxes


def _place(boxes: dict[str, _Box], edges: Sequence[tuple[str, str, dict[str, object]]]) -> dict[str, _Box]:
    wide = {boxes[s].level for s, r, _ in edges if boxes[s].level == boxes[r].level}  # rows with edges along them
    top = max(b.level for b in boxes.values())
    y = float(_MARGIN)
    for level in range(top, 0, -1):
        row = [b for b in boxes.values() if b.level == level]
        if not row:
            continue
        gap = 1.5 * _GAP_X if level in wide else _GAP_X
        total = sum(b.width for b in row) + gap * (len(row) - 1)
        x = -total / 2
        for box in row:
            box.x, box.y = x + box.width / 2, y
            x += box.width + gap
        y += max(b.height for b in row) + _GAP_Y
    return boxes


def _ports(
    edges: Sequence[tuple[str, str, dict[str, object]]], boxes: dict[str, _Box]
) -> dict[tuple[str, str], tuple[float, float]]:
    """Spread the ends of the edges over the top and bottom sides: (x at the source, x at the reader) per edge."""
    sides: dict[tuple[str, bool], list[tuple[float, int, tuple[str, str], int]]] = {}
    for source, reader, data in edges:
        kind = int(data["kind"] == "upper_to_lower")  # the two edges of a pair lie side by side, in one order
        for end, (near, far) in enumerate(((source, reader), (reader, source))):
            upward = boxes[far].y < boxes[near].y
            sides.setdefault((near, upward), []).append((boxes[far].x, kind, (source, reader), end))
    found: dict[tuple[str, str], list[float]] = {(s, r): [0.0, 0.0] for s, r, _ in edges}
    for (name, _), ends in sides.items():
        box = boxes[name]
        for i, (_, _, edge, end) in enumerate(sorted(ends)):
            found[edge][end] = box.x - box.width / 2 + box.width * (i + 1) / (len(ends) + 1)
    return {edge: (a, b) for edge, (a, b) in found.items()}


def _are_neighbours(a: _Box, b: _Box, boxes: dict[str, _Box]) -> bool:
    """Whether two boxes stand beside each other in one row."""
    low, high = sorted((a.x, b.x))
    return a.level == b.level and not any(c.level == a.level and low < c.x < high for c in boxes.values())


def _across(source: _Box, reader: _Box) -> list[tuple[float, float]]:
    """Return the control points of a straight edge between the facing sides of neighbours."""
    sign = 1 if reader.x > source.x else -1
    y = source.y + min(source.height, reader.height) / 2
    x0, x1 = source.x + sign * source.width / 2, reader.x - sign * (reader.width / 2 + 2)
    return [(x0, y), (x0 + (x1 - x0) / 3, y), (x1 - (x1 - x0) / 3, y), (x1, y)]


def _route(source: _Box, reader: _Box, x0: float, x1: float, swing: float | None) -> list[tuple[float, float]]:
    """Return the four control points of an edge, from source to reader; its middle is at x = `swing`, if given."""
    if source.level == reader.level:  # an arc over the row
        lift = min(source.y, reader.y) - _GAP_Y * 0.55
        return [(x0, source.y), (x0, lift), (x1, lift), (x1, reader.y - 2)]
    upward = reader.y < source.y
    y0 = source.y if upward else source.y + source.height
    y1 = reader.y + reader.height + 2 if upward else reader.y - 2
    third = (y1 - y0) / 3
    if swing is None:
        return [(x0, y0), (x0, y0 + third), (x1, y1 - third), (x1, y1)]
    control = (8 * swing - x0 - x1) / 6  # a cubic's middle is (p0 + 3 p1 + 3 p2 + p3) / 8
    return [(x0, y0), (control, y0 + third), (control, y1 - third), (x1, y1)]


def _bezier(points: list[tuple[float, float]], t: float) -> tuple[str, tuple[float, float]]:
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = points
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
    at = tuple(sum(w * p[i] for w, p in zip(weights, points, strict=True)) for i in (0, 1))
    return f"M{x0:.1f},{y0:.1f} C{x1:.1f},{y1:.1f} {x2:.1f},{y2:.1f} {x3:.1f},{y3:.1f}", (at[0], at[1])


def _edge_lines(source: str, reader: str, data: dict[str, object], program: ExecutionPlan | None) -> list[str]:
    count = len(data["parameters"])  # type: ignore[arg-type]
    lines = [f"{reader} reads {count} tensor{'' if count == 1 else 's'}"]
    if program is not None and data["kind"] == "upper_to_lower" and reader in {p.name for p in program.problems}:
        estimator, size = program[reader].estimator, program[reader].size
        most = estimator.max_hvps(size)
        cost = f"at most {most} Hessian products" if most else "no Hessian product"
        lines += [f"hypergradient by {type(estimator).__name__}", cost]
    return lines


def _draw_box(box: _Box) -> str:
    x, y = box.x - box.width / 2, box.y
    texts = [
        f'<text x="{box.x:.1f}" y="{y + 22:.1f}" text-anchor="middle" font-weight="bold">{escape(box.name)}</text>'
    ]
    for i, line in enumerate(box.lines):
        texts.append(
            f'<text x="{box.x:.1f}" y="{y + 40 + _LINE * i:.1f}" text-anchor="middle" fill="#444">{escape(line)}</text>'
        )
    return (
        f'<g><rect x="{x:.1f}" y="{y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="7" '
        f'fill="{"#fdf6ec" if box.is_island else "#f4f7fb"}" stroke="#34495e" stroke-width="1.4"'
        f"{' stroke-dasharray=' + chr(34) + '5 3' + chr(34) if box.is_island else ''}/>{''.join(texts)}</g>"
    )


def _label(at: tuple[float, float], lines: list[str], width: float, color: str) -> str:
    height = 15 * len(lines) + 4
    x, y = at
    parts = [
        f'<rect x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" height="{height}" rx="3" '
        'fill="white" fill-opacity="0.92"/>'
    ]
    for i, line in enumerate(lines):
        parts.append(
            f'<text x="{x:.1f}" y="{y - height / 2 + 13 + 15 * i:.1f}" text-anchor="middle" font-size="11" '
            f'fill="{color}">{escape(line)}</text>'
        )
    return f"<g>{''.join(parts)}</g>"


def _legend(x: float, y: float) -> str:
    def entry(x: float, color: str, style: str, marker: str, text: str) -> str:
        return (
            f'<line x1="{x:.1f}" y1="{y}" x2="{x + 34:.1f}" y2="{y}" stroke="{color}" stroke-width="1.6"{style} '
            f'marker-end="url(#{marker})"/><text x="{x + 44:.1f}" y="{y + 4}" font-size="11" fill="#444">{text}</text>'
        )

    solid = entry(x, _SOLID, "", "low", "lower to upper: a solution is used")
    dashed = entry(x + 245, _DASHED, ' stroke-dasharray="6 4"', "up", "upper to lower: a loss is shaped")
    return f"<g>{solid}{dashed}</g>"


def _marker(name: str, color: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
        f'orient="auto-start-reverse"><path d="M0,0 L10,5 L0,10 z" fill="{color}"/></marker>'
    )


def _text_width(text: str) -> float:
    return _WIDTH_OF_CHARACTER * len(text)
