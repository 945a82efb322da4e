"""Closed forms of attention and its derivatives. Oracle: torch's derivatives of the whole softmax, in float64."""

from __future__ import annotations

import pytest
import torch
from problems import seeded, tokens
from test_architectures import labelled, model_of
from torch import nn
from torch.func import grad, jvp, vjp, vmap
from torch.testing import assert_close

import funcscope as fs
from funcscope.core import attention_blocks
from funcscope.core.attention_blocks import scale_of, spans
from funcscope.core.attention_formulas import Attention
from funcscope.core.brief_masks import additive, brief, spelt_out
from funcscope.core.remat import by_formula

NUM, SCALE = 7, 0.3
WAYS = [(1, "causal"), (2, "causal"), (3, "window"), (2, "all"), (2, "whole"), (1, "cross")]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_blocks, "ROWS", 3)


class Case:
    """Two sequences, two heads of keys, queries in groups; what is padded is in the second."""

    def __init__(self, groups: int, kind: str):
        num_keys = 5 if kind == "cross" else NUM
        shapes = [(2, 2 * groups, NUM, 4), (2, 2, num_keys, 4), (2, 2, num_keys, 3), (2, NUM, 2 * groups, 3)]
        self.q, self.k, self.v, self.g, *self.dots = seeded(
            1, lambda: [torch.randn(shape).double() for shape in [*shapes, *shapes]]
        )
        visible, at = torch.ones(2, 1, 1, num_keys, dtype=torch.bool), torch.arange(NUM).int()
        visible[1, ..., -2:] = False
        causal, back = kind in ("causal", "window", "whole"), 3 if kind == "window" else 0
        self.mask = (
            brief(visible, (at + 1 - back).clamp(min=0) if back else 0 * at, at + 1) if causal else torch.zeros(0)
        )
        self.added = additive(spelt_out(self.mask), torch.float64) if causal else torch.zeros(1).double()
        if kind == "cross":
            self.mask = self.added = additive(visible, torch.float64)
        if kind == "whole":
            self.mask = self.added
        blocks = tuple(spans(NUM, num_keys, causal and kind != "whole", back))
        self.call, self.groups = Attention(SCALE, groups, blocks), groups

    def ours(self, q, k, v):
        return by_formula(self.call.formula(), q, k, v, self.mask)[0]

    def oracle(self, q, k, v):
        k, v = (x.repeat_interleave(self.groups, 1) for x in (k, v))
        return ((SCALE * q @ k.mT + self.added).softmax(-1) @ v).transpose(1, 2)


def pull(f):
    return lambda q, k, v, g: vjp(f, q, k, v)[1](g)


TRANSFORMS = {
    "value": lambda f, c: f(c.q, c.k, c.v),
    "pull": lambda f, c: pull(f)(c.q, c.k, c.v, c.g),
    "push": lambda f, c: jvp(f, (c.q, c.k, c.v), tuple(c.dots[:3]))[1],
    "pull of pull": lambda f, c: vjp(pull(f), c.q, c.k, c.v, c.g)[1](tuple(c.dots[:3])),
    "pull of pull in the cotangent": lambda f, c: vjp(lambda g: pull(f)(c.q, c.k, c.v, g), c.g)[1](tuple(c.dots[:3])),
    "push of pull": lambda f, c: jvp(pull(f), (c.q, c.k, c.v, c.g), tuple(c.dots))[1],
    "push of pull in the queries": lambda f, c: jvp(lambda q: pull(f)(q, c.k, c.v, c.g), (c.q,), (c.dots[0],))[1],
    "pull of push": lambda f, c: vjp(lambda *xs: jvp(f, xs, tuple(c.dots[:3]))[1], c.q, c.k, c.v)[1](c.g),
    "push of push": lambda f, c: jvp(
        lambda *xs: jvp(f, xs, tuple(c.dots[:3]))[1], (c.q, c.k, c.v), tuple(c.dots[:3])
    )[1],
    "third": lambda f, c: grad(
        lambda q: sum((x**2).sum() for x in vjp(pull(f), q, c.k, c.v, c.g)[1](tuple(c.dots[:3])))
    )(c.q),
    "vmap of pull": lambda f, c: vmap(lambda a: pull(f)(a * c.q, c.k, a * c.v, c.g))(torch.tensor([1.0, 0.5]).double()),
    "vmap of push of pull": lambda f, c: vmap(
        lambda a: jvp(pull(f), (c.q, c.k, c.v, c.g), tuple(a * x for x in c.dots))[1]
    )(torch.tensor([1.0, 0.5]).double()),
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("groups", "kind"), WAYS)
def test_every_transform_is_that_of_the_whole_softmax(groups, kind, transform):
    case = Case(groups, kind)
    with torch.enable_grad():
        ours, oracle = (TRANSFORMS[transform](f, case) for f in (case.ours, case.oracle))
    assert_close(ours, oracle, rtol=1e-11, atol=1e-12)


