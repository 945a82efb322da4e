"""The dashboard without a browser: what a study offers, what a card shows, what is refused, and what is said of failures."""

import json
import socket

import numpy as np
import plotly.graph_objects as go
import pytest
import results as made
import torch
from plotly.io.json import to_json_plotly
from test_engine import FEW

from funcscope.core.result import Result, quantity
from funcscope.study.cache import Cache
from funcscope.study.catalogue import CATALOGUE, metric
from funcscope.study.engine import run
from funcscope.study.metric import Metric
from funcscope.study.results import MANIFEST, Results
from funcscope.study.sources import InMemory
from funcscope.view import dashboard
from funcscope.view.dashboard import callbacks, cards, reading

STEPS = (0, 10, 50, 100)
NAMES = ("loss_landscape_2d", "landscape_flatness", "hessian_trace", "effective_dimensionality", "mean_loss")
RUN = "p5"


class Sized(Result):
    size: float = quantity("norm of the weights", unit="loss")
    squares: torch.Tensor = quantity("square", per="parameter")
    table: torch.Tensor = quantity("cell", per=("row", "column"))


def sized(theta):
    """The norm of the weights."""
    if float(theta.norm()) < float(made.theta().norm()) * 1.05:
        raise ArithmeticError("<b>too small</b>")
    return Sized(float(theta.norm()), theta.square(), theta[:6].reshape(2, 3))


SIZED = Metric("sized", sized, ("theta",))


def source(name, at=None, scale=1.0):
    run = "" if at is None else RUN
    return InMemory({"data": made.loss()}, name, theta=made.theta() * scale, content=f"{name}{scale}", at=at, run=run)


def study_folder(path, steps=STEPS, models=("a", "b")):
    """A run with a metric that has no result at step 0, a plane at some steps only, and models without steps."""
    sources = [source(f"{RUN}@{step}", at=step, scale=1 + step / 100) for step in steps] + [source(m) for m in models]
    chosen = [metric(name).configured(**FEW.get(name, {})) for name in NAMES]
    outcomes = run([*chosen, SIZED], sources, cache=Cache(path / "cache"))
    sparse = (o for o in outcomes if o.metric != "loss_landscape_2d" or o.step not in (10, 50))
    Results(tuple(sparse)).save(path, {"config": {}})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return study_folder(tmp_path_factory.mktemp("study"))


@pytest.fixture
def groups(folder):
    return reading.study(folder)[0]


@pytest.fixture
def steps_of(groups):
    return next(group for group in groups.values() if group.steps)


def parts(component):
    """A component and all below it."""
    yield component
    inner = getattr(component, "children", None) or ()
    for each in inner if isinstance(inner, (list, tuple)) else [inner]:
        yield from parts(each)


def texts(component):
    return " ".join(part for each in component for part in parts(each) if isinstance(part, str))


def graphs(component):
    return [p.figure for each in component for p in parts(each) if type(p).__name__ == "Graph"]


def shown(group, name, step=None):
    return cards.body(group, name, step, next(iter(reading.singles(group.outcomes[name])), None))


def test_a_study_offers_its_runs_and_its_models(groups):
    assert [group.steps for group in groups.values() if group.steps] == [STEPS]
    assert {reading.MODELS, "a", "b"} < set(groups)
    assert {outcome.subject for outcome in groups[reading.MODELS].outcomes["mean_loss"]} == {"a", "b"}


def test_every_card_of_every_group_is_drawn_where_there_are_outcomes_and_where_not(groups):
    for group in groups.values():
        for name in group.outcomes:
            for step in group.steps[:3:2] or (None,):
                body = shown(group, name, step)
                assert body
                assert "could not be shown" not in texts(body)
                assert json.loads(to_json_plotly([*body, cards.card(name, group.outcomes[name])]))


