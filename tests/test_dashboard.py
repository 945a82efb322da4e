"""The dashboard without a browser: what it offers, what it reads, what it refuses, and what it says of damaged files."""

import json
import math
import shutil
import socket

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.io.json import to_json_plotly

from funcscope.core import store as storing
from funcscope.core.store import VERSION, save
from funcscope.study.runs import Runs
from funcscope.view import dashboard
from funcscope.view.dashboard import callbacks, layout, reading
from funcscope.view.dashboard.catalogue import PANELS, available

STEPS = (0, 50, 100, 150, 200, 300)
GAP = 150
"""The summary has nan there and the step no artifact."""
PLANES = (100, 300)


def run_folder(path, variants=("p37", "p41"), steps=STEPS, planes=PLANES, whole=None):
    """A run as the analyzers leave it, with made-up numbers that grow with the step.

    whole: steps whose artifacts can be read; the files of the others are there and empty.
    """
    for variant in variants:
        root = path / variant
        root.mkdir(parents=True)
        config = {"p": int(variant[1:]), "d_model": 32, "weight_decay": 1.0}
        (root / "variant.json").write_text(
            json.dumps({"version": VERSION, "family": "modular_addition", "variant": variant, "config": config})
        )
        (root / "checkpoints").mkdir()
        for step in steps:
            (root / "checkpoints" / f"step_{step:05d}.safetensors").touch()
        write_curves(root, steps[-1])
        write_artifacts(root, steps, planes, steps if whole is None else whole)
    return path


