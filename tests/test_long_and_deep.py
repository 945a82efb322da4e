"""Attention by blocks and layers in remat: the same function as the model's own, at less memory. Oracle: eager, whole."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from problems import seeded, tokens
from test_architectures import FAMILIES, LINES, criterion_of, inputs_of, labelled, model_of, tolerance
from torch import nn
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

import funcscope as fs
from funcscope.core import attention_blocks
from funcscope.core.brief_masks import brief, is_brief, spelt_out
from funcscope.core.held import saved_bytes
from funcscope.core.masks import tokens_there, with_float_mask

OWN = ("falcon, alibi", "mamba", "mamba2")
"""A mask of all pairs for every head, or no attention."""
QUICK = ("gemma2",)
LIGHT = [line if line in QUICK else pytest.param(line, marks=pytest.mark.slow) for line in LINES]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_blocks, "ROWS", 4)


def gap(ours, theirs) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# Masks


@pytest.mark.parametrize("line", [line for line in LINES if line not in (*OWN, "bloom", "mpt")])
def test_a_mask_in_brief_says_what_the_whole_one_says(line):
    model = fs.functional(model_of(line, torch.float32))._skeleton
    name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    for batch in inputs_of(line).values():
        whole = with_float_mask(model, batch)[name]
        made = with_float_mask(model, batch, brief_above=0)
        short, again = made[name], with_float_mask(model, made)[name]
        assert with_float_mask(model, made, brief_above=0)[name] is short
        there = tokens_there(short)
        assert torch.equal(there, batch.get(name, torch.ones_like(batch["input_ids"])).bool())
        for kind in whole if isinstance(whole, dict) else [None]:
            one, other, read = (x if kind is None else x[kind] for x in (whole, again, short))
            assert is_brief(read)
            assert torch.equal(one.expand(other.shape), other)


def test_a_part_of_a_mask_in_brief_is_that_part_of_the_whole():
    visible = torch.tensor([[0, 1, 1, 1, 0, 1, 1]]).bool()[:, None, None]
    first, last = torch.tensor([0, 0, 1, 1, 2, 3, 4]).int(), torch.arange(1, 8).int()
    mask = brief(visible, first, last)
    whole = spelt_out(mask)
    by_hand = [[first[q] <= k < last[q] and bool(visible[0, 0, 0, k]) for k in range(7)] for q in range(7)]
    assert whole[0, 0].tolist() == by_hand
    assert torch.equal(spelt_out(mask, slice(2, 5), slice(1, 5)), whole[..., 2:5, 1:5])
    assert spelt_out(brief(visible, None, None))[0, 0].tolist() == visible[0, 0].expand(7, 7).tolist()


# Attention by blocks


@pytest.mark.parametrize("line", LIGHT)
def test_blocks_are_the_attention_of_the_model(line, monkeypatch):
    monkeypatch.setattr(attention_blocks, "LONG", 3)  # for a model that makes its mask itself
    model = model_of(line, torch.float64)
    if line in OWN:
        with pytest.raises(ValueError, match='pass `attention="eager"` instead of "blocks"'):
            fs.functional(model, attention="blocks")
        assert fs.functional(model).attention == "eager"
        return
    ours, theirs = (fs.functional(model, attention=kind) for kind in ("blocks", "eager"))
    for kind, batch in inputs_of(line).items():
        if line in ("bloom", "mpt") and kind == "left":
            for net in (ours, theirs):
                with pytest.raises(ValueError, match="float64 gives nan for texts that are padded on the left"):
                    net.apply(net.params, batch)
            continue
        read = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        out, oracle = (net.apply(net.params, batch)[read] for net in (ours, theirs))
        assert_close(out, oracle, rtol=0, atol=tolerance(line), msg=lambda text, kind=kind: f"{kind}: {text}")
    batches = [labelled(line, tokens(1, 3, 9, pad=3)), labelled(line, tokens(2, 2, 5))]
    loss, oracle = (fs.objective(net, batches, criterion_of(line)) for net in (ours, theirs))
    theta = theirs.theta
    v = fs.normal(fs.key(1), theta)
    expected, within = fs.hessian(oracle, theta)(v), tolerance(line)
    for product in (fs.hessian(loss, theta)(v), jvp(grad(loss), (theta,), (v,))[1]):
        assert gap(product, expected) < within
    assert gap(fs.ggn(loss, theta)(v), fs.ggn(oracle, theta)(v)) < within


def test_a_mask_of_keys_alone_serves_whole_scores_too():
    model, batch = model_of("mpt", torch.float32), tokens(7, 3, 9, pad=4)
    ours, theirs = (fs.functional(model, attention=kind) for kind in ("blocks", "eager"))
    made = ours.prepare(batch)
    assert made["attention_mask"].shape == (3, 1, 1, 9)
    assert torch.equal(theirs.prepare(made)["attention_mask"], theirs.prepare(batch)["attention_mask"])
    assert torch.equal(theirs.apply(theirs.params, made), theirs.apply(theirs.params, batch))


def mapped(line, attention, remat="none"):
    net = fs.functional(model_of(line, torch.float64), attention=attention, remat=remat)
    return fs.objective(net, [labelled(line, tokens(1, 3, 9, pad=3))], criterion_of(line))


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "remat"), [("blocks", "none"), ("eager", "layer"), ("blocks", "layer")])
@pytest.mark.parametrize("line", ["falcon", "gpt2", "gpt_neo", "gpt_oss", "llama", "mpt", "t5"])
def test_every_transform_gives_what_the_whole_graph_gives(line, attention, remat):
    loss, oracle = mapped(line, attention, remat), mapped(line, "eager")
    theta = loss.net.theta
    v, w = (fs.normal(fs.key(i), theta) for i in (1, 2))
    transforms = {
        "jvp of jvp": lambda f: jvp(lambda t: jvp(f, (t,), (v,))[1], (theta,), (w,))[1],
        "grad of jvp": lambda f: grad(lambda t: jvp(f, (t,), (v,))[1])(theta),
        "vmap": lambda f: vmap(f)(torch.stack([theta, theta + 0.1 * v])),
        "vmap of grad": lambda f: vmap(grad(f))(torch.stack([theta, theta + 0.1 * v])),
        "vmap of jvp": lambda f: vmap(lambda u: jvp(f, (theta,), (u,))[1])(torch.stack([v, w])),
        "third": lambda f: jvp(lambda t: jvp(grad(f), (t,), (v,))[1], (theta,), (w,))[1],
        "leaf by leaf": lambda f: fs.restrict(f, f.net.params, fs.directions(f.net, key=fs.key(3), num=1), lazy=True)(
            torch.tensor([0.1])
        ),
        "gram": lambda f: fs.gram(f, theta).values,
    }
    for name, transform in transforms.items():
        assert gap(transform(loss), transform(oracle)) < 100 * tolerance(line), name


def test_auto_is_eager_up_to_a_length_and_blocks_beyond(monkeypatch):
    model, batch = model_of("gpt2", torch.float32), {"input_ids": tokens(7, 2, 9)["input_ids"]}
    auto, eager = fs.functional(model), fs.functional(model, attention="eager")
    assert auto.attention == "auto"
    assert torch.equal(auto.apply(auto.params, batch), eager.apply(eager.params, batch))
    monkeypatch.setattr("funcscope.core.model.LONG", 8)
    assert is_brief(auto.prepare(batch)["attention_mask"])
    assert not is_brief(auto.prepare({"input_ids": batch["input_ids"][:, :8]})["attention_mask"])
    assert_close(auto.apply(auto.params, batch), eager.apply(eager.params, batch))
    assert fs.functional(seeded(0, lambda: nn.Linear(2, 2))).attention == "eager"


@pytest.mark.parametrize("line", ["gpt2", "llama", "mistral", "bert"])
def test_token_ids_alone_are_masked_by_the_model_itself(line, monkeypatch):
    """transformers makes no mask for a kernel that it has none for."""
    model, ids = model_of(line, torch.float64), tokens(7, 2, 9)["input_ids"]
    theirs = model(input_ids=ids).logits
    for long in (1024, 4):
        monkeypatch.setattr(attention_blocks, "LONG", long)
        for kind in ("auto", "blocks"):
            net = fs.functional(model, attention=kind)
            assert_close(net.apply(net.params, ids), theirs, rtol=0, atol=tolerance(line))


def test_a_causal_model_without_a_mask_is_refused(monkeypatch):
    monkeypatch.setattr(attention_blocks, "_eager_of", lambda _: None)
    module = seeded(0, lambda: nn.Linear(2, 2))
    module.is_causal = True
    with pytest.raises(ValueError, match="was called without a mask, and would see what follows"):
        attention_blocks._by_blocks(module, *(torch.ones(1, 1, 3, 2),) * 3, None)


def test_a_whole_mask_that_is_given_is_taken_in_parts(monkeypatch):
    """Long ones; none of it is assumed to be causal."""
    monkeypatch.setattr(attention_blocks, "LONG", 8)
    model, ids = model_of("llama", torch.float64), tokens(7, 2, 9)["input_ids"]
    nets = [fs.functional(model, attention=kind) for kind in ("blocks", "eager")]
    everywhere = seeded(3, lambda: torch.rand(2, 1, 9, 9).double() < 0.7) | torch.eye(9).bool()
    mask = torch.where(everywhere, 0.0, torch.finfo(torch.float32).min).double()
    out, oracle = (net.apply(net.params, {"input_ids": ids, "attention_mask": mask}) for net in nets)
    assert_close(out, oracle, rtol=0, atol=1e-6)


def test_a_trace_sees_whole_scores_whatever_the_kernel_is():
    model, batch = model_of("qwen3", torch.float64), tokens(7, 3, 9, pad=4)
    seen = []
    for options in ({"attention": "blocks"}, {"attention": "blocks", "remat": "layer"}, {"attention": "eager"}):
        loss = fs.objective(fs.functional(model, **options), [labelled("qwen3", batch)], fs.causal_lm)
        inputs = loss.batches[0][0]
        seen.append(fs.trace(loss.net, loss.net.params, inputs, ["pattern.0", "resid_post.1"]))
    assert sorted(seen[0].values) == ["pattern.0", "resid_post.1"]
    for name in seen[0].values:
        assert torch.equal(seen[0][name], seen[2][name])
        assert torch.equal(seen[1][name], seen[2][name])


# Layers in remat


@pytest.mark.parametrize("line", LIGHT)
def test_layers_in_remat_change_no_number(line):
    model = model_of(line, torch.float64)
    if line == "albert":  # one layer many times over
        with pytest.raises(
            ValueError, match=r"the layers of AlbertForMaskedLM are not known.*remat=\[.*albert_layer_groups"
        ):
            fs.functional(model, remat="layer")
        return
    net, whole = fs.functional(model, remat="layer"), fs.functional(model)
    assert len(net.remat) == (4 if FAMILIES[line.split(",")[0]].attention == "both" else 2)
    assert net.whole.remat == ()
    batches = [labelled(line, tokens(1, 3, 9, pad=3)), labelled(line, tokens(2, 2, 5))]
    loss, oracle = (fs.objective(each, batches, criterion_of(line)) for each in (net, whole))
    theta = whole.theta
    v = fs.normal(fs.key(1), theta)
    assert torch.equal(loss(theta), oracle(theta))
    assert gap(fs.hessian(loss, theta)(v), fs.hessian(oracle, theta)(v)) < tolerance(line)
    assert gap(fs.ggn(loss, theta)(v), fs.ggn(oracle, theta)(v)) < tolerance(line)


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x) + torch.rand(())


def test_names_of_modules_and_what_is_refused():
    model = seeded(0, lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))).double()
    x, y = seeded(1, lambda: torch.randn(5, 3)).double(), torch.tensor([0, 1, 0, 1, 1])
    loss, oracle = (
        fs.objective(fs.functional(model, remat=names), [(x, y)], fs.classification) for names in (["0", "1"], "none")
    )
    v = fs.normal(fs.key(1), loss.net.theta)
    assert_close(fs.hessian(loss, loss.net.theta)(v), fs.hessian(oracle, loss.net.theta)(v))
    for given, words in (
        ("layer", "the layers of Sequential are not known"),
        ("all", '"none", "layer" or names'),
        (["nothing"], "modules that the model does not have"),
    ):
        with pytest.raises(ValueError, match=words):
            fs.functional(model, remat=given)
    with pytest.raises(ValueError, match="name one of them"):
        fs.functional(seeded(0, lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 2)))), remat=["0", "0.0"])
    net = fs.functional(seeded(0, lambda: nn.Sequential(Draws())), remat=["0"])
    with pytest.raises(ValueError, match="draws random numbers"):
        seeded(1, lambda: net.apply(net.params, torch.ones(2, 3)))


class Listed(nn.Module):
    """Layers in a list, in a list of lists, and in a dictionary; a list of parameters."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 4)) for _ in range(3))
        self.groups = nn.ModuleList([nn.ModuleList([self.layers[0]]), nn.ModuleDict({"last": nn.Linear(4, 3)})])
        self.shifts = nn.ParameterList([torch.zeros(4)])

    def forward(self, x):
        x = self.inner(x) + self.shifts[0]
        for layer in self.layers:
            x = layer(x)
        return self.groups[1]["last"](self.groups[0][0](x))