def test_the_numbers_of_several_steps_can_be_followed_with_the_step_marked(steps_of):
    for name, outcomes in steps_of.outcomes.items():
        for followed in list(reading.singles(outcomes))[-1:]:
            trajectories = graphs(cards.body(steps_of, name, 50, followed))[:1]
            assert [s["x0"] ** 2 for s in trajectories[0]["layout"]["shapes"] if s.get("name") == "current step"] == [
                pytest.approx(50)
            ]
            steps = [step for trace in trajectories[0]["data"] for step in trace.get("customdata", ())]
            assert {o.step for o in outcomes if o.ok} >= set(steps) > set()


def test_the_nearest_step_with_an_outcome_is_shown_and_said(steps_of):
    body = shown(steps_of, "loss_landscape_2d", 50)
    assert "Step 0, the nearest to 50 that has one." in texts(body)
    go_to = [p.id["step"] for each in body for p in parts(each) if getattr(p, "className", "") == "" or hasattr(p, "id")
             if isinstance(getattr(p, "id", None), dict) and p.id["type"] == "go"]  # fmt: skip
    assert go_to == [0, 100]
    assert "nearest" not in texts(shown(steps_of, "loss_landscape_2d", 100))


def test_what_failed_is_shown_as_what_it_is(groups, steps_of):
    said = texts(shown(steps_of, "sized", 0))
    assert "step 0: failed" in said
    assert "ArithmeticError: <b>too small</b>" in said  # a text: React escapes it
    assert "Step 10, the nearest to 0 that has one." in said
    assert "failed" not in texts(shown(steps_of, "sized", 100))
    assert "a: failed" in texts(shown(groups["a"], "sized"))


def test_a_renderer_that_fails_is_shown_as_what_it_is(steps_of, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("in a figure")

    monkeypatch.setattr(cards, "figures", broken)
    said = texts(shown(steps_of, "hessian_trace", 50))
    assert "ZeroDivisionError: in a figure" in said
    assert "file" not in said


def test_colours_and_dots_have_the_scale_of_all_steps(steps_of):
    def ends(name, step, of):
        return [of(figure) for figure in graphs(shown(steps_of, name, step)) if of(figure)]

    planes = [
        ends("sized", step, lambda f: [(t["zmin"], t["zmax"]) for t in f["data"] if "zmin" in t]) for step in STEPS[1:]
    ]
    assert planes[0] == planes[1] == planes[2] != []
    values = np.concatenate([o.result.squares.numpy() for o in steps_of.outcomes["sized"] if o.ok])
    ranges = []
    for step in STEPS[1:]:
        body = shown(steps_of, "sized", step)
        (dots,) = [f for f in graphs(body) if any(t.get("name") == "dots" for t in f["data"])]
        low, high = dots["layout"]["xaxis"]["range"]
        alone = "of this step alone" in texts(body)
        assert alone or (low <= values.min() and high >= values.max())
        ranges += [] if alone else [(low, high)]
    assert len(set(ranges)) <= 1


def test_dots_that_the_scale_of_all_steps_would_squeeze_have_their_own():
    def dots():
        return go.Figure(layout={"xaxis": {"range": [0, 1], "title": {"text": "change (10⁻³ nats)"}}})

    own, common = dots(), dots()
    assert "this step alone" in cards._common(own, 0.0, 1e6)
    assert own.layout.xaxis.range == (0, 1)
    assert "all steps" in cards._common(common, 0.0, 2.0)
    assert common.layout.xaxis.range[1] >= 2
    assert common.layout.xaxis.title.text == "change (nats)"


@pytest.mark.parametrize(
    ("asked", "step", "said"),
    [({}, 100, ""), ({"step": "50"}, 50, ""), ({"step": "60"}, 50, "Step 60 is not in"), ({"step": "-1"}, 100, "whole"),
     ({"step": "²"}, 100, "whole"), ({"step": "9" * 40}, 100, "whole"), ({"metric": "../x"}, 100, "no metric")],
)  # fmt: skip
def test_an_address_is_believed_where_the_study_has_it(groups, steps_of, asked, step, said):
    place = reading.admitted(groups, {"group": steps_of.name, **asked})
    assert place.step == step
    assert place.metric is None
    assert said in place.message
    assert bool(said) == bool(place.message)


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "nobody", "<script>"])
def test_a_group_outside_the_study_is_refused(folder, groups, name):
    assert reading.admitted(groups, {"group": name}) is None
    _, _, value, _, _, _, message = callbacks.arrival(folder, f"?group={name}&step=1")
    assert value is None
    assert f"There is no “{name}” in this study" in message
    assert callbacks.choice(groups, name, None, 1, "") == ({}, [])


