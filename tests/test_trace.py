"""Sites of a forward pass: what the untouched model computes there, and passes in which some are replaced."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from problems import VOCAB, seeded, tokens
from test_architectures import inputs_of, model_of
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.anatomy import ANATOMIES
from funcscope.core.trace import MADE, Patch, apply_with, pattern_blocks, sites_of, trace

FAMILIES = [name if name in ("gpt2", "llama") else pytest.param(name, marks=pytest.mark.slow) for name in ANATOMIES]


def netted(name: str, dtype: torch.dtype = torch.float32, **options) -> fs.Functional:
    return fs.functional(model_of(name, dtype), **options)


@pytest.mark.parametrize("kind", ["right", "left", "no mask"])
@pytest.mark.parametrize("name", FAMILIES)
def test_sites_are_what_the_untouched_model_computes(name, kind):
    model, batch, net = model_of(name, torch.float32), inputs_of(name)[kind], netted(name)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    with torch.no_grad():
        theirs = model(**batch, output_hidden_states=True, output_attentions=True, **cacheless(model))
        out, seen = apply_with(net, net.params, batch, {}, sites_of(net))
        assert_close(out, net.apply(net.params, batch), rtol=1e-6, atol=1e-6)
    assert torch.equal(seen.mask, mask)
    assert sorted(seen.values) == sorted(sites_of(net))
    num = seen.num_layers
    last = seen["final"] if "final" in seen.values else seen[f"resid_post.{num - 1}"]
    pairs = [(seen["logits"], theirs.logits), (last, theirs.hidden_states[num])]
    for i in range(num):
        pairs += [(seen[f"resid_pre.{i}"], theirs.hidden_states[i])]
        pairs += [(seen[f"pattern.{i}"].transpose(1, 2), theirs.attentions[i].transpose(1, 2))]
    for ours, other in pairs:
        assert_close(ours[mask], other[mask], rtol=1e-5, atol=1e-5)


def cacheless(model) -> dict:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_site_follows_from_those_before_it(name):
    """Scores from queries and keys, heads from patterns and values, the stream from what is written into it."""
    net, batch = netted(name, torch.float64), inputs_of(name)["right"]
    out, seen = apply_with(net, net.params, batch, {}, sites_of(net))
    assert torch.equal(out, net.apply(net.params, batch))
    config = net.config
    for i in range(seen.num_layers):
        rot = "rot_" if f"rot_q.{i}" in seen.values else ""
        q, k, v = (seen[f"{site}.{i}"].transpose(1, 2) for site in (f"{rot}q", f"{rot}k", "v"))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * seen.kernels[i].scaling
        if cap := getattr(config, "attn_logit_softcapping", None):
            scores = cap * torch.tanh(scores / cap)
        assert_close(seen[f"scores.{i}"], scores + seen.kernels[i].mask)
        assert_close(seen[f"pattern.{i}"], (scores + seen.kernels[i].mask).softmax(-1), rtol=1e-6, atol=1e-7)
        assert_close(seen[f"z.{i}"], (seen[f"pattern.{i}"] @ v).transpose(1, 2))
        blocks = torch.cat(
            [x for _, x in pattern_blocks(q.transpose(1, 2), k.transpose(1, 2), seen.kernels[i], size=4)], 2
        )
        assert_close(blocks, seen[f"pattern.{i}"], rtol=1e-6, atol=1e-7)
        written = seen[f"result.{i}"].sum(2)
        bias = seen[f"attn_out.{i}"] - written  # of the output matrix: the same everywhere
        if name != "gemma2":  # whose norm behind attention is no sum over heads
            assert_close(bias, bias[:1, :1].expand_as(bias), rtol=1e-6, atol=1e-6)
        if name == "gpt_neox":
            whole = seen[f"resid_pre.{i}"] + seen[f"attn_out.{i}"] + seen[f"mlp_out.{i}"]
            assert_close(seen[f"resid_post.{i}"], whole)
        elif name != "bert":
            assert_close(seen[f"resid_mid.{i}"], seen[f"resid_pre.{i}"] + seen[f"attn_out.{i}"])
            assert_close(seen[f"resid_post.{i}"], seen[f"resid_mid.{i}"] + seen[f"mlp_out.{i}"])
    if "final_scale" in seen.values:
        x = seen[f"resid_post.{seen.num_layers - 1}"]
        x = x - x.mean(-1, keepdim=True) if name in ("gpt2", "gpt_neox") else x
        eps = getattr(
            config, "layer_norm_epsilon", getattr(config, "layer_norm_eps", getattr(config, "rms_norm_eps", 0))
        )
        assert_close(seen["final_scale"], (x.square().mean(-1) + eps).sqrt())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_site_replaced_by_its_own_value_changes_no_bit(name):
    net, batch = netted(name), inputs_of(name)["left"]
    with torch.no_grad():
        out, seen = apply_with(net, net.params, batch, {}, sites_of(net))
        for site, value in seen.values.items():
            if site.partition(".")[0] not in MADE:
                for same in (value.clone(), lambda x: x.clone(), Patch(value.clone(), rows=[0])):
                    assert torch.equal(apply_with(net, net.params, batch, {site: same})[0], out), site


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_behind_a_site_sees_its_new_value(name):
    net, batch = netted(name), inputs_of(name)["no mask"]
    with torch.no_grad():
        seen = trace(net, net.params, batch, sites_of(net))
        for site, value in seen.values.items():
            if site.partition(".")[0] in MADE or site == "pos_embed":
                continue
            new = {"pattern": value.flip(-1), "scores": value.roll(1, 1)}.get(site.partition(".")[0], value + 1)
            out, after = apply_with(net, net.params, batch, {site: new}, [site])
            assert_close(after[site], new)
            assert not torch.equal(out, seen["logits"]), site
        _, after = apply_with(net, net.params, batch, {"resid_post.0": seen["resid_post.0"] + 1}, ["resid_pre.1"])
        assert torch.equal(after["resid_pre.1"], seen["resid_post.0"] + 1)
        if "resid_mid.0" in seen.values and name != "bert":
            _, after = apply_with(
                net, net.params, batch, {"resid_mid.0": lambda x: 2 * x}, ["mlp_out.0", "resid_post.0"]
            )
            assert_close(after["resid_post.0"], 2 * seen["resid_mid.0"] + after["mlp_out.0"], rtol=1e-4, atol=1e-4)


def test_a_head_that_is_zeroed_is_one_whose_output_matrix_is_zero():
    """In the model itself, for a Conv1D, grouped heads and a matrix of all heads."""
    for name, weight, dim in (
        ("gpt2", "transformer.h.1.attn.c_proj.weight", 0), ("llama", "model.layers.1.self_attn.o_proj.weight", 1),
        ("gpt_neox", "gpt_neox.layers.1.attention.dense.weight", 1),
    ):  # fmt: skip
        net, batch = netted(name, torch.float64), inputs_of(name)["right"]
        gone = net.params[weight].clone()
        gone.narrow(dim, 8, 8).zero_()
        out, seen = apply_with(net, net.params, batch, {"z.1": Patch(torch.zeros(()), heads=1)}, ["attn_out.1"])
        assert_close(out, net.apply({**net.params, weight: gone}, batch), rtol=1e-5, atol=1e-5)
        before = trace(net, net.params, batch, ["attn_out.1", "result.1"])
        assert_close(seen["attn_out.1"], before["attn_out.1"] - before["result.1"][:, :, 1], rtol=1e-5, atol=1e-6)


def test_a_patch_is_of_chosen_rows_positions_heads_and_units():
    net, batch = netted("llama"), inputs_of("llama")["no mask"]
    z = trace(net, net.params, batch, ["z.0"])["z.0"]
    patch = Patch(torch.tensor(7.0), rows=[0, 2], positions=-1, heads=1, units=[0, 3])
    after = apply_with(net, net.params, batch, {"z.0": patch}, ["z.0"])[1]["z.0"]
    expected = z.clone()
    for row in (0, 2):
        for unit in (0, 3):
            expected[row, -1, 1, unit] = 7
    assert torch.equal(after, expected)
    one = Patch(lambda x: -x, positions=[1])
    after = apply_with(net, net.params, batch, {"resid_post.0": one}, ["resid_post.0"])[1]["resid_post.0"]
    before = trace(net, net.params, batch, ["resid_post.0"])["resid_post.0"]
    assert torch.equal(after[:, 1], -before[:, 1])
    assert torch.equal(after[:, 2:], before[:, 2:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("site", ["z.0", "pattern.0", "resid_mid.1", "q.0", "mlp_post.1", "tok_embed"])
def test_edits_have_the_derivatives_of_their_values(name, site):
    net, batch = netted(name, torch.float64), inputs_of(name)["right"]
    value = trace(net, net.params, batch, [site])[site].detach()
    step = seeded(3, lambda: torch.randn(value.shape, dtype=torch.float64))

    def total(x):
        return apply_with(net, net.params, batch, {site: x})[0][batch["attention_mask"].bool()].square().sum()

    slope = jvp(total, (value,), (step,))[1]
    h, rough = (1e-5, 1e-6) if name == "gpt2" else (1e-3, 2e-3)  # whose norms are taken in float32
    assert_close(slope, (total(value + h * step) - total(value - h * step)) / (2 * h), rtol=rough, atol=rough)
    assert_close((grad(total)(value) * step).sum(), slope, rtol=1e-6, atol=1e-6)
    several = torch.stack([value, value + step])
    assert_close(vmap(total)(several), torch.stack([total(x) for x in several]))
    if name == "gpt2":
        hvp = jvp(grad(total), (value,), (step,))[1]
        curved = (total(value + 1e-3 * step) - 2 * total(value) + total(value - 1e-3 * step)) / 1e-6
        assert_close((hvp * step).sum(), curved, rtol=1e-3, atol=1e-3)


def test_sites_have_the_derivatives_in_parameters():
    net, batch = netted("gpt2", torch.float64), inputs_of("gpt2")["right"]
    theta = net.theta
    step = seeded(4, lambda: torch.randn(theta.shape, dtype=torch.float64)) * 0.1

    def pattern(t):
        return trace(net, net.layout.unravel(t), batch, ["pattern.1"])["pattern.1"]

    moved = jvp(pattern, (theta,), (step,))[1]
    assert_close(moved, (pattern(theta + 1e-5 * step) - pattern(theta - 1e-5 * step)) / 2e-5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("attention", ["math", "keep"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_patterns_of_fused_attention_come_from_queries_and_keys(name, attention):
    net, eager, batch = netted(name, attention=attention), netted(name), inputs_of(name)["left"]
    rot = "rot_" if name == "llama" else ""
    with torch.no_grad():
        out, seen = apply_with(net, net.params, batch, {}, [f"{rot}q.1", f"{rot}k.1", "z.1"])
        other = trace(eager, eager.params, batch, ["pattern.1", "logits", "z.1"])
    real = seen.mask
    assert_close(out[real], other["logits"][real], rtol=1e-4, atol=1e-5)
    pattern = torch.cat(
        [x for _, x in pattern_blocks(seen[f"{rot}q.1"], seen[f"{rot}k.1"], seen.kernels[1], size=5)], 2
    )
    assert_close(pattern.transpose(1, 2)[real], other["pattern.1"].transpose(1, 2)[real], rtol=1e-4, atol=1e-6)
    asked = trace(net, net.params, batch, ["pattern.1"])["pattern.1"].detach()
    assert_close(asked.transpose(1, 2)[real], other["pattern.1"].transpose(1, 2)[real], rtol=1e-4, atol=1e-6)


def test_layers_are_stacked_and_axes_are_named():
    net, batch = netted("gpt2"), inputs_of("gpt2")["no mask"]
    seen = trace(net, net.params, batch, ["pattern", "resid_post.1", "logits"])
    assert sorted(seen.values) == ["logits", "pattern.0", "pattern.1", "resid_post.1"]
    assert seen["pattern"].shape == (2, 3, 2, 9, 9)
    assert seen.axes("pattern") == ("layer", "batch", "head", "query", "key")
    assert seen.axes("logits") == ("batch", "position", "unit")
    with pytest.raises(KeyError, match=r"was not asked for: there are pattern\.0"):
        seen["resid_post"]


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_model_and_the_net_stay_as_they_are_in_several_threads():
    model = model_of("gpt2", torch.float32)
    before, hooks = [p.clone() for p in model.parameters()], hooks_of(model)
    net, batch = netted("gpt2"), inputs_of("gpt2")["no mask"]
    plain = net.apply(net.params, batch)

    def work(i):
        edited, seen = apply_with(net, net.params, batch, {"z.0": Patch(torch.tensor(float(i)), heads=0)}, ["z.0"])
        return edited.detach(), float(seen["z.0"][0, 0, 0, 0])

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(work, range(8)))
    assert [value for _, value in made] == list(range(8))
    assert all(torch.equal(a, work(i)[0]) for i, (a, _) in enumerate(made))
    assert torch.equal(net.apply(net.params, batch), plain)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert hooks_of(model) == hooks


def test_a_family_that_is_not_described_shows_its_modules():
    net, batch = netted("opt"), inputs_of("opt")["no mask"]
    name = "model.decoder.layers.0.fc1"
    assert f"module:{name}" in sites_of(net)
    out, seen = apply_with(
        net, net.params, batch, {f"module:{name}": Patch(torch.zeros(()), rows=None)}, [f"module:{name}"]
    )
    assert float(seen[f"module:{name}"].abs().max()) == 0
    gone = {**net.params, f"{name}.weight": torch.zeros_like(net.params[f"{name}.weight"]),
            f"{name}.bias": torch.zeros_like(net.params[f"{name}.bias"])}  # fmt: skip
    assert_close(out, net.apply(gone, batch))
    with pytest.raises(ValueError, match=r"not described.*`module:NAME`"):
        trace(net, net.params, batch, ["pattern"])
    plain = fs.functional(seeded(0, lambda: torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())))
    assert sites_of(plain) == ["module:0", "module:1"]
    assert trace(plain, plain.params, torch.ones(4, 3), ["module:0"])["module:0"].shape == (4, 2)


def test_what_is_no_site_or_no_value_of_one_is_refused():
    net, batch = netted("gpt2"), inputs_of("gpt2")["no mask"]
    for sites, text in (
        (["patern"], "did you mean 'pattern"), (["resid_post.7"], "did you mean 'resid_post"), ("pattern", r"\['pattern'\]"),
        (["rot_q"], "there is no site 'rot_q'"), (["module:transformer.h.9"], "no module"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            trace(net, net.params, batch, sites)
    for edits, text in (
        ({"z.0": torch.zeros(3)}, r"must have its shape \(3, 9, 2, 8\), got \(3,\)"),
        ({"result.0": torch.zeros(3)}, "made of other sites"), ({"z": torch.zeros(3)}, "that of one: `z.0`"),
        ({"z.0": Patch(torch.zeros(()), heads=5)}, "there is no head 5: the site has 2"),
        ({"resid_post.0": Patch(torch.zeros(()), heads=0)}, "has no head to choose from"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            apply_with(net, net.params, batch, edits)


def test_one_token_and_padding_only():
    net = netted("gpt2")
    seen = trace(net, net.params, {"input_ids": torch.tensor([[3]])}, ["pattern.0"])
    assert_close(seen["pattern.0"], torch.ones(1, 2, 1, 1))
    batch = tokens(1, 2, 5)
    batch["attention_mask"][1] = 0
    seen = trace(net, net.params, batch, ["pattern.0", "logits"])
    assert seen.mask.sum(1).tolist() == [5, 0]
    assert seen["logits"][0].isfinite().all()
    assert math.prod(seen["logits"].shape) == 2 * 5 * VOCAB


def test_whole_numbers_in_a_mask_say_what_is_seen():
    net, ids = netted("gpt2"), inputs_of("gpt2")["no mask"]["input_ids"]
    causal = torch.ones(3, 1, 9, 9).tril()
    for mask in (causal.bool(), causal.long()):
        seen = trace(net, net.params, {"input_ids": ids, "attention_mask": mask}, ["logits"])
        assert bool(seen.mask.all())
        assert torch.equal(seen["logits"], net.apply(net.params, {"input_ids": ids}))


def test_what_the_pass_does_not_come_by_is_said():
    net, ids = netted("gpt2"), inputs_of("gpt2")["no mask"]["input_ids"]
    embedded = {"inputs_embeds": net.params["transformer.wte.weight"][ids]}
    with pytest.raises(ValueError, match="does not come by `tok_embed`"):
        apply_with(net, net.params, embedded, {"tok_embed": lambda x: 0 * x})
    with pytest.raises(ValueError, match=r"does not come by `module:transformer\.h`"):
        trace(net, net.params, {"input_ids": ids}, ["module:transformer.h"])


def test_token_ids_alone_are_causal():
    net, ids = netted("gpt2"), inputs_of("gpt2")["no mask"]["input_ids"]
    for inputs in (ids, (ids,)):
        assert torch.equal(
            trace(net, net.params, inputs, ["logits"])["logits"], net.apply(net.params, {"input_ids": ids})
        )


def test_places_and_values_of_a_patch_come_in_every_form():
    net, batch = netted("llama"), inputs_of("llama")["no mask"]

    def after(**patch):
        return apply_with(net, net.params, batch, {"z.0": Patch(**patch)}, ["z.0"])[1]["z.0"]

    one = after(value=0.0, heads=1, positions=[0, 1, 2])
    for heads, positions in ((np.int64(1), slice(0, 3)), (torch.tensor([1]), torch.arange(3)), ([1], range(3))):
        assert torch.equal(after(value=torch.zeros(()), heads=heads, positions=positions), one)
    for value in (torch.zeros(7), lambda x: x[:, :2], lambda x: None):
        with pytest.raises(ValueError, match="must expand to the site's shape"):
            after(value=value)
    with pytest.raises(TypeError, match="must be a tensor"):
        apply_with(net, net.params, batch, {"z.0": lambda x: None})
    with pytest.raises(ValueError, match="module's output are not known"):
        apply_with(net, net.params, batch, {"module:model.layers.0.mlp": Patch(0.0, positions=1)})


def test_names_of_transformer_lens_and_kinds_without_a_layer_are_understood():
    net, batch = netted("gpt2"), inputs_of("gpt2")["no mask"]
    for theirs, ours in (
        ("blocks.0.attn.hook_pattern", "pattern.0"), ("blocks.1.hook_resid_post", "resid_post.1"),
        ("blocks.1.mlp.hook_post", "mlp_post.1"), ("ln_final.hook_normalized", "final"), ("hook_embed", "tok_embed"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"did you mean '{ours}'"):
            trace(net, net.params, batch, [theirs])
    with pytest.raises(ValueError, match=r"that of one: `z\.0`"):
        apply_with(net, net.params, batch, {"z": torch.zeros(1)})
    with pytest.raises(KeyError, match="was not asked for"):
        trace(net, net.params, batch, ["z.0"])["pattern"]
    assert repr(trace(net, net.params, batch, ["z.0"])) == "Trace(z.0 (3, 9, 2, 8))"


def test_what_a_module_gives_is_seen_before_an_activation_in_place():
    net = seeded(
        0, lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 2))
    )
    x = fs.normal(fs.key(0), torch.zeros(5, 3))
    made = fs.functional(net)
    seen = fs.trace(made, made.params, x, ["module:0", "module:1"])
    assert_close(seen["module:0"], torch.nn.functional.linear(x, net[0].weight, net[0].bias))
    assert_close(seen["module:1"], seen["module:0"].relu())
    assert float(seen["module:0"].min()) < 0
