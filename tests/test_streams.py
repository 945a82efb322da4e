"""Streams of a corpus: moments and samples are those of everything at once, whatever the batches are."""

import subprocess
import sys
import textwrap

import pytest
import torch
from problems import problem, tokens
from test_architectures import model_of
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.standard_errors import ratio_stderr
from funcscope.core.streams import _merged, _of_batch, sampled, summed
from funcscope.representation import moments_spectra

SITES = ["resid_post", "mlp_out.1"]


def cut(batch, sizes):
    return [dict(zip(batch, rows, strict=True)) for rows in zip(*(x.split(sizes) for x in batch.values()), strict=True)]


def values(net, batch, site):
    """Oracle: the real positions of everything at once."""
    seen = fs.trace(net, net.params, batch, [site])
    return seen[site].detach(), seen.mask


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_moments_are_those_of_all_real_positions_at_once(name, left):
    net = fs.functional(problem(name).model)
    batch = tokens(7, 5, 9, pad=4, left=left)
    for diagonal in (False, True):
        seen = fs.streamed(net, net.params, iter(cut(batch, [2, 2, 1])), SITES, diagonal=diagonal)
        x, mask = values(net, batch, "resid_post.0")
        rows, got = x[mask], seen.moments["resid_post.0"]
        assert (got.num, got.num_sequences) == (int(mask.sum()), 5)
        assert got.num < mask.numel()
        of = torch.diagonal if diagonal else (lambda matrix: matrix)
        assert_close(got.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
        assert_close(got.second_moment, of(rows.T @ rows / len(rows)), rtol=1e-12, atol=1e-12)
        assert_close(got.covariance, of(rows.T.cov()), rtol=1e-10, atol=1e-12)
        sums, counts = torch.where(mask[..., None], x, 0.0).sum(1).T, mask.sum(1).double()
        assert_close(got.mean_stderr, ratio_stderr(sums, counts), rtol=1e-9, atol=1e-12)


def test_moments_far_from_zero_do_not_cancel():
    net = fs.functional(problem("gpt2").model)
    moved = {**net.params, "transformer.wpe.weight": net.params["transformer.wpe.weight"] + 1e7}
    batch = tokens(7, 4, 9, pad=0)
    seen = fs.streamed(net, moved, cut(batch, [1, 3]), ["resid_pre.0"]).moments["resid_pre.0"]
    x = fs.trace(net, moved, batch, ["resid_pre.0"])["resid_pre.0"].detach().flatten(0, 1)
    assert_close(seen.covariance, x.T.cov(), rtol=1e-8, atol=1e-8)
    raw = x.T @ x / len(x) - torch.outer(x.mean(0), x.mean(0))  # negative control: a difference of raw moments
    assert (raw - seen.scatter / len(x)).abs().max() > 1e-3


def test_the_sample_is_the_same_in_one_batch_or_many_and_says_where_it_is_from():
    net = fs.functional(problem("gpt2").model)
    batch = tokens(7, 6, 9, pad=4)
    asked = {"key": fs.key(3), "size": 7}
    whole = fs.streamed(net, net.params, [batch], SITES, **asked).sample
    x, mask = values(net, batch, "resid_post.1")
    assert whole.num == int(mask.sum())
    assert_close(whole.rows["resid_post.1"], x[whole.sequence, whole.position], rtol=0, atol=0)
    for sizes in ([1, 1, 1, 1, 1, 1], [4, 2], [1, 5]):
        part = fs.streamed(net, net.params, cut(batch, sizes), SITES, **asked).sample
        assert part.sequence.equal(whole.sequence)
        assert part.position.equal(whole.position)
        assert part.priority.equal(whole.priority)
        assert_close(part.rows["mlp_out.1"], whole.rows["mlp_out.1"], rtol=1e-12, atol=1e-12)
    other = fs.streamed(net, net.params, [batch], SITES, key=fs.key(4), size=7).sample
    assert not other.priority.equal(whole.priority)


def test_padding_on_the_left_is_no_part_of_a_place():
    net = fs.functional(problem("llama").model)
    right = tokens(7, 3, 9, pad=4)
    counts = right["attention_mask"].sum(1)
    left = {
        name: torch.stack([row.roll(9 - int(n)) for row, n in zip(x, counts, strict=True)]) for name, x in right.items()
    }
    one, other = (
        fs.streamed(net, net.params, [b], ["resid_post.1"], key=fs.key(0), size=5).sample for b in (right, left)
    )
    assert one.position.equal(other.position)
    assert_close(one.rows["resid_post.1"], other.rows["resid_post.1"], rtol=1e-8, atol=1e-8)


def test_rows_of_a_reservoir_are_bit_equal_however_they_come():
    x = torch.arange(300.0).view(100, 3)
    sequence, position = torch.arange(100) // 10, torch.arange(100) % 10
    whole = fs.reservoir(fs.key(0), 20).update({"x": x}, sequence, position)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    parts = [fs.reservoir(fs.key(0), 20).update({"x": x[i]}, sequence[i], position[i]) for i in order.split(7)]
    merged = fs.reservoir(fs.key(0), 20)
    for part in parts:
        merged = merged.merge(part)
    assert merged.num == whole.num == 100
    for name in ("sequence", "position", "priority"):
        assert getattr(merged, name).equal(getattr(whole, name))
    assert merged.rows["x"].equal(whole.rows["x"])
    assert len(fs.reservoir(fs.key(0), 200).update({"x": x}, sequence, position).priority) == 100


def test_every_row_is_as_likely_to_be_in_the_sample():
    """400 keys, 5 of 20 rows: counts are binomial; pairs of neighbours are together as often as by chance."""
    at, counts, pairs = torch.arange(20), torch.zeros(20), 0
    for seed in range(400):
        there = fs.reservoir(fs.key(seed), 5).update({"x": at[:, None].double()}, at // 10, at % 10)
        kept = torch.zeros(20).index_fill(0, there.rows["x"][:, 0].long(), 1.0)
        counts, pairs = counts + kept, pairs + float((kept[1:] * kept[:-1]).sum())
    z = (counts - 100) / (400 * 0.25 * 0.75) ** 0.5
    assert float(z.square().sum()) < 43.8  # chi-square of 19 degrees of freedom at .001
    assert abs(pairs - 400 * 19 * (5 * 4) / (20 * 19)) < 4 * (400 * 19 / 19) ** 0.5


def test_the_doors():
    net = fs.functional(problem("gpt2").model)
    batch = tokens(7, 2, 5, pad=0)
    with pytest.raises(ValueError, match="`key` and `size` go together"):
        fs.streamed(net, net.params, [batch], SITES, size=3)
    with pytest.raises(ValueError, match=r"`pattern.0` has the shape .* per batch, position and unit"):
        fs.streamed(net, net.params, [batch], ["pattern"])
    nothing = {"input_ids": batch["input_ids"], "attention_mask": torch.zeros(2, 5).long()}
    for none in ([], [nothing]):
        with pytest.raises(ValueError, match="`batches` hold no token"):
            fs.streamed(net, net.params, none, SITES)
    one = fs.reservoir(fs.key(0), 3)
    with pytest.raises(ValueError, match="different keys or sizes"):
        one.merge(fs.reservoir(fs.key(1), 3))
    x, at = torch.zeros(2, 1), torch.arange(2)
    with pytest.raises(ValueError, match="`rows` must be of x, got y"):
        one.update({"x": x}, at, at).update({"y": x}, at, at)
    with pytest.raises(ValueError, match="`rows` of x are 2, and `sequence` names 1"):
        one.update({"x": x}, at[:1], at[:1])
    with pytest.raises(ValueError, match="`size` must be an integer of at least 1"):
        fs.reservoir(fs.key(0), 0)


MANY = textwrap.dedent("""
    import sys
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    import funcscope as fs

    def high_water():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

    torch.set_num_threads(1)
    config = GPT2Config(n_layer=2, n_embd=128, n_head=2, vocab_size=99, n_positions=256, bos_token_id=0, eos_token_id=0)
    net = fs.functional(GPT2LMHeadModel(config))
    batches = lambda num: ({"input_ids": torch.full((16, 256), i % 99)} for i in range(num))
    ask = dict(sites=["resid_post", "mlp_post"], key=fs.key(0), size=100)
    held = [] if sys.argv[2] == "streamed" else [fs.trace(net, net.params, next(batches(1)), ["resid_post", "mlp_post"])]
    fs.streamed(net, net.params, batches(2), **ask)
    before = high_water()
    for i, batch in enumerate(batches(int(sys.argv[1]))):
        if held:
            held.append(fs.trace(net, {n: p.detach() for n, p in net.params.items()}, batch, ["resid_post", "mlp_post"]))
    if not held:
        fs.streamed(net, net.params, batches(int(sys.argv[1])), **ask)
    print(high_water() - before)
""")


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_batches():
    """A batch of these sites is 20 MiB."""

    def growth(num, way):
        call = [sys.executable, "-c", MANY, str(num), way]
        return float(subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()[-1])

    assert growth(30, "streamed") - growth(6, "streamed") < 60
    assert growth(30, "kept") - growth(6, "kept") > 400  # negative control


def test_readings_are_what_streaming_gives_whatever_the_batches_are():
    net = fs.functional(model_of("gpt2", torch.float64))
    batch = tokens(7, 6, 9, pad=4)
    whole = fs.objective(net, [batch], fs.causal_lm)
    sites, key = ("resid_post", "mlp_post.1"), fs.key(2)
    oracle = fs.streamed(net, net.params, [inputs for inputs, _ in whole.batches], sites, key=key, size=11)
    for loss in (whole, whole.split(2), whole.split(1)):
        made = fs.read(loss, net.params, {
            "sample": sampled(sites, lambda kept: kept, key=key, size=11), "sums": summed(sites, lambda kept: kept),
            "scored": sampled(sites, lambda kept: kept, key=key, size=1000, scored=True),
            "other": summed(("tok_embed",), lambda kept: kept, diagonal=True),
        })  # fmt: skip
        for name, moments in oracle.moments.items():
            own = made["sums"][name]
            torch.testing.assert_close(
                (own.mean, own.scatter, own.mean_stderr), (moments.mean, moments.scatter, moments.mean_stderr)
            )
            assert (own.num, own.num_sequences) == (moments.num, moments.num_sequences)
            torch.testing.assert_close(made["sample"].rows[name], oracle.sample.rows[name], rtol=1e-12, atol=1e-12)
        assert set(made["sums"]) == set(oracle.moments)
        assert set(made["other"]) == {"tok_embed"}
        targets = made["scored"].rows["target"]
        assert len(targets) == int(sum((each.weight != 0).sum() for _, each in loss.batches))
        order = made["scored"].sequence * 100 + made["scored"].position
        real = whole.batches[0][1]
        assert sorted(zip(order.tolist(), targets.tolist(), strict=True)) == [
            (row * 100 + int(whole_mask[row, : at + 1].sum()) - 1, int(real.index[row, at]))
            for whole_mask in [batch["attention_mask"]]
            for row, at in (real.weight != 0).nonzero().tolist()
        ]


@pytest.mark.parametrize("value", [0.1, 2.7, 1 / 3])
def test_rows_that_do_not_vary_have_no_scatter_of_their_rounding(value):
    parts = [
        _of_batch(torch.full((2, num, 3), value, dtype=torch.float64), torch.ones(2, num, dtype=torch.bool), False)
        for num in (7, 11)
    ]
    for each in (*parts, _merged(*parts)):
        assert not each.scatter.any()
        assert not each.mean_stderr.any()
    assert moments_spectra({"still": _merged(*parts)}).participation_ratio.isnan().all()
