"""The landscape on the demonstration's page: figures hold the stored arrays, sentences the stored numbers."""

import dataclasses

import numpy as np
import pytest
from test_view_directional import charts

from funcscope.core.store import Stored, load
from funcscope.families import modular
from funcscope.study import demo
from funcscope.view import landscape_sections as sections
from funcscope.view.demo import write_page
from funcscope.view.numbers import number, with_error
from funcscope.view.page import Table
from funcscope.view.story import Story

TINY = demo.Settings(
    modular.Config(p=7, d_model=8, num_heads=2, d_mlp=16, steps=100, train_fraction=0.6),
    num_checkpoints=6, n_samples=6, plane_points=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return demo.run(TINY, tmp_path_factory.mktemp("demo"), quiet=True)


@pytest.fixture
def story(numbers):
    return Story(load(numbers))


def changed(story, **arrays):
    return Story(Stored(story.stored.arrays | arrays, story.stored.meta, story.stored.sha256))


def test_the_page_has_every_section_and_both_phases(numbers):
    text = write_page(numbers).read_text(encoding="utf-8")
    for title in (
        "Two phases side by side", "Flatness", "Flatness and the trace of the Hessian", "The whole run on one plane",
        "From memorising to generalising", "Dimensions of the weights",
    ):  # fmt: skip
        assert f"<h2>{title}</h2>" in text
    assert "principal 1" in text  # names of the axes are stored with them


def test_the_planes_are_those_of_the_two_phases(story):
    _, memorised, last = story.stored.meta["phases"]
    (fig,) = charts(sections.planes(story))
    drawn = [trace for trace in fig.data if trace.type == "contour"]
    for trace, step in zip(drawn, (memorised, last), strict=True):
        losses = story.array(f"plane_{step}_grid_losses")
        shown = np.array(trace.z, dtype=float).T
        same = np.allclose(shown, losses) or np.allclose(shown, np.log10(losses))
        assert same
    holed = story.array(f"plane_{last}_grid_losses").copy()
    holed[0, 0] = np.inf
    shown = changed(story, **{f"plane_{last}_grid_losses": holed, f"plane_{last}_n_nonfinite": np.array(1)})
    (fig,) = charts(sections.planes(shown))
    assert "not finite" in [trace.name for trace in fig.data]


def test_flatness_says_the_stored_means(story):
    section = sections.flatness(story)
    steps = story.array("flatness_step").tolist()
    for step in story.stored.meta["phases"][1:]:
        i = steps.index(step)
        mean, stderr = (
            float(story.array(f"flatness_{name}")[i]) for name in ("mean_delta_loss", "mean_delta_loss_stderr")
        )
        assert with_error(mean, stderr) in section.blocks[0]
        deltas = story.array(f"changes_{step}_delta_losses")
        assert mean == pytest.approx(deltas.mean())
    assert len(charts(section)) == 3


def test_lengths_have_the_ratio_with_its_error_where_it_is_resolved(story):
    step = story.stored.meta["phases"][1]
    names = ("pair_mean", "pair_mean_stderr", "expected_delta_loss", "expected_delta_loss_stderr")
    count = len(story.array(f"lengths_{step}_epsilon"))
    expected = np.geomspace(1e-12, 1e-4, count)
    columns = (expected * np.array([1.0, 1.0, *[2.0] * (count - 2)]), expected * 1e-3, expected, expected * 1e-3)
    parts = {f"lengths_{step}_{name}": column for name, column in zip(names, columns, strict=True)}
    for rounding, first in ((1e-30, with_error(1.0, np.hypot(1e-3, 1e-3))), (1e-12, "lost in rounding")):
        shown = changed(story, **parts, **{f"lengths_{step}_rounding_delta_loss": np.array(rounding)})
        (table,) = (block for block in sections.lengths(shown).blocks if isinstance(block, Table))
        assert table.rows[0][-1] == first
        assert table.rows[2][-1] == with_error(2.0, 2.0 * np.hypot(1e-3, 1e-3 / 2))


def test_the_trajectory_is_drawn_where_the_checkpoints_are(story):
    (fig,) = charts(sections.trajectory(story))
    walk = next(trace for trace in fig.data if trace.name == "training")
    np.testing.assert_allclose(np.stack([walk.x, walk.y], axis=1), story.array("trajectory_coordinates"))


def test_the_barrier_is_the_stored_one(story):
    section = sections.path(story)
    barrier, stderr = (float(story.array(f"path_barrier_linear{end}")) for end in ("", "_stderr"))
    assert with_error(barrier, stderr) in section.blocks[0]
    assert number(float(np.nanmax(story.array("path_losses")))) in section.blocks[0]


def test_dimensions_name_the_matrix_that_changes_most(story):
    text = sections.dimensionality(story).blocks[0]
    ratio = story.array("dimensionality_participation_ratio")
    steps = story.array("dimensionality_step").tolist()
    first, last = (ratio[steps.index(step)] for step in story.stored.meta["phases"][1:])
    most = int(np.argmax(np.abs(np.log(last / first))))
    assert f"that of {story.stored.meta['matrices'][most]} changes most" in text
    assert f"falls in {int((last < first).sum())} of {len(first)}" in text


def test_numbers_without_a_landscape_have_no_sections(story):
    arrays = {name: value for name, value in story.stored.arrays.items() if not name.startswith("trajectory_")}
    assert sections.sections(Story(story.stored._replace(arrays=arrays))) == []


def test_the_stored_numbers_are_those_of_the_artifacts(numbers, story):
    run = next(numbers.parent.glob("modular-addition-p7-seed*"))
    last = story.stored.meta["phases"][-1]
    kept = load(run / "artifacts" / "loss_plane" / f"step_{last:05d}.npz").arrays
    np.testing.assert_array_equal(story.array(f"plane_{last}_grid_losses"), kept["grid_losses"])
    again = demo.run(dataclasses.replace(TINY), numbers.parent, quiet=True)
    assert again.read_bytes() == numbers.read_bytes()