def write_curves(root, last):
    step = np.arange(0, last + 1, max(last // 60, 1))
    if step[-1] != last:
        step = np.append(step, last)
    done = step / last
    curves = {
        "step": step,
        "train_loss": 4 * np.exp(-20 * done) + 1e-4,
        "test_loss": 4 / (1 + np.exp(20 * (done - 0.7))) + 1e-3,
        "train_accuracy": 1 - np.exp(-40 * done),
        "test_accuracy": 1 / (1 + np.exp(-40 * (done - 0.7))),
    }
    store(root / "curves.npz", curves)


def write_artifacts(root, steps, planes, whole):
    rows, art = [], root / "artifacts"
    for step in steps:
        values = flatness(step, steps[-1])
        if step != GAP:
            artifact(art, "landscape_flatness", step, values, whole)
            artifact(art, "directional_losses", step, directional(step), whole)
        rows.append({k: v if step != GAP else math.nan for k, v in values.items() if np.ndim(v) == 0})
    summarise(art / "landscape_flatness", steps, rows)
    times(art / "landscape_flatness", [e for e in steps if e != GAP])
    curvature = [curved(step, steps[-1]) for step in steps]
    for step, row in zip(steps, curvature, strict=True):
        artifact(art, "hessian_curvature", step, row, whole)
        artifact(art, "effective_dimensionality", step, ranks(step), whole)
    summarise(art / "hessian_curvature", steps, curvature)
    summarise(art / "effective_dimensionality", steps, [ranks(step) for step in steps], matrices=["embed", "out"])
    for step in planes:
        store(art / "loss_plane" / f"step_{step:05d}.npz", plane(step, steps[-1]))
    if planes:
        coordinates = np.stack([np.linspace(-0.4, 0.3, len(steps)), np.linspace(-0.3, 0.4, len(steps)) ** 2], 1)
        more = {"coordinates": coordinates, "step": np.array(steps), "explained": np.array([0.7, 0.2])}
        store(art / "trajectory_plane" / "across_steps.npz", plane(0, 1) | more)


def artifact(folder, analyzer, step, values, whole):
    file = folder / analyzer / f"step_{step:05d}.npz"
    if step in whole:
        store(file, values)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def flatness(step, last, n=50):
    """Mean loss change 1 + step / last, exactly."""
    z = np.random.default_rng(step).normal(size=n)
    delta = 1 + step / last + 0.2 * (z - z.mean())
    other = 1 + step / last - 0.2 * (z - z.mean())
    return {
        "baseline_loss": 4 * (1 - 0.9 * step / last), "epsilon": 0.1, "delta_losses": delta,
        "delta_losses_negative": other, "mean_delta_loss": delta.mean(), "mean_delta_loss_stderr": 0.03,
        "median_delta_loss": np.median(delta), "max_delta_loss": delta.max(), "std_delta_loss": delta.std(),
        "p90_delta_loss": np.quantile(delta, 0.9), "p10_delta_loss": np.quantile(delta, 0.1),
        "flatness_ratio": 1 - 0.5 * step / last, "n_directions": n, "n_nonfinite": 0,
    }  # fmt: skip


def directional(step, n=50):
    z = np.random.default_rng(step + 1).normal(size=n)
    losses = 2 + 0.1 * z
    return {
        "losses": losses, "losses_negative": 2 - 0.1 * z, "baseline_loss": 1.5, "span": 0.1, "delta_mean": 0.5,
        "loss_mean": losses.mean(), "loss_std": losses.std(), "n_samples": n, "direction_norm": 3.0,
    }  # fmt: skip


def curved(step, last):
    return {
        "hessian_max_eigenvalue": 10.0 + step / last, "hessian_max_eigenvalue_residual": 0.01,
        "hessian_trace": 200.0 - step / 4,
        "hessian_trace_stderr": 5.0, "sam_relative": 0.1, "sam_relative_stderr": 0.01,
    }  # fmt: skip


def ranks(step):
    return {
        "participation_ratio": np.array([20.0, 12.0]) - step / 60,
        "effective_rank": np.array([25.0, 15.0]) - step / 60,
        "stable_rank": np.array([8.0, 6.0]) - step / 100,
    }


def plane(step, last, n=9):
    values = np.linspace(-0.5, 0.5, n)
    losses = 0.5 + step / last + values[:, None] ** 2 + 3 * values[None] ** 2
    losses[0, 0] = math.nan
    return {
        "grid_losses": losses, "axis_values": values, "axis_values_2": values, "grid_stderr": 0.1 + 0 * losses,
        "grid_delta_stderr": 0.1 + 0 * losses, "baseline_loss": 0.5 + step / last, "loss_mean": float(np.nanmean(losses)),
        "loss_std": 0.1, "loss_min": float(np.nanmin(losses)), "loss_max": float(np.nanmax(losses)), "roughness": 0.1,
        "normalized_roughness": 0.1, "normalized_roughness_range": 0.1, "quad_residual": 0.0,
        "orthogonality_check": 0.0, "n_batches_used": 1, "n_nonfinite": 1, "direction_norms": np.array([5.0, 5.0]),
        "param_norm": 5.0, "span": 0.5, "actual_span": 0.5, "displacement": np.array([2.5, 2.5]),
        "relative_displacement": np.array([0.5, 0.5]), "num_forwards": n * n, "axis_names": ["draw 1", "draw 2"],
    }  # fmt: skip


def store(path, values):
    """As the executor stores: arrays and numbers as arrays, the rest beside the settings."""
    arrays = {name: value for name, value in values.items() if not isinstance(value, (str, list))}
    other = {name: value for name, value in values.items() if name not in arrays}
    save(path, arrays, {"settings": {}, "values": other})


def summarise(folder, steps, rows, **described):
    columns = {name: np.stack([np.asarray(row[name], dtype=float) for row in rows]) for name in rows[0]}
    save(folder / "summary.npz", {"step": np.array(steps), **columns}, {"settings": described})


def times(folder, steps):
    lines = [{"step": e, "seconds": 1.0 + (e == steps[0]), "forwards": 101, "forward_seconds": 0.01} for e in steps]
    (folder / "times.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture
def own(path, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(path, tmp_path / "run")


@pytest.fixture
def opened_files(monkeypatch):
    """Names of the files that are read."""
    seen, load = [], storing.load

    def spy(path):
        seen.append(path.name)
        return load(path)

    monkeypatch.setattr("funcscope.study.runs.load", spy)
    for cached in (reading._curves, reading._summary, reading._artifact, reading._cross):
        cached.cache_clear()
    return seen


def arrive(path, search, here=None):
    runs, asked = Runs(path), callbacks.requested(search)
    return callbacks.opened(runs, asked, callbacks.admitted(runs, asked), here, 0)


def draw(path, panel, step, plot=None, variant="p37", **options):
    return callbacks.figure(Runs(path), {"variant": variant, "step": step}, panel, plot or panel, options)


def text_of(component):
    """All text below a component."""
    children = getattr(component, "children", component)
    if isinstance(children, (list, tuple)):
        return " ".join(text_of(child) for child in children)
    return "" if children is None else text_of(children) if hasattr(children, "children") else str(children)


# what is offered


def test_the_address_chooses_variant_and_step_and_the_last_step_is_the_preset(path):
    assert arrive(path, "").steps["variant"] == "p37"
    assert STEPS[arrive(path, "").place] == 300
    there = arrive(path, "?variant=p41&step=100")
    assert (there.steps["variant"], STEPS[there.place], there.message) == ("p41", 100, "")
    near = arrive(path, "?variant=p41&step=110")
    assert STEPS[near.place] == 100
    assert "110" in near.message
    for bad in ("-1", "1e3", "x", "%D9%A3", "9" * 40):
        last = arrive(path, f"?variant=p41&step={bad}")
        assert STEPS[last.place] == 300
        assert "not a whole number" in last.message


def test_a_panel_appears_only_where_its_artifacts_are(own):
    variant = Runs(own).variant("p37")
    assert [panel.name for panel in available(variant)] == [panel.name for panel in PANELS]
    for folder, lost in (
        ("landscape_flatness", {"flatness", "distribution"}),
        ("hessian_curvature", {"curvature"}),
        ("effective_dimensionality", {"dimensionality"}),
        ("directional_losses", {"directional"}),
        ("trajectory_plane", {"trajectory"}),
        ("loss_plane", {"plane", "phases"}),
    ):
        before = {panel.name for panel in available(variant)}
        shutil.rmtree(own / "p37" / "artifacts" / folder)
        assert before - {panel.name for panel in available(variant)} == lost
    assert [panel.name for panel in available(variant)] == ["curves"]
    assert reading.steps(variant) == STEPS  # of the checkpoints
    (own / "p37" / "curves.npz").unlink()
    assert "Nothing is stored" in arrive(own, "?variant=p37").message


def test_the_slider_holds_every_step_that_any_analyzer_stored(own):
    flat = own / "p37" / "artifacts" / "landscape_flatness"
    store(flat / "step_00275.npz", flatness(275, 300))
    assert arrive(own, "?variant=p37").steps["steps"] == [*STEPS[:-1], 275, 300]
    assert arrive(own, "?variant=p41").steps["steps"] == list(STEPS)


def test_a_reload_keeps_the_step_and_shows_what_came_since(own):
    here = {"variant": "p37", "step": 100, "panels": [panel.name for panel in PANELS]}
    again = arrive(own, "?variant=p37", here)
    assert again.panels is None
    assert STEPS[again.place] == 100
    assert draw(own, "distribution", 275).empty
    store(own / "p37" / "artifacts" / "landscape_flatness" / "step_00275.npz", flatness(275, 300))
    assert not draw(own, "distribution", 275).empty
    here["panels"] = ["curves"]
    assert len(arrive(own, "?variant=p37", here).panels) == len(PANELS)


def test_a_changed_file_is_read_again(own):
    def mean():
        return draw(own, "flatness", 100).figure.data[-1].y[0]

    assert mean() == pytest.approx(1)
    folder = own / "p37" / "artifacts" / "landscape_flatness"
    summarise(folder, STEPS, [{**flatness(step, 300), "mean_delta_loss": 7.0} for step in STEPS])
    assert mean() == 7.0


# what moves


def test_every_panel_follows_the_step(path):
    for panel in PANELS:
        for plot in panel.plots:
            one, other = (draw(path, panel.name, step, plot.name) for step in (100, 300))
            assert not one.empty, one.caption
            assert isinstance(one.figure, go.Figure)
            if panel.name != "phases":
                assert one.figure.to_json() != other.figure.to_json(), panel.name


def test_the_metric_changes_the_curve(path):
    mean, ratio = (
        draw(path, "flatness", 100, metric=m).figure.data[-1].y for m in ("mean_delta_loss", "flatness_ratio")
    )
    grown = np.array(STEPS) / 300
    gap = np.array(STEPS) == GAP
    np.testing.assert_allclose(mean, np.where(gap, math.nan, 1 + grown))
    np.testing.assert_allclose(ratio, np.where(gap, math.nan, 1 - grown / 2))
    assert draw(path, "flatness", 100, metric="__class__").figure.data[-1].y[0] == mean[0]  # not offered: the preset


SURFACE = {"points": [{"x": 0.1, "y": 0.2, "z": 1.0, "customdata": 1.0}]}
"""A point of a contour plot or a surface carries its loss."""


def test_a_click_selects_the_step_of_the_point(path):
    trace = draw(path, "flatness", 100).figure.data[-1]
    assert [
        callbacks.clicked({"points": [{"x": x, "customdata": int(step)}]}, STEPS)
        for x, step in zip(trace.x, trace.customdata, strict=True)
    ] == list(range(len(STEPS)))
    assert callbacks.clicked({"points": [{"customdata": [104, 0.3]}]}, STEPS) == STEPS.index(100)
    for nothing in (None, {}, {"points": []}, {"points": [{"x": 3.0}]}, {"points": [{"customdata": "100"}]}, SURFACE):
        assert callbacks.clicked(nothing, STEPS) is None


def test_points_of_every_selecting_plot_carry_their_step(path):
    for panel, plot in callbacks.SELECTING:
        traces = json.loads(to_json_plotly(callbacks.unpacked(draw(path, panel, 100, plot).figure)))["data"]
        carried = [trace["customdata"] for trace in traces if trace["type"] == "scatter" and "customdata" in trace]
        assert carried, panel
        for steps in filter(len, carried):
            assert isinstance(steps, list)  # a packed array would be closed to the page
            first = np.asarray(steps).reshape(len(steps), -1)[:, 0]
            assert set(first) <= set(range(301)), (panel, first)


def test_the_plane_is_the_nearest_and_says_which(path):
    assert draw(path, "plane", 100).caption == "Plane at step 100."
    away = draw(path, "plane", 150)
    assert "Plane at step 100." in away.caption
    assert "150" in away.caption
    assert draw(path, "plane", 100, form="surface").figure.data[0].type == "surface"
    assert draw(path, "plane", 100).figure.data[0].type == "contour"


def test_a_step_without_an_artifact_has_a_placeholder_that_says_so(path):
    made = draw(path, "distribution", GAP)
    assert made.empty
    assert made.caption == "No sample of perturbations is stored at step 150; the nearest is at step 100."
    assert not made.figure.data


# the two phases


def test_the_phases_are_the_last_that_memorises_and_the_last_one(path):
    curves = {
        "step": np.arange(5),
        "train_accuracy": np.array([0.2, 1, 1, 1, 1]),
        "test_accuracy": np.array([0, 0, 0.4, 0.6, 1]),
    }
    assert reading.phases(curves, (0, 1, 2, 3, 4)) == (2, 4)
    assert reading.phases(curves, (0, 3, 4)) == (0, 4)
    assert reading.phases(None, (7, 9)) == (7, 9)
    assert [reading.phase(curves, step).name for step in range(5)] == [
        "",
        "memorising",
        "memorising",
        "",
        "generalising",
    ]
    shown = draw(path, "phases", 0, "phases-first").figure.layout.title.text
    assert "step 100, memorising" in shown  # of the steps that have a plane
    assert "step 300, generalising" in draw(path, "phases", 0, "phases-last").figure.layout.title.text


def test_the_two_sides_have_one_scale_and_can_be_chosen(path):
    first, last = (draw(path, "phases", 0, f"phases-{side}", first=0, last=200).figure for side in ("first", "last"))
    assert first.layout.xaxis.range == last.layout.xaxis.range
    assert first.layout.yaxis.range == last.layout.yaxis.range
    alone = [draw(path, "distribution", step).figure.layout.xaxis.range for step in (0, 200)]
    assert alone[0] != alone[1]
    assert first.layout.xaxis.range[0] <= min(r[0] for r in alone)
    assert first.layout.xaxis.range[1] >= max(r[1] for r in alone)
    assert "step 200" in last.layout.title.text


# what it costs


def test_a_panel_reads_one_file_however_many_steps_there_are(tmp_path, opened_files):
    steps = tuple(range(0, 3000, 10))
    memorised = 1900  # the preset of the directional losses
    run_folder(tmp_path / "run", ("p37",), steps, planes=(500, 2990), whole=(500, memorised, 2990))
    made = arrive(tmp_path / "run", "?variant=p37&step=500")
    assert len(made.steps["steps"]) == 300
    assert set(opened_files) <= {"curves.npz", "summary.npz"}
    opened_files.clear()
    draw(tmp_path / "run", "distribution", 500)
    assert opened_files == ["step_00500.npz"]
    draw(tmp_path / "run", "flatness", 500)
    draw(tmp_path / "run", "plane", 510)
    draw(tmp_path / "run", "flatness", 510)
    assert sum(name.startswith("step_") for name in opened_files) == 2
    opened_files.clear()
    for panel in PANELS:
        for plot in panel.plots:
            draw(tmp_path / "run", panel.name, 500, plot.name)
    assert sum(name.startswith("step_") for name in opened_files) <= 7
    opened_files.clear()
    draw(tmp_path / "run", "distribution", 500)
    assert opened_files == []


def test_run_time_is_expected_measured_and_left(own):
    variant = Runs(own).variant("p37")
    cost = reading.cost(variant, "landscape_flatness")
    assert (cost.stored, cost.total) == (5, 6)
    np.testing.assert_allclose([cost.expected, cost.actual, cost.spent, cost.left], [1.01, 1.0, 6.0, 1.0])
    with (own / "p37" / "artifacts" / "landscape_flatness" / "times.jsonl").open("a") as file:
        file.write('\n{"step": 300, "seconds": 4.0}\n')  # analysed again
    again = reading.cost(variant, "landscape_flatness")
    assert again.spent == 9.0
    assert again.actual == 1.0
    unknown = reading.cost(variant, "hessian_curvature")
    assert math.isnan(unknown.actual)
    assert (unknown.stored, unknown.total, unknown.left) == (6, 6, 0.0)
    rows = text_of(arrive(own, "?variant=p37").times)
    assert "5 of 6" in rows
    assert "1.0 s" in rows


def test_planes_are_counted_against_the_checkpoints_they_are_meant_for(path):
    cost = reading.cost(Runs(path).variant("p37"), "loss_plane")
    assert cost.stored == 2
    assert cost.total < len(STEPS)


# what is refused

FOREIGN = (
    "../../etc",
    "../p37",
    "/etc",
    "p37/../../x",
    "p37/artifacts",
    "",
    ".",
    "..",
    "p37\0",
    "%2e%2e%2fetc",
    "P37",
    "p37 ",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_variant_that_is_not_of_the_run_is_refused_and_nothing_is_read(path, opened_files, name):
    made = callbacks.opened(Runs(path), {"variant": name}, callbacks.admitted(Runs(path), {"variant": name}), None, 0)
    assert made.message.startswith("There is no variant")
    assert made.panels == []
    assert made.steps == {}
    assert callbacks.opened(Runs(path), {}, name, None, 0).message.startswith("There is no variant")
    with pytest.raises(ValueError, match="no variant"):
        draw(path, "curves", 100, variant=name)
    assert opened_files == []


@pytest.mark.parametrize(
    "search",
    ["?variant=../../etc", "?variant=%2e%2e%2f%2e%2e%2fetc", "?variant=%252e%252e%252fetc", "?variant=%2Fetc%2Fpasswd"],
)
def test_an_address_with_a_path_is_refused(path, search):
    assert "There is no variant" in arrive(path, search).message


def test_a_link_out_of_the_run_is_no_variant_unless_it_says_so_itself(own, tmp_path):
    (tmp_path / "secret").mkdir()
    (own / "link").symlink_to(tmp_path / "secret")
    assert "There is no variant" in arrive(own, "?variant=link").message


def test_other_panels_and_steps_that_are_no_numbers_are_refused(path):
    with pytest.raises(ValueError, match="no panel"):
        draw(path, "../../etc", 100)
    with pytest.raises(ValueError, match="invalid literal"):
        draw(path, "curves", "../x")


@pytest.fixture(scope="module")
def client(path):
    return dashboard.app(path).server.test_client()


@pytest.mark.parametrize(("host", "status"), [
    ("127.0.0.1:8050", 200), ("localhost:8050", 200), ("[::1]:8050", 200), ("localhost", 200), ("LOCALHOST", 200),
    ("evil.example", 403), ("evil.example:8050", 403), ("127.0.0.1.evil.example", 403), ("10.0.0.7:8050", 403), ("[::1", 403),
])  # fmt: skip
def test_only_names_of_this_machine_are_answered(client, host, status):
    assert client.get("/", headers={"Host": host}).status_code == status


def test_another_host_is_answered_where_it_was_asked_for(path):
    client = dashboard.app(path, hosts=None).server.test_client()
    assert client.get("/", headers={"Host": "box.example:8050"}).status_code == 200


@pytest.mark.parametrize("route", [
    "/assets/../../catalogue.py", "/assets/%2e%2e/catalogue.py", "/assets/..%2f..%2fcatalogue.py", "/assets//etc/passwd",
    "/_dash-component-suites/dash/../../../etc/passwd", "/static/../catalogue.py",
])  # fmt: skip
def test_no_route_leaves_its_folder(client, route):
    answer = client.get(route, headers={"Host": "localhost"})
    assert answer.status_code in (403, 404, 500) or b"react-entry-point" in answer.data


def test_everything_comes_from_this_server(client):
    answer = client.get("/", headers={"Host": "localhost"})
    page = answer.get_data(as_text=True)
    assert '<script src="http' not in page
    assert "//unpkg" not in page
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("style-src")[0]


# damaged files


def spoil(path):
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(("file", "panel"), [
    ("curves.npz", "curves"),
    ("artifacts/landscape_flatness/summary.npz", "flatness"),
    ("artifacts/landscape_flatness/step_00100.npz", "distribution"),
    ("artifacts/loss_plane/step_00100.npz", "plane"),
    ("artifacts/hessian_curvature/summary.npz", "curvature"),
    ("artifacts/trajectory_plane/across_steps.npz", "trajectory"),
])  # fmt: skip
def test_a_damaged_file_is_a_message_in_its_panel(own, file, panel):
    spoil(own / "p37" / file)
    made = draw(own, panel, 100)
    assert made.empty
    assert "cannot be read" in made.caption
    assert file.rsplit("/", 1)[-1] in made.caption
    assert str(own) not in made.caption
    assert arrive(own, "?variant=p37").panels  # the page stands
    assert not draw(own, "dimensionality", 100).empty


@pytest.mark.parametrize(
    "values", [{"x": np.arange(3)}, {"delta_losses": np.zeros((2, 2)), "baseline_loss": np.zeros(3)}]
)
def test_a_foreign_file_is_a_message_in_its_panel(own, values):
    store(own / "p37" / "artifacts" / "landscape_flatness" / "step_00100.npz", values)
    made = draw(own, "distribution", 100)
    assert made.empty
    assert "does not hold what its analyzer writes" in made.caption
    np.savez(own / "p37" / "artifacts" / "landscape_flatness" / "step_00050.npz", x=np.arange(3))
    assert "cannot be read" in draw(own, "distribution", 50).caption


def test_a_damaged_head_is_a_message_and_the_panels_stay(own):
    (own / "p37" / "variant.json").write_text("{")
    made = arrive(own, "?variant=p37")
    assert "variant.json" in made.message
    assert len(made.panels) == len(PANELS)


# saving, serving


def test_a_saved_figure_is_named_after_variant_panel_and_step_and_loads_nothing(path):
    made = draw(path, "phases", 100, "phases-first", variant="p41")
    assert made.figure.layout.meta["file"] == "p41-phases-first-step-00100"
    page = callbacks.page(made.figure)
    assert "<html" in page
    assert "Plotly.newPlot" in page
    assert "<script src=" not in page
    assert len(page) > 1_000_000  # plotly.js is inside


def test_a_bad_folder_and_a_taken_port_are_said_at_the_door(tmp_path, path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        dashboard.app(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no variant"):
        dashboard.app(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="choose another"):
        dashboard.serve(path, port=taken.getsockname()[1])


def test_controls_have_labels(path):
    card = layout.card(PANELS[1], Runs(path).variant("p37"))
    assert "Metric" in text_of(card)
    assert "aria-label" in card.children[1].children[0].to_plotly_json()["props"]


def test_an_address_may_use_the_name_that_a_variant_was_trained_under(tmp_path):
    run_folder(tmp_path, variants=("p37",), steps=STEPS[:2], planes=())
    head = json.loads((tmp_path / "p37" / "variant.json").read_text())
    (tmp_path / "p37" / "variant.json").write_text(json.dumps(head | {"variant": "mine"}))
    runs = Runs(tmp_path)
    assert callbacks.admitted(runs, {"variant": "mine"}) == "p37"
    asked = {"variant": "mine", "step": str(STEPS[0])}
    assert callbacks.opened(runs, asked, "p37", None, 0).place == 0
    assert callbacks.admitted(runs, {}) == "p37"
    for bad in ("../../etc", "/etc", "..", ""):
        assert callbacks.admitted(runs, {"variant": bad}) is None
