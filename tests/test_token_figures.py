"""Figures on a text: what they show, of which token, and that texts are never markup."""

from itertools import pairwise

import numpy as np
import pytest
from plotly.graph_objects import Figure
from results import example
from test_figures import outcome

from funcscope.view.quantities import figures
from funcscope.view.token_figures import PER_LINE, attention_viewer, attribution_text, placed, visible

TOKENS = ["<bos>", "Ġa", "b$", "\n", "Ġa", "b"]
NAN = float("nan")


def patterns(layers=2, heads=3, size=6):
    scores = np.random.default_rng(0).normal(size=(layers, heads, size, size))
    weights = np.exp(scores) * np.tri(size)
    return weights / weights.sum(-1, keepdims=True)


def shown(fig: Figure, choice: int) -> np.ndarray:
    """What the heat map has after a choice of the menu."""
    (button,) = [fig.layout.updatemenus[0].buttons[choice]]
    assert button.method == "restyle"
    (update, traces) = button.args
    assert list(traces) == [0]
    return np.asarray(update["z"][0], np.float64)


def test_every_head_can_be_picked_and_is_its_own_pattern():
    given = patterns()
    before = given.copy()
    fig = attention_viewer(given, TOKENS, start=(1, 2))
    np.testing.assert_array_equal(given, before)
    buttons = fig.layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == [f"layer {i}, head {j}" for i in range(2) for j in range(3)]
    lower = np.tri(6, dtype=bool)
    for choice in range(6):
        z = shown(fig, choice)
        np.testing.assert_array_equal(z[lower], given[divmod(choice, 3)][lower])
        assert np.isnan(z[~lower]).all()
    (heat,) = fig.data
    assert fig.layout.updatemenus[0].active == 5
    np.testing.assert_array_equal(np.asarray(heat.z)[lower], given[1, 2][lower])
    assert (heat.zmin, heat.zmax) == (0, 1)


def test_hover_and_axes_say_which_token_looks_at_which():
    fig = attention_viewer(patterns(), TOKENS)
    (heat,) = fig.data
    assert heat.text[4][2] == "from 4 ␣a<br>to 2 b&#36;"  # rows are queries
    assert heat.text[3][0] == "from 3 ↵<br>to 0 &lt;bos&gt;"
    assert fig.layout.xaxis.title.text.startswith("key")
    assert fig.layout.yaxis.title.text.startswith("query")
    assert fig.layout.yaxis.autorange == "reversed"
    assert list(fig.layout.xaxis.ticktext) == [visible(token) for token in TOKENS]
    many = attention_viewer(np.full((1, 1, 200, 200), 1 / 200), ["x"] * 200)
    assert len(many.layout.xaxis.ticktext) == 40


def test_a_pattern_that_looks_ahead_is_shown_whole():
    whole = np.full((1, 1, 6, 6), 1 / 6)
    np.testing.assert_array_equal(attention_viewer(whole, TOKENS).data[0].z, whole[0, 0])


def test_patterns_that_do_not_fit_the_tokens_are_refused():
    with pytest.raises(ValueError, match=r"`patterns` must be of shape \(layers, heads, 5, 5\).*got \(2, 3, 6, 6\)"):
        attention_viewer(patterns(), TOKENS[:5])
    with pytest.raises(ValueError, match=r"`start` must name one of 2 layers and 3 heads, got \(0, 3\)"):
        attention_viewer(patterns(), TOKENS, start=(0, 3))
    with pytest.raises(ValueError, match="`attribution` must have a number for each of 6 tokens"):
        attribution_text(TOKENS, np.ones(1))


def test_colours_are_the_signed_shares_of_the_largest():
    fig = attribution_text(TOKENS, np.array([2.0, -2.0, 0.0, 1.0, NAN, -1.0]), unit="nats", stderr=np.full(6, 0.1))
    assert [shape.fillcolor for shape in fig.layout.shapes] == [
        "rgb(213,94,0)", "rgb(0,114,178)", "rgb(255,255,255)", "rgb(234,174,128)", "#e3e3e3", "rgb(128,184,216)",
    ]  # fmt: skip
    (trace,) = fig.data
    assert list(trace.text) == [visible(token) for token in TOKENS]
    assert trace.hovertext[1] == "1 ␣a<br>-2 ± 0.1 nats"
    assert trace.hovertext[4] == "4 ␣a<br>undefined"
    assert (trace.marker.cmin, trace.marker.cmax) == (-2, 2)
    assert list(trace.y) == [0, 0, 0, 0, 1, 1]  # a newline ends its line
    nothing = attribution_text(TOKENS, np.zeros(6))
    assert {shape.fillcolor for shape in nothing.layout.shapes} == {"rgb(255,255,255)"}


def test_boxes_are_in_their_order_and_do_not_overlap():
    texts = [visible("w" * (1 + i % 9)) for i in range(100)]
    boxes = placed(texts, [False] * 100)
    assert boxes == sorted(boxes)
    for (line, _, right), (then, left, _) in pairwise(boxes):
        assert then > line or left >= right
    assert max(right for _, _, right in boxes) <= PER_LINE
    assert boxes[-1][0] > 5
    assert placed([visible("<")], [False]) == [(0, 0.0, 1.8)]  # as it is seen


def test_attention_on_a_text_is_shown_with_its_tokens_and_the_menu_below_the_title():
    result = example("TextAttention")
    (drawn,) = figures([outcome(result)], ["patterns"])
    lower = np.tri(len(result.tokens), dtype=bool)
    for choice, pattern in enumerate(result.patterns.flatten(0, 1).numpy()):
        np.testing.assert_allclose(shown(drawn.figure, choice)[lower], pattern[lower], atol=5.1e-5)
    assert list(drawn.figure.layout.xaxis.ticktext) == result.tokens
    assert drawn.figure.layout.margin.t > 80
