"""The graph of a circuit: which nodes and edges it has, how wide and of which colour; names of others are refused."""

import numpy as np
import pytest
from results import example
from test_figures import outcome

from funcscope.view.circuit_figure import WIDEST, circuit_graph
from funcscope.view.quantities import figures
from funcscope.view.theme import BLUE, VERMILION

NODES = ["embed", "a0.0", "a0.1", "m0", "a1.0", "m1", "logits"]
EDGES = [("embed", "a0.1.v"), ("a0.1", "a1.0.k"), ("a0.1", "a1.0.v"), ("a1.0", "logits"), ("m0", "logits")]
WEIGHTS = np.array([0.5, -0.25, 1.0, 0.1, np.nan])


def lines(fig):
    return {trace.name: trace for trace in fig.data if trace.mode == "lines"}


def test_edges_have_the_sign_as_their_colour_and_the_share_as_their_width():
    fig = circuit_graph(NODES, EDGES, WEIGHTS, stderr=np.full(5, 0.01))
    drawn = lines(fig)
    assert set(drawn) == {"embed -> a0.1.v", "a0.1 -> a1.0.k", "a0.1 -> a1.0.v", "a1.0 -> logits"}
    for (sender, receiver), weight in zip(EDGES[:4], WEIGHTS, strict=False):
        line = drawn[f"{sender} -> {receiver}"].line
        assert line.color == (VERMILION if weight > 0 else BLUE)
        assert line.width == pytest.approx(WIDEST * abs(weight))
    hovers = [text for trace in fig.data if trace.name == "share" for text in trace.hovertext]
    assert "a0.1 to a1.0.k<br>share −0.250 ± 0.010" in hovers
    assert next(iter(drawn)) == "a1.0 -> logits"  # the widest lies on top


def test_nodes_with_an_edge_stand_by_layer_from_the_bottom_and_edges_end_at_them():
    fig = circuit_graph(NODES, EDGES, WEIGHTS)
    (dots,) = [trace for trace in fig.data if trace.name == "nodes"]
    at = dict(zip(dots.hovertext, zip(dots.x, dots.y, strict=True), strict=True))
    assert list(dots.text) == ["embed", "0.1", "1.0", "logits"]  # nothing of layer 0's MLP is finite
    assert list(dots.marker.symbol) == ["square", "circle", "circle", "square"]
    assert [y for _, y in at.values()] == [0, 1, 2, 3]
    assert (list(fig.layout.yaxis.tickvals), list(fig.layout.yaxis.ticktext)) == ([1, 2], ["0", "1"])
    key, value = (lines(fig)[f"a0.1 -> a1.0.{kind}"] for kind in "kv")
    for trace in (key, value):
        assert (trace.x[0], trace.y[0]) == pytest.approx(at["a0.1"])
        assert (trace.x[-1], trace.y[-1]) == pytest.approx(at["a1.0"])
    assert abs(key.x[12] - value.x[12]) > 0.1  # two edges with the same ends lie apart


def test_other_names_and_lengths_are_refused_and_nothing_is_drawn_of_nothing():
    with pytest.raises(ValueError, match="a number for each of 5 edges"):
        circuit_graph(NODES, EDGES, WEIGHTS[:2])
    with pytest.raises(ValueError, match=r"'a9\.9' is not among them"):
        circuit_graph(NODES, [("a9.9", "logits")], np.ones(1))
    with pytest.raises(ValueError, match="got 'head'"):
        circuit_graph(["head", "logits"], [("head", "logits")], np.ones(1))
    assert not lines(circuit_graph(NODES, [], np.empty(0)))


def test_the_drawing_of_edge_attribution_has_its_largest_edges():
    result = example("EdgeAttribution")
    (drawn,) = figures([outcome(result)], ["scores"])
    assert set(lines(drawn.figure)) == {name for name, x in zip(result.names, result.shares, strict=True) if x == x}
    assert f"of {len(result.names)} edges" in drawn.caption
