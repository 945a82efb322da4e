"""Bad requests of curvature get one clear line: every door with what it says."""

import inspect
import math

import pytest
import torch
from problems import loss_of, problem
from test_sam import parabola

import funcscope as fs
from funcscope.curvature import directional_curvatures, empirical_fisher, exact_fisher, fisher_mc, ggn, hessian

MLP, GPT2, KEY = loss_of("mlp"), loss_of("gpt2"), fs.key(0)
THETA, EYE = MLP.net.theta, torch.eye(2, dtype=torch.float64)
KINK = fs.objective(MLP.net, problem("mlp").batches, fs.custom(lambda out, y: (out * 0).sum(1).sqrt() + out.sum(1)))
NO_SAMPLE = fs.objective(MLP.net, problem("mlp").batches, fs.custom(lambda out, y: out.square().sum(-1)))
KEEP = loss_of("mlp", attention="keep")


def pairs(num=1, **options):
    return fs.eigenpairs(hessian(MLP, THETA), THETA, key=KEY, num=num, which="largest", **options)


def errors(num):
    return fs.eigenvalue_errors(MLP, THETA, pairs(num, vectors=True))


def sam(theta=THETA, loss=MLP, **options):
    return fs.sam_sharpness(loss, theta, **options)


def average(theta=THETA, **options):
    return inspect.unwrap(fs.average_sharpness)(MLP, theta, **{"key": KEY, **options})


def critical(*args, **options):
    return fs.critical_sharpness(MLP, *args, **options)


CASES = [
    *((lambda bad=bad: sam(epsilon=bad), "`epsilon` must be a finite number above 0") for bad in (0.0, -1.0, math.nan)),
    (lambda: sam(steps=0), "`steps` must be an integer of at least 1, got 0"),
    (lambda: sam(norm_threshold=-1.0), "`norm_threshold` must be a finite number"),
    (
        lambda: inspect.unwrap(fs.asam_sharpness)(MLP, THETA, scale="row"),
        "`scale` must be one of 'elementwise', 'filter'",
    ),
    (lambda: sam(THETA[1:]), "flat vector of shape"),
    (lambda: sam({"0.weight": THETA[:24].view(6, 4)}), r"`theta` must have the 4 names of `net\.layout\.names`"),
    (lambda: sam(THETA * math.nan), "the loss at theta is nan"),
    (lambda: sam(loss=KINK), r"the gradient at theta has \d+ entries that are not finite"),
    (lambda: sam(loss=KEEP), r"made with `attention=.keep.`"),
    (lambda: sam(0 * THETA[:2], parabola(EYE, torch.ones(2)), adaptive_epsilon=True), "norm of theta, which is 0"),
    (lambda: fs.asam_sharpness(parabola(EYE, torch.ones(2)), 0 * THETA[:2]), "the gradient's norm is 0"),
    (lambda: fs.m_sharpness(MLP, THETA, m=9), "no batch has 9 sequences"),
    (lambda: average(distribution="cube"), "`distribution` must be one of 'sphere', 'normal', 'relative', got 'cube'"),
    (lambda: average(key=0), "`key` must be a key"),
    (lambda: average(num=0), "`num` must be"),
    (lambda: average(epsilon=0.0), "`epsilon` must be"),
    (lambda: average(THETA * math.nan), "the loss at theta is nan"),
    (lambda: average(THETA * 0, distribution="relative"), "proportional to theta, which is 0"),
    (lambda: critical(THETA, tolerance=0.0), "`tolerance` must be a finite number above 0"),
    (lambda: critical(THETA, start=-1.0), "`start` must be a finite number above 0"),
    (lambda: critical(THETA, max_forwards=1), "`max_forwards` must be an integer of at least"),
    (lambda: critical(THETA, THETA[:3]), "`direction` must be a flat vector of shape"),
    (lambda: critical(THETA, THETA * math.nan), "slope along the update nan"),
    (lambda: critical(THETA * math.nan), "the loss at theta is nan"),
    (
        lambda: fs.relative_critical_sharpness(parabola(EYE, torch.ones(2)), MLP, THETA),
        "`loss_1` and `loss_2` must be losses of the same parameters",
    ),
    (lambda: fs.eigenvalue_errors(MLP, 1.2 * THETA, pairs(vectors=True)), "add up to"),
    (lambda: fs.eigenvalue_errors(MLP, THETA, pairs(vectors=True), matrix="ggn"), r"add up to .* `matrix`"),
    (lambda: fs.eigenvalue_errors(MLP, THETA, pairs()), "vectors=True"),
    (lambda: fs.sequence_forms(MLP, THETA, THETA[None, 1:]), r"`vectors` must have shape \(k, 51\)"),
    (lambda: fs.compare_eigenvalues(errors(2), errors(1)), "ask for as many"),
    (lambda: hessian(MLP, THETA)(THETA[1:]), "`v` must be a flat vector"),
    (lambda: ggn(MLP, THETA[1:]), "`theta` must be a flat vector"),
    (lambda: ggn(MLP, THETA, head_chunk=4), "`head_chunk` needs a causal language model"),
    (lambda: ggn(GPT2, GPT2.net.theta, head_chunk=0), "`head_chunk` must be an integer of at least 1"),
    (lambda: hessian(GPT2, GPT2.net.theta, keep=False, head_chunk=4), "`head_chunk` needs `keep=True`"),
    (lambda: inspect.unwrap(empirical_fisher)(MLP, THETA, unit="batch"), "`unit` must be one of"),
    (lambda: exact_fisher(NO_SAMPLE, THETA), "has no `sample`"),
    (lambda: fisher_mc(NO_SAMPLE, THETA, key=KEY), "has no `sample`"),
    (lambda: directional_curvatures(MLP, THETA, []), "the number of directions"),
    (lambda: fs.curvature.block_slices(MLP.layout, "filter"), "must keep parameters whole"),
    (lambda: fs.audit(MLP, THETA * math.nan, key=KEY), "nan"),
    (lambda: fs.audit(MLP, THETA, key=KEY, num=1), "`num`"),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=[message for _, message in CASES])
def test_bad_requests_get_one_clear_line(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_what_the_refused_lack_is_enough():
    """The control: without what needs it, the same requests pass."""
    assert sam(loss=KEEP, theta=KEEP.net.theta, curvature=False).absolute > 0
    assert empirical_fisher(NO_SAMPLE, THETA)(THETA).isfinite().all()
