"""SVG pictures: well formed, complete, and laid out without boxes on top of each other."""

import itertools
import xml.etree.ElementTree as ET

import pytest

import mlopt
from mlopt import drawing
from tests.helpers.quadratics import program

SHAPES = {
    "pair": {"lower": ["upper"], "upper": ["lower"]},
    "diamond": {"a": ["u"], "b": ["a", "u"], "c": ["a"], "u": ["b", "c"]},
    "skip": {"a": ["u1", "u2"], "u1": ["a"], "u2": ["a", "u1"]},
    "wide": {"a": ["u"], "b": ["u"], "c": ["u"], "d": ["u"], "u": ["a", "b", "c", "d"]},
    "single": {"only": []},
}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", SHAPES)
def test_pictures(name, tmp_path):
    graph = mlopt.Graph(program(SHAPES[name]))
    plan = mlopt.compile(graph, progress=False)
    for draw, file in ((graph.draw, "graph.svg"), (plan.draw, "plan.svg")):
        draw(tmp_path / file)
        root = ET.parse(tmp_path / file).getroot()
        texts = [t.text for t in root.iter(f"{SVG}text")]
        assert set(SHAPES[name]) <= set(texts)
        assert len(list(root.iter(f"{SVG}path"))) == graph.nx.number_of_edges() + 2  # and the two arrow heads
        x, _, width, height = map(float, root.get("viewBox").split())
        for rect in root.iter(f"{SVG}rect"):
            assert float(rect.get("x")) >= x
            assert float(rect.get("x")) + float(rect.get("width")) <= x + width + 1
            assert float(rect.get("y")) + float(rect.get("height")) <= height + 1


@pytest.mark.parametrize("name", SHAPES)
def test_boxes_do_not_overlap(name):
    graph = mlopt.Graph(program(SHAPES[name]))
    plan = mlopt.compile(graph, progress=False)
    boxes = drawing._place(drawing._boxes(graph, plan.program), list(graph.nx.edges(data=True))).values()
    for a, b in itertools.combinations(boxes, 2):
        apart_x = abs(a.x - b.x) >= (a.width + b.width) / 2
        apart_y = a.y + a.height <= b.y or b.y + b.height <= a.y
        assert apart_x or apart_y
