"""general and identity: parts of a logit are a sum that is exact once the final norm's scale is held fixed

Claim: Let h = sum_c c be what is written to the residual stream, N(h) = g (h - mean h) / s(h) + beta a layer norm with
    s(h)^2 = var(h) + e, and logit_y = W_y . N(h) + b_y. With u_y = g W_y - mean(g W_y),
    logit_y = sum_c c . u_y / s(h) + beta . W_y + b_y, whatever the parts are and whatever s is. For a root-mean-square norm
    the same holds without either mean. A part that is itself a norm N'(x) of x = sum_d d (Gemma 2) adds
    sum_d d . u'_y / (s'(x) s(h)) with u'_y = g' u_y, and its bias. With the rows of W less their mean over the
    vocabulary the sum is logit_y - mean_v logit_v. Without the mean of g W_y, without the norm, or with a scale of its own
    for each part, the sum is another number.
Function: funcscope.mechanistic.logit_attribution.logit_contributions
Size: every number of parts, as the sum enters only through h, in which each formula is linear at fixed s; every D, as the
    coefficient of h_j in the claim is that of W . (g (h - mean h)); all symbols once more at D = 2, 3 with two parts and
    V = 3.
Assumptions: exact arithmetic; s > 0.
Not covered: rounding; what a part does through later ones; a cap on the logits, before which these are.
"""

import sympy as sp
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import funcscope as fs


def symbols(name, n):
    return sp.Matrix(sp.symbols(f"{name}0:{n}", real=True))


def mean(x):
    return sum(x) / len(x)


def normed(x, gain, scale, *, centred):
    return sp.Matrix([g * (each - (mean(x) if centred else 0)) / scale for g, each in zip(gain, x, strict=True)])


def read(row, gain, *, centred):
    both = row.multiply_elementwise(gain)
    return both - sp.ones(len(both), 1) * (mean(both) if centred else 0)


def test_coefficients_for_every_width():
    """Of h_j, with all other gains and weights in two sums: g_j W_j - S / D, S the sum of all g_i W_i, in both formulas."""
    D, g, w, rest, s = sp.symbols("D g W R s", positive=True)
    logit = (g * w * (1 - 1 / D) + rest * (0 - 1 / D)) / s  # derivative of sum_i g_i W_i (h_i - mean h) / s by h_j
    claim = (g * w - (g * w + rest) / D) / s
    assert sp.simplify(logit - claim) == 0
    assert sp.simplify(logit - g * w / s) != 0  # negative control: not centred


def test_sum_of_parts_with_every_entry_a_symbol():
    for n in (2, 3):
        a, b, gain, beta, row = (symbols(name, n) for name in ("a", "b", "g", "t", "w"))
        s, own = sp.Symbol("s", positive=True), sp.Symbol("o")
        for centred in (True, False):
            logit = row.dot(normed(a + b, gain, s, centred=centred) + beta) + own
            u = read(row, gain, centred=centred)
            parts = [a.dot(u) / s, b.dot(u) / s, row.dot(beta) + own]
            assert sp.expand(sum(parts) - logit) == 0
            other = read(row, gain, centred=not centred)
            assert sp.expand((a + b).dot(other) / s + parts[2] - logit) != 0  # negative controls
            assert sp.expand((a + b).dot(row) / s + parts[2] - logit) != 0
            own_scale = sp.Symbol("s_a", positive=True)
            assert sp.expand(parts[0] * s / own_scale + parts[1] + parts[2] - logit) != 0


def test_parts_of_a_part_behind_a_norm_of_its_own():
    for n in (2, 3):
        d, e, h, inner, gain, row = (symbols(name, n) for name in ("d", "e", "h", "k", "g", "w"))
        s, t = sp.symbols("s t", positive=True)
        written = normed(d + e, inner, t, centred=False)
        logit = row.dot(normed(h + written, gain, s, centred=False))
        u = read(row, gain, centred=False)
        parts = [h.dot(u) / s, *(x.dot(read(u, inner, centred=False)) / (t * s) for x in (d, e))]
        assert sp.expand(sum(parts) - logit) == 0
        assert sp.expand(parts[0] + (d + e).dot(u) / (t * s) - logit) != 0  # negative control: its gain left out


def test_centred_rows_give_the_logit_above_the_vocabularys_mean():
    rows, x = [symbols(name, 2) for name in "uvw"], symbols("x", 2)
    logits = [row.dot(x) for row in rows]
    above = (rows[0] - (rows[0] + rows[1] + rows[2]) / 3).dot(x)
    assert sp.expand(above - logits[0] + mean(logits)) == 0
    assert sp.expand(above - logits[0]) != 0  # negative control


def test_shipped_parts_sum_to_the_models_logit():
    config = GPT2Config(n_layer=2, n_embd=6, n_head=2, vocab_size=9, n_positions=8)
    net = fs.functional(GPT2LMHeadModel(config).double())
    params = {name: value + 0.1 * torch.cos(torch.arange(value.numel()).to(value)).view(value.shape)
              for name, value in net.params.items()}  # fmt: skip
    ids = torch.tensor([[1, 2, 3, 4]])
    logits = net.apply(params, ids)
    made = fs.mechanistic.logit_contributions(net, params, {"input_ids": ids}, ids)
    torch.testing.assert_close(made.parts.sum(0), logits.gather(-1, ids[..., None])[..., 0], rtol=1e-10, atol=1e-12)
    made = fs.mechanistic.logit_contributions(net, params, {"input_ids": ids}, ids, centred=True)
    above = logits.gather(-1, ids[..., None])[..., 0] - logits.mean(-1)
    torch.testing.assert_close(made.parts.sum(0), above, rtol=1e-10, atol=1e-12)