def test_a_list_of_modules_stands_for_its_members():
    model = seeded(0, Listed)
    batches = [(torch.ones(64, 2), torch.zeros(64, dtype=torch.int64))]

    def kept(names):
        loss = fs.objective(fs.functional(model, remat=names), batches, fs.classification)
        return saved_bytes(lambda: loss(loss.net.theta.clone().requires_grad_()))

    assert fs.functional(model, remat=["layers"]).remat == ("layers.0", "layers.1", "layers.2")
    assert fs.functional(model, remat=["groups"]).remat == ("groups.0.0", "groups.1.last")
    assert len(fs.functional(model, remat=["groups", "layers"]).remat) == 4  # a layer of both is computed again once
    assert kept(["layers"]) == kept([f"layers.{i}" for i in range(3)]) < kept("none") / 3
    with pytest.raises(ValueError, match=r"names `shifts`, a ParameterList that is never called.*such as \['layers'\]"):
        fs.functional(model, remat=["shifts"])
    with pytest.raises(ValueError, match=r"layers of Listed are not known.*remat=\['layers'\]"):
        fs.functional(model, remat="layer")


def test_hooks_of_a_layer_run_once_around_it():
    model, calls = seeded(0, lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    net = fs.functional(model, remat=["0"])
    net.apply(net.params, torch.ones(2, 3))
    assert calls == [1]


MEMORY = """
import sys, torch, transformers, funcscope as fs
from funcscope.core.memory import peak_growth
torch.manual_seed(0)
length, layers, attention, remat = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
config = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
                                  intermediate_size=128, vocab_size=64, max_position_embeddings=length)
net = fs.functional(transformers.LlamaForCausalLM(config), attention=attention, remat=remat)
ids = torch.randint(0, 64, (1, length))
loss = fs.objective(net, [{"input_ids": ids, "labels": ids}], fs.causal_lm)
theta = net.theta
loss(theta)
print(peak_growth(lambda: fs.hessian(loss, theta)(torch.ones_like(theta)))[1])
"""


def peak(*args) -> float:
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, args)], capture_output=True, text=True, check=True, timeout=300
    )
    return float(run.stdout)


@pytest.mark.slow
def test_memory_grows_with_the_length_in_blocks_and_with_its_square_otherwise():
    blocks = [peak(length, 2, "auto", "none") for length in (2048, 4096)]
    eager = [peak(length, 2, "eager", "none") for length in (1024, 2048)]
    assert blocks[1] < 2.3 * blocks[0]
    assert eager[1] > 3 * eager[0]
    assert blocks[0] < eager[1] / 4


@pytest.mark.slow
def test_a_further_layer_in_remat_costs_a_fraction_of_what_it_costs_whole():
    whole, apart = ([peak(1024, layers, "blocks", kind) for layers in (4, 12)] for kind in ("none", "layer"))
    assert apart[1] - apart[0] < 0.2 * (whole[1] - whole[0])