def test_one_metric_of_the_address_is_shown_alone(folder, groups, steps_of):
    *_, metric_value, _, message = callbacks.arrival(folder, "?metric=mean_loss")
    assert (metric_value, message) == ("mean_loss", "")
    known, shown_cards = callbacks.choice(groups, steps_of.name, "mean_loss", 10, "")
    assert [card.id for card in shown_cards] == ["card-mean_loss"]
    assert known["steps"][known["index"]] == 10


def test_a_study_that_grows_is_read_again_and_one_that_rests_is_not(tmp_path):
    study_folder(tmp_path, steps=(0, 10), models=())
    before, stamp, _ = reading.study(tmp_path)
    assert reading.study(tmp_path)[0] is before
    study_folder(tmp_path, steps=(0, 10, 50), models=())
    after, new, _ = reading.study(tmp_path)
    assert new != stamp
    assert [group.steps for group in (*before.values(), *after.values())] == [(0, 10), (0, 10, 50)]


def test_a_study_that_is_being_written_is_shown_as_it_was_last_whole(tmp_path):
    path = study_folder(tmp_path, steps=(0, 10), models=()) / MANIFEST
    text, before = path.read_text(), reading.study(tmp_path)
    for half in (text[: len(text) // 2], "", "{}", "[]", None):
        path.unlink() if half is None else path.write_text(half)
        arrived = callbacks.arrival(tmp_path, "")
        assert arrived[1:3] == ([RUN], RUN)
        assert "cannot be read" in arrived[-1]
        assert arrived[5] != before.stamp
    path.write_text(text)
    for cell in (tmp_path / "cache").glob("*/mean_loss*.npz"):
        cell.unlink()
    path.touch()
    groups, _, message = reading.study(tmp_path)
    assert message == ""
    assert "cannot be read" in texts(shown(groups[RUN], "mean_loss", 10))
    assert graphs(shown(groups[RUN], "landscape_flatness", 10))


@pytest.mark.parametrize(
    ("point", "place"),
    [({"customdata": 50}, 2), ({"customdata": 49.6}, 2), ({"customdata": 50, "z": 1.0}, None),
     ({"customdata": [1, 2]}, None), ({}, None)],
)  # fmt: skip
def test_a_click_on_a_step_goes_there_and_on_anything_else_nowhere(point, place):
    assert callbacks.clicked({"points": [point]}, STEPS) == place
    assert callbacks.clicked(None, STEPS) is None


def test_a_figure_is_saved_as_a_page_that_loads_nothing(steps_of):
    figure = json.loads(to_json_plotly(graphs(shown(steps_of, "hessian_trace", 50))[0]))
    text = callbacks.page(figure)
    assert "Plotly.newPlot" in text
    assert "<script src=" not in text
    assert figure["layout"]["meta"]["file"].endswith("hessian_trace-step-00050-1")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "[", "localhost.evil:80"])
def test_other_names_of_this_machine_are_refused(folder, host):
    client = dashboard.app(folder).server.test_client()
    assert client.get("/", headers={"Host": host}).status_code == 403
    page = client.get("/", headers={"Host": "localhost:8050"})
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert client.get("/../study.json", headers={"Host": "localhost"}).status_code != 200 or b'"cells"' not in page.data


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no study"):
        dashboard.app(tmp_path)


def test_a_taken_port_is_said(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="choose another `--port`"):
        dashboard.serve(folder, port=taken.getsockname()[1])


def test_every_metric_of_the_catalogue_has_a_card():
    for name in CATALOGUE:
        assert cards.card(name, []).id == f"card-{name}"
