"""The reliability diagram has every bin that has a position, where it is, with its interval."""

import numpy as np

from funcscope.view.reliability import reliability


def test_bins_lie_where_they_are_and_empty_ones_are_left_out():
    confidence, accuracy = np.array([0.2, np.nan, 0.9]), np.array([0.1, np.nan, 0.95])
    low, high, weight = np.array([0.05, np.nan, 0.9]), np.array([0.3, np.nan, 1.0]), np.array([4.0, 0.0, 16.0])
    fig = reliability({"a": (confidence, accuracy, low, high, weight), "b": (confidence, accuracy, low, high, weight)})
    diagonal, first, second = fig.data
    assert tuple(diagonal.x) == tuple(diagonal.y) == (0, 1)
    np.testing.assert_allclose(first.x, [0.2, 0.9])
    np.testing.assert_allclose(first.error_y.array, [0.2, 0.05])
    np.testing.assert_allclose(first.error_y.arrayminus, [0.05, 0.05])
    assert first.marker.size[1] > first.marker.size[0]
    assert (first.name, second.name) == ("a", "b")
    assert fig.layout.yaxis.scaleanchor == "x"
