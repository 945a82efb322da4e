"""Several metrics from one forward pass: the same numbers, one pass, and each with its own failure."""

from dataclasses import replace

import pytest
import results as made
import torch

import funcscope as fs
from funcscope import mechanistic
from funcscope.core.progress import watched
from funcscope.core.reading import Reading, one_pass, passed, read
from funcscope.core.result import Result, quantity
from funcscope.core.trace import trace
from funcscope.study.cache import Cache
from funcscope.study.catalogue import metric
from funcscope.study.engine import run
from funcscope.study.meter import Options
from funcscope.study.metric import Metric
from funcscope.study.sources import InMemory

SHARED = ("attention_patterns", "logit_lens", "logit_attribution")


class Largest(Result):
    """The largest entry of the last stream."""

    largest: float = quantity("largest entry")
    num: int = quantity("batches")


@one_pass
def largest(loss, params, *, fails=None):
    """The largest entry of what the last block writes."""

    def of_batch(batch):
        if fails is not None:
            raise fails
        return float(batch.seen["resid_post.1"].max())

    return Reading(("resid_post.1",), of_batch, lambda parts: Largest(max(parts), len(parts)))


def passes(call):
    """How many forward passes it makes."""
    seen = []
    with watched(lambda kind, _: seen.append(kind)):
        result = call()
    return seen.count("forward"), result


@pytest.fixture(scope="module")
def loss():
    return made.language().split(1)


def test_one_pass_gives_what_each_gives_alone(loss):
    params = loss.net.params
    calls = {name: getattr(mechanistic, name) for name in SHARED}
    num, together = passes(lambda: read(loss, params, {n: each.reading(loss, params) for n, each in calls.items()}))
    assert num == len(loss.batches) > 1
    for name, call in calls.items():
        alone_num, alone = passes(lambda call=call: call(loss, params))
        assert alone_num == num
        assert together[name] == alone


def test_a_pass_without_logits_stops_before_the_last_matrix(loss):
    net, (inputs, _) = loss.net, loss.batches[0]
    widths = []
    net._running.get_output_embeddings().register_forward_hook(lambda *_: widths.append(0))
    seen = trace(net, net.params, inputs, ["resid_post", "final"])
    whole = trace(net, net.params, inputs, ["resid_post", "final", "logits"])
    assert torch.equal(seen["final"], whole["final"])
    assert torch.equal(seen.mask, whole.mask)
    assert whole["logits"].shape[:2] == seen.mask.shape
    by_module = trace(net, net.params, inputs, ["module:lm_head"])
    assert torch.equal(by_module["module:lm_head"], whole["logits"])


def test_an_output_of_ones_own_gets_the_whole_pass(loss):
    config = loss.net.config
    model = made.seeded(0, lambda: type(loss.net._skeleton)(config))
    net = fs.functional(model, output=lambda out: out.logits[:, -1])
    assert trace(net, net.params, loss.batches[0][0], ["final"])["final"].ndim == 3


def test_one_that_fails_leaves_the_others(loss):
    params = loss.net.params
    bad = largest.reading(loss, params, fails=ZeroDivisionError("of nothing"))
    both = passed(loss, params, {"bad": bad, "good": largest.reading(loss, params)})
    assert isinstance(both["bad"].error, ZeroDivisionError)
    assert both["bad"].kept is None
    assert len(both["good"].kept) == len(loss.batches)
    with pytest.raises(ZeroDivisionError, match="of nothing"):
        read(loss, params, {"good": largest.reading(loss, params), "bad": bad})
    with pytest.raises(ValueError, match="`readings` must have one at least"):
        read(loss, params, {})


def study(loss, metrics, cache=None, **options):
    return run(metrics, [InMemory({"data": loss}, "model", content="1")], cache=cache, options=Options(**options))


def test_a_study_makes_one_pass_for_all_of_them(loss, tmp_path):
    cache = Cache(tmp_path)
    outcomes = study(loss, [metric(name) for name in SHARED], cache)
    assert [each.cost["forwards"] for each in outcomes] == [len(loss.batches), 0, 0]
    assert all(each.cost["seconds"] > 0 for each in outcomes)
    for name, each in zip(SHARED, outcomes, strict=True):
        assert each.result == getattr(mechanistic, name)(loss, loss.net.params)
    other = Cache(tmp_path / "other")
    study(loss, [metric("logit_lens")], other)
    again = study(loss, [metric(name) for name in SHARED], other)
    assert [each.reused for each in again] == [False, True, False]
    assert [each.cost["forwards"] for each in again if not each.reused] == [len(loss.batches), 0]


@pytest.mark.parametrize("first", [True, False])
def test_the_failure_of_one_is_its_own_in_a_study(loss, first):
    good = Metric("good", largest, ("loss", "params"))
    bad = Metric("bad", largest, ("loss", "params"), {"fails": ZeroDivisionError("of nothing")})
    by_name = {each.metric: each for each in study(loss, [bad, good] if first else [good, bad])}
    assert by_name["good"].ok
    assert by_name["good"].result.num == len(loss.batches)
    assert by_name["bad"].status == "failed"
    assert by_name["bad"].error_type == "ZeroDivisionError"


def test_where_memory_runs_out_each_goes_alone_before_batches_are_halved():
    loss = made.language()
    once = [MemoryError("out of memory")]

    @one_pass
    def greedy(loss, params):
        """Too much for the first time."""

        def of_batch(batch):
            if once:
                raise once.pop()
            return float(batch.seen["resid_post.1"].max())

        return Reading(("resid_post.1",), of_batch, lambda parts: Largest(max(parts), len(parts)))

    metrics = [Metric("good", largest, ("loss", "params")), Metric("greedy", greedy, ("loss", "params"))]
    outcomes = study(loss, metrics)
    assert [(each.status, each.error) for each in outcomes] == [("ok", "")] * 2
    assert [each.result.num for each in outcomes] == [len(loss.batches)] * 2
    assert all("batch_size" not in each.plan for each in outcomes)


def test_with_a_time_of_its_own_each_makes_its_own_pass(loss):
    outcomes = study(loss, [metric(name) for name in SHARED], timeout_seconds=100.0)
    assert [each.cost["forwards"] for each in outcomes] == [len(loss.batches)] * 3


def test_what_is_no_loss_is_named(loss):
    with pytest.raises(Exception, match="Loss"):
        passed(loss.net, loss.net.params, {"largest": largest.reading(loss, loss.net.params)})
    assert replace(loss).net is loss.net


def test_what_is_no_reading_is_named_with_what_makes_one(loss):
    with pytest.raises(TypeError, match=r"`readings\['lens'\]` must be a Reading.*metric.reading"):
        read(loss, loss.net.params, {"largest": largest.reading(loss, loss.net.params), "lens": mechanistic.logit_lens})