def test_graphs_of_backward_are_those_of_the_formulas():
    case = Case(2, "causal")
    xs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):  # which draw
        assert seeded(2, lambda check=check: check(lambda *xs: case.ours(*xs), xs))


@pytest.mark.parametrize(
    ("line", "dtypes"), [("gpt2", (4, 8)), ("bart", (4, 8)), ("llama", (4,)), ("gemma2", ()), ("gpt_oss", None)]
)
def test_a_model_whose_attention_is_more_than_a_softmax_is_not_taken_by_formula(line, dtypes, monkeypatch):
    """Gemma 2 caps its scores, a Llama's softmax is in float32 always, gpt-oss has sinks: parameters; it is not asked."""
    for dtype in (torch.float32, torch.float64):
        found = []

        def spy(*args, found=found):
            found.append(scale_of(*args))
            return found[-1]

        monkeypatch.setattr(attention_blocks, "scale_of", spy)
        net = fs.functional(model_of(line, dtype), attention="blocks")
        ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
        net.apply(net.params, {"input_ids": ids, **({"labels": ids} if line == "bart" else {})})
        assert set(found) == (set() if dtypes is None else {8**-0.5 if dtype.itemsize in dtypes else None})


@pytest.mark.parametrize("line", ["gpt2", "llama"])
def test_derivatives_in_float32_are_those_of_whole_scores(line):
    ours, theirs = (mapped(line, kind) for kind in ("blocks", "eager"))
    theta = theirs.net.theta
    v = fs.normal(fs.key(1), theta)
    for product in (fs.hessian, fs.ggn):
        expected = product(theirs, theta)(v)
        assert float((product(ours, theta)(v) - expected).norm() / expected.norm()) < 1e-5


def mapped(line, attention):
    net = fs.functional(model_of(line, torch.float32), attention=attention)
    return fs.objective(net, [labelled(line, tokens(1, 3, 9, pad=3))], fs.causal_lm)


def test_what_an_own_attention_adds_is_seen_in_its_values():
    module, query = nn.Module(), torch.zeros(1, 1, 3, 4)

    def eager(module, q, k, v, mask, scaling=0.5, bias=0.0, **_):
        return ((q @ k.mT * scaling + mask + bias * torch.arange(k.shape[-2])).softmax(-1) @ v).transpose(1, 2), None

    assert scale_of(eager, module, query, {"scaling": 0.5}) == 0.5
    assert scale_of(eager, module, query, {"scaling": 0.5, "bias": 1e-6}) is None


@pytest.mark.parametrize("more", ["clamped", "longer", "by head"])
def test_what_shows_in_large_scores_in_long_rows_or_in_some_heads_is_seen(more):
    def eager(module, q, k, v, mask, scaling=0.5, **_):
        scores = q @ k.mT * scaling
        if more == "clamped":
            scores = scores.clamp(-50, 50)
        elif more == "longer":
            scores = scores * (1.1 if k.shape[-2] > 64 else 1)
        else:
            scores = scores * torch.linspace(1, 2, q.shape[1])[:, None, None]
        return ((scores + mask).softmax(-1) @ v).transpose(1, 2), None

    assert scale_of(eager, nn.Module(), torch.zeros(1, 2, 3, 4), {"scaling": 0.5}) is None
