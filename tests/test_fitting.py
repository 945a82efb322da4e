"""What is made of a metric where memory runs out: less at a time, the same numbers; the estimate is never the last word."""

import dataclasses
import subprocess
import sys
import weakref

import pytest
import results as made
import torch
from test_engine import SIZE, size, source
from test_memory_plan import losses, same_results

from funcscope.core.memory import highest_gb, peak_growth
from funcscope.study import meter
from funcscope.study.catalogue import metric
from funcscope.study.engine import run
from funcscope.study.fitting import Fitting
from funcscope.study.memory_plan import Way, memory_plan
from funcscope.study.meter import Full, Meter, Options, memory_gb
from funcscope.study.metric import Metric
from funcscope.study.sources import InMemory

ERRORS = (
    Full("0.5 GB are in use"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError("no more"),
    torch.OutOfMemoryError("no more"),
)


def one(metric, subject=None, **options):
    (outcome,) = run([metric], [subject or source()], options=Options(**options))
    return outcome


@pytest.mark.parametrize("error", [ERRORS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in ERRORS[1:])])
def test_whatever_says_that_memory_ran_out_halves_chunks_then_batches(error):
    tried = []

    def hungry(loss, theta, *, chunk=8):
        tried.append((chunk, loss.batch_size))
        if chunk > 2 or loss.batch_size > 3:
            raise error
        return size(theta)

    outcome = one(Metric("hungry", hungry, ("loss", "theta"), plan={"chunk": 8}), min_batch_size=2, max_memory_gb=1e3)
    assert tried == [(8, 6), (4, 6), (2, 6), (1, 6), (1, 3)]
    assert outcome.ok
    assert outcome.result == size(made.theta())
    assert (outcome.plan["chunk"], outcome.plan["batch_size"]) == (1, 3)
    ran_out = [f"Memory ran out with {each}." for each in ("8 at a time", "4 at a time", "2 at a time", "batches of 6")]
    assert outcome.plan["memory"] == " ".join(ran_out)


@pytest.mark.parametrize("name", ["gradient_norms", "hessian_trace"])
@pytest.mark.slow
def test_halved_batches_change_no_number(name):
    plain = metric(name).configured(**({"num": 2} if name == "hessian_trace" else {}))
    subject = InMemory({"data": losses()}, "gpt2", content="1")
    whole = one(plain, subject)

    def hungry(loss, *needs, **settings):
        if loss.batch_size > 1:
            raise Full("0.5 GB are in use")
        return plain.call(loss, *needs, **settings)

    halved = one(dataclasses.replace(plain, call=hungry), subject, min_batch_size=1, max_memory_gb=1e3)
    assert halved.plan["batch_size"] == 1
    same_results(whole.result, halved.result, 1e-9)


def test_batches_of_several_data_sets_are_halved_together():
    """Also of those that know their data by other names than `loss`; not where a batch is what is measured."""
    two = [losses(), losses().split(2)]
    task = Metric("of_tasks", size, ("first_loss", "second_loss", "theta"))
    fitting = Fitting(task, Options(min_batch_size=1), lambda: two, made.theta)
    sizes = []
    while fitting.shrink():
        sizes.append([fitting.fitted(each).batch_size for each in two])
    assert sizes == [[1, 1]]
    by_batch = dataclasses.replace(task, by_batch=True)
    assert not Fitting(by_batch, Options(min_batch_size=1), lambda: two, made.theta).shrink()


@pytest.mark.parametrize("name", ["hessian_trace", "loss_lines"])
def test_batches_are_halved_beforehand_where_nothing_is_expected_to_fit(name, monkeypatch):
    """The limit is kept, and the numbers are the same; not where halves would take as much."""
    loss = losses()
    theta = loss.net.theta
    left = [0.0]
    monkeypatch.setattr("funcscope.study.fitting.memory_gb", lambda: 100 - left[0] * 2**30 / 1e9)
    sizes = []
    for min_batch_size in (4, 2, 1):
        fitting = Fitting(
            metric(name), Options(min_batch_size=min_batch_size, max_memory_gb=100.0), lambda: [loss], lambda: theta
        )
        fitting.choose()
        assert fitting.fitted(loss).batch_size == (fitting.size or 3)
        sizes.append(fitting.size)
        assert "too much" in fitting.why
    assert sizes == [None, 2, 1]
    assert "Batches of more than 1 would take " in fitting.why
    left[0] = 1.0
    roomy = Fitting(metric(name), Options(min_batch_size=1, max_memory_gb=100.0), lambda: [loss], lambda: theta)
    roomy.choose()
    assert (roomy.size, roomy.why) == (None, "")


def test_batches_stay_where_their_halves_are_expected_to_take_as_much(monkeypatch):
    monkeypatch.setattr("funcscope.study.memory_plan._need", lambda loss, theta, way: 2.0**30)
    loss = losses()
    fitting = Fitting(
        metric("hessian_trace"), Options(min_batch_size=1, max_memory_gb=0.01), lambda: [loss], lambda: loss.net.theta
    )
    fitting.choose()
    assert fitting.size is None


@pytest.mark.parametrize(("gib", "size"), [(2.2, 1), (5, None), (0.5, 1)])
def test_batches_are_halved_as_often_as_it_takes(gib, size, monkeypatch):
    """Also where one halving alone saves next to nothing."""
    needs = {3: 4.0, 2: 3.9, 1: 2.0}
    monkeypatch.setattr("funcscope.study.memory_plan._need", lambda loss, theta, way: needs[loss.batch_size] * 2**30)
    monkeypatch.setattr("funcscope.study.fitting.memory_gb", lambda: 100 - gib * 2**30 / 1e9)
    loss = losses()
    options = Options(min_batch_size=1, max_memory_gb=100.0)
    fitting = Fitting(metric("hessian_trace"), options, lambda: [loss], lambda: loss.net.theta)
    fitting._half = lambda: {None: 2, 2: 1, 1: 0}[fitting.size]
    fitting.choose()
    assert fitting.size == size


EXPECTED = {Way(True, False): 4.0, Way(False, False): 2.0, Way(True, True): 3.0, Way(False, True): 3.5}


@pytest.mark.parametrize(("gib", "way"), [(5, "keep"), (3.9, "anew"), (2, "anew"), (1, "anew"), (0, "anew")])
def test_where_no_way_fits_the_least_is_taken(gib, way, monkeypatch):
    monkeypatch.setattr("funcscope.study.memory_plan._need", lambda loss, theta, way: EXPECTED[way] * 2**30)
    loss = losses()
    plan = memory_plan(loss, loss.net.theta, gib)
    assert (plan.keep, plan.remat) == (way == "keep", False)
    assert plan.gib == EXPECTED[Way(way == "keep", False)]
    assert plan.why.endswith("Making the graphs anew for every product takes 2 GiB: too much, but the least.") == (
        gib < 2
    )


@pytest.mark.slow
def test_a_way_that_ran_out_is_followed_by_those_that_need_less_then_by_halved_batches(monkeypatch):
    """The expected need of every way is wrong here, and the metric has its result all the same."""
    monkeypatch.setattr("funcscope.study.memory_plan._need", lambda loss, theta, way: EXPECTED[way] * 2**30)
    monkeypatch.setattr("funcscope.study.fitting.memory_gb", lambda: 90.0)
    plain, tried = metric("hessian_trace").configured(num=2), []

    def hungry(loss, *needs, keep, **settings):
        tried.append((keep, bool(loss.net.remat), loss.batch_size))
        if loss.batch_size > 1:
            raise Full("0.5 GB are in use")
        return plain.call(loss, *needs, keep=keep, **settings)

    subject = InMemory({"data": losses()}, "gpt2", content="1")
    outcome = one(dataclasses.replace(plain, call=hungry), subject, min_batch_size=1, max_memory_gb=100.0)
    assert tried == [(True, False, 3), (False, False, 3), (False, False, 1)]
    assert outcome.plan["memory"].endswith(
        "Memory ran out keeping the graphs of all batches. Memory ran out with batches of 3."
    )
    same_results(one(plain, subject).result, outcome.result, 1e-9)
    tried.clear()
    asked = dataclasses.replace(plain.configured(keep=True), call=hungry)
    assert one(asked, subject, min_batch_size=1, max_memory_gb=100.0).ok
    assert tried == [(True, False, 3), (True, True, 3), (True, True, 1)]  # what is asked for stays


def test_what_came_before_is_collected_where_memory_is_short(monkeypatch):
    def cycle():
        box = [torch.ones(10)]
        box.append(box)
        return weakref.ref(box[0])

    monkeypatch.setattr(meter, "memory_gb", lambda: 0.6)
    roomy = cycle()
    Meter(Options(max_memory_gb=2.0))
    assert roomy() is not None
    Meter(Options(max_memory_gb=1.0))
    assert roomy() is None


def test_freed_memory_that_the_allocator_holds_is_not_in_use(monkeypatch):
    held = [2.0]
    monkeypatch.setattr(meter, "memory_gb", lambda: held[0])
    monkeypatch.setattr(meter, "hand_back", lambda: held.__setitem__(0, 0.9))
    looking = Meter(Options(max_memory_gb=1.0))
    held[0] = 2.0
    looking("forward", 1)
    assert held == [0.9]


@pytest.mark.parametrize(
    ("used", "most", "said"), [(0.5341, 0.53, "0.534"), (0.53000001, 0.53, "0.53000001"), (12.3456, 0.5, "12.35")]
)
def test_what_is_in_use_is_said_with_enough_digits(used, most, said, monkeypatch):
    """Also what was in use before, and what may be done."""
    monkeypatch.setattr(meter, "memory_gb", lambda: 0.5)
    looking = Meter(Options(max_memory_gb=most))
    monkeypatch.setattr(meter, "memory_gb", lambda: used)
    with pytest.raises(
        Full, match=rf"^{said} GB are in use, 0\.50 GB of them since before.* Allow more by .*batch_size"
    ):
        looking("product", 1)


def test_an_ended_metric_has_no_class_name_for_a_reason():
    outcome = one(
        Metric("endless", lambda loss, theta: [loss(theta) for _ in range(9)], ("loss", "theta")), max_memory_gb=1e-6
    )
    assert outcome.status == "out of memory"
    assert outcome.reason == outcome.error
    assert "Full" not in outcome.reason
    failed = dataclasses.replace(outcome, status="failed", error_type="a.b.Odd", error="it is odd")
    assert failed.reason == "Odd: it is odd"


@pytest.mark.slow
@pytest.mark.skipif(highest_gb() != highest_gb() or torch.cuda.is_available(), reason="of the resident set, on Linux")
def test_a_peak_between_two_looks_is_said():
    def peaked(theta, *, mib=1):
        torch.ones(mib * 2**18)
        return size(theta)

    meter.cleanup_memory()
    for above in (0.1, 0.15):  # whatever the peak of what came before
        most = memory_gb() + above
        plain = one(Metric("peaked", peaked, ("theta",)), max_memory_gb=most)
        assert "peak" not in plain.plan
        outcome = one(Metric("peaked", peaked, ("theta",), {"mib": 256}), max_memory_gb=most)
        assert outcome.ok
        said, _, allowed = outcome.plan["peak"].partition(" GB in use, above the memory limit of ")
        assert most < float(said) < most + 0.3
        assert allowed == f"{most:g} GB"
    assert "peak" not in one(SIZE, max_memory_gb=most).plan
    assert peak_growth(lambda: torch.ones(2**24))[1] > 50


STUDY = """
import torch, funcscope as fs
from funcscope.study.engine import run
from funcscope.study.meter import Options, memory_gb
from funcscope.study.catalogue import metric
from funcscope.study.metric import Metric
from funcscope.study.sources import InMemory
torch.manual_seed(0)
net = fs.functional(torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 5)))
loss = fs.objective(net, [(torch.randn(4, 20), torch.zeros(4).long())], fs.classification)
loss(net.theta)


def greedy(loss, theta):
    box = []
    box.append(box)
    while True:
        box.append(torch.ones(30_000))
        loss(theta)


made = run([Metric("greedy", greedy), metric("mean_loss"), metric("hessian_trace").configured(num=2)],
           [InMemory({"data": loss}, name, content=name) for name in "ab"], options=Options(max_memory_gb=memory_gb() + 0.15))
print(*[each.status.replace(" ", "_") for each in made])
"""


@pytest.mark.slow
def test_what_ran_out_of_memory_takes_none_from_those_after_it():
    done = subprocess.run([sys.executable, "-c", STUDY], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["out_of_memory", "ok", "ok"] * 2
