"""Patching of sites and edges. Oracles: loops by hand, a model that is linear, whole passes, definitions written out."""

from inspect import unwrap

import pytest
import torch
from problems import VOCAB, seeded, tokens
from test_architectures import model_of
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import funcscope as fs
from funcscope.mechanistic import (
    activation_patching,
    attribution_patching,
    circuit_faithfulness,
    edge_attribution,
    edge_patching,
)
from funcscope.mechanistic.edges import FAMILIES, graph_of, pass_with_edges, writes_of
from funcscope.mechanistic.patching import LEAST_ERRORS

WIDE = torch.float64
KINDS = {"heads": "z", "attention": "attn_out", "mlps": "mlp_out", "residual": "resid_post"}


def net_of(line):
    return fs.functional(model_of(line, WIDE))


def inputs_of(seed, pad=0, left=True):
    """Clean and corrupt sequences that differ in one token."""
    clean = tokens(seed, 4, 6, pad=pad, left=left)
    ids = clean["input_ids"].clone()
    ids[:, 3] = (ids[:, 3] + 7) % VOCAB
    return clean, {**clean, "input_ids": ids}


def metric(logits):
    return logits[:, -1, 5] - logits[:, -1, 9]


def linear_net():
    """Norms that divide by a constant, uniform attention, no nonlinearity: linear in embeddings and every site."""
    config = GPT2Config(
        n_layer=2, n_embd=12, n_head=2, vocab_size=VOCAB, n_positions=16, bos_token_id=1, eos_token_id=1,
        activation_function="linear", layer_norm_epsilon=1e16,
    )  # fmt: skip
    model = seeded(0, lambda: GPT2LMHeadModel(config)).double().eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".ln_" in name and name.endswith("weight"):
                param.mul_(1e8)
            if name.endswith(("attn.weight", "proj.weight", "fc.weight")):
                param.mul_(20)
            if name.endswith("c_attn.weight"):
                param[:, :24] = 0
    return fs.functional(model)


# sites


@pytest.mark.slow
@pytest.mark.parametrize("line", ["gpt2", "llama"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("sites", KINDS)
def test_every_site_is_a_pass_of_its_own_with_values_of_the_other(line, direction, sites):
    net, (clean, corrupt) = net_of(line), inputs_of(1, pad=2)
    found = activation_patching(net, net.params, clean, corrupt, metric, sites=sites, direction=direction)
    start, end = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    with torch.no_grad():
        before, after = (metric(fs.apply_with(net, net.params, x, {})[0]) for x in (start, end))
        for layer, place in ((0, 1), (1, 0)):
            name = f"{KINDS[sites]}.{layer}"
            at = {"heads": place} if sites == "heads" else {"positions": place}
            patch = fs.Patch(fs.trace(net, net.params, end, [name])[name], **at)
            change = metric(fs.apply_with(net, net.params, start, {name: patch})[0]) - before
            share = change.sum() / (after - before).sum()
            assert_close(found.effects[layer, place], share, rtol=1e-6, atol=1e-7)
            rest = change - share * (after - before)
            stderr = (4 / 3 * rest.square().sum()).sqrt() / (after - before).sum().abs()
            assert_close(found.effects_stderr[layer, place], stderr, rtol=1e-5, atol=1e-7)
    assert found.effects.shape == ((2, 2) if sites == "heads" else (2, 6))
    one = activation_patching(net, net.params, clean, corrupt, metric, sites=sites, direction=direction, chunk=1)
    assert_close(one.changes, found.changes, rtol=1e-6, atol=1e-7)
    assert found.asdict()["effects"].shape == found.effects.shape


@pytest.mark.slow
@pytest.mark.parametrize("line", ["gpt2", "gemma2"])
def test_a_sites_own_value_changes_no_bit_and_leaves_shares_undefined(line):
    net, (clean, _) = net_of(line), inputs_of(1)
    for sites in KINDS:
        found = activation_patching(net, net.params, clean, clean, metric, sites=sites, chunk=1)
        assert not found.changes.any()
        assert found.effects.isnan().all()
        assert found.unresolved == ("effects",)
        assert "not resolved" in found.notes[0]


def test_shares_are_resolved_where_the_inputs_differ_by_twice_the_error():
    net, (clean, corrupt) = net_of("gpt2"), inputs_of(1)
    found = activation_patching(net, net.params, clean, corrupt, metric)
    apart = found.difference
    assert found.is_resolved == bool(apart.value.abs() > LEAST_ERRORS * apart.stderr)
    weak = activation_patching(net, net.params, clean, corrupt, lambda x: metric(x) * torch.tensor([1, -1, 1, -1]))
    assert not weak.is_resolved
    assert str(found.head).startswith("patching of heads, clean values in the corrupt pass, exact")


# to first order


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("sites", KINDS)
def test_of_a_linear_model_the_first_order_is_all(sites, direction):
    net, (clean, corrupt) = linear_net(), inputs_of(2)
    exact, first = (
        f(net, net.params, clean, corrupt, metric, sites=sites, direction=direction)
        for f in (activation_patching, attribution_patching)
    )
    assert exact.changes.abs().max() > 1e-4
    assert_close(first.changes, exact.changes, rtol=1e-6, atol=1e-6 * float(exact.changes.abs().max()))
    assert_close(first.reference, exact.reference)


def test_the_slope_is_at_the_input_that_is_patched():
    net, (clean, corrupt) = net_of("llama"), inputs_of(2)
    name, units = "mlp_out.0", slice(None)
    for direction, start, end in (("denoise", corrupt, clean), ("noise", clean, corrupt)):
        there, here = (fs.trace(net, net.params, x, [name])[name] for x in (end, start))

        def changed(a, here=here, there=there, start=start):
            return metric(fs.apply_with(net, net.params, start, {name: here + a * (there - here)})[0])

        _, slope = torch.func.jvp(changed, (torch.zeros((), dtype=WIDE),), (torch.ones((), dtype=WIDE),))
        found = attribution_patching(net, net.params, clean, corrupt, metric, sites="mlps", direction=direction)
        assert_close(found.changes.view(2, 6, 4)[0].sum(0), slope[units].detach(), rtol=1e-5, atol=1e-7)


def test_bad_requests_of_patching_get_one_clear_line():
    net, (clean, corrupt) = net_of("gpt2"), inputs_of(1)
    both = [unwrap(activation_patching), unwrap(attribution_patching)]
    short = {name: x[:, :4] for name, x in corrupt.items()}
    padded = {**corrupt, "attention_mask": inputs_of(1, pad=2)[0]["attention_mask"]}
    for f in both:
        for other in (short, padded):
            with pytest.raises(ValueError, match="`clean` and `corrupt` must be sequences of one shape"):
                f(net, net.params, clean, other, metric)
        for bad, message in ((lambda x: x.mean(), r"got shape \(\)"), (lambda x: 1.0, "a float")):
            with pytest.raises(ValueError, match=f"`metric` must give one number for each of 4 sequences.*{message}"):
                f(net, net.params, clean, corrupt, bad)
        with pytest.raises(ValueError, match="`sites` must be one of 'heads'"):
            f(net, net.params, clean, corrupt, metric, sites="neurons")
        with pytest.raises(ValueError, match="`direction` must be one of"):
            f(net, net.params, clean, corrupt, metric, direction="both")
    with pytest.raises(ValueError, match="`chunk` must be an integer of at least 1"):
        activation_patching(net, net.params, clean, corrupt, metric, chunk=0)


# edges


@pytest.mark.parametrize("line", FAMILIES)
def test_all_edges_cut_are_the_corrupt_pass_and_none_the_clean_one_bit_for_bit(line):
    net, (clean, corrupt) = net_of(line), inputs_of(1, pad=2)
    graph = graph_of(net, net.params)
    with torch.no_grad():
        given = writes_of(graph, corrupt)
        none, all_cut = (pass_with_edges(graph, clean, c[None].to(WIDE), given) for c in (0 * graph.edges, graph.edges))
        own, other = (fs.apply_with(net, net.params, x, {})[0] for x in (clean, corrupt))
    real = clean["attention_mask"].bool()
    assert torch.equal(none[real], own[real])
    assert (own - other)[real].abs().max() > 0.1
    assert_close(all_cut[real], other[real], rtol=0, atol=1e-6)
    stream = fs.trace(net, net.params, corrupt, ["resid_post.1"])["resid_post.1"]
    if line != "gpt2" and line != "qwen2" and line != "gpt_neox":  # without biases, the stream is the sum of the writes
        assert_close(given.sum(0)[real], stream[real], rtol=0, atol=1e-9)


@pytest.mark.parametrize("line", ["gpt2", "llama"])
def test_all_edges_of_a_head_or_an_mlp_together_are_its_site_patched(line):
    net, (clean, corrupt) = net_of(line), inputs_of(1)
    graph = graph_of(net, net.params)
    for sender, sites, place in (("a0.1", "heads", (0, 1)), ("a1.0", "heads", (1, 0)), ("m0", "mlps", 0)):
        row = graph.senders.index(sender)
        cut = torch.zeros(graph.edges.shape, dtype=WIDE)
        cut[row] = graph.edges[row].to(WIDE)
        with torch.no_grad():
            logits = pass_with_edges(graph, clean, cut[None], writes_of(graph, corrupt))
            name = f"{KINDS[sites]}.{place if sites == 'mlps' else place[0]}"
            value = fs.trace(net, net.params, corrupt, [name])[name]
            patch = fs.Patch(value, heads=place[1] if sites == "heads" else None)
            theirs = fs.apply_with(net, net.params, clean, {name: patch})[0]
        assert_close(logits, theirs, rtol=0, atol=2e-7 if line == "llama" else 1e-12)


def test_edges_of_a_query_alone_change_that_query_alone():
    net, (clean, corrupt) = net_of("gpt2"), inputs_of(1)
    graph = graph_of(net, net.params)
    cut = torch.zeros(graph.edges.shape, dtype=WIDE)
    cut[0, graph.receivers.index("a0.1.k")] = 1
    with torch.no_grad():
        logits = pass_with_edges(graph, clean, cut[None], writes_of(graph, corrupt))
        k = fs.trace(net, net.params, corrupt, ["k.0"])["k.0"]  # of layer 0 the embedding is all that there is to read
        theirs = fs.apply_with(net, net.params, clean, {"k.0": fs.Patch(k, heads=1)})[0]
    assert_close(logits, theirs, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("num_nodes", [0, 2])
def test_of_a_linear_model_edges_are_exact(num_nodes):
    net, (clean, corrupt) = linear_net(), inputs_of(2)
    found = edge_attribution(net, net.params, clean, corrupt, metric, num_nodes=num_nodes)
    exact = edge_patching(net, net.params, clean, corrupt, metric, found.names)
    assert exact.abs().max() > 1e-4
    assert_close(found.samples, exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))
    judged = circuit_faithfulness(
        net, net.params, clean, corrupt, metric, found, key=fs.key(0), sizes=[0, len(exact)], num_random=2, num_exact=5
    )
    assert_close(judged.faithfulness, torch.tensor([0.0, 1.0], dtype=WIDE), rtol=0, atol=1e-9)
    assert judged.correlation.value > 1 - 1e-9
    assert judged.num_sign_errors == 0


@pytest.mark.slow
def test_edge_scores_are_slopes_of_exact_patches_and_their_mean_on_the_way():
    net, (clean, corrupt) = net_of("llama"), inputs_of(2)
    graph = graph_of(net, net.params)
    edge, at = "m0 -> a1.0.v", (graph.senders.index("m0"), graph.receivers.index("a1.0.v"))
    start, end = (writes_of(graph, x) for x in (clean, corrupt))
    cut = torch.zeros(graph.edges.shape, dtype=WIDE)
    cut[at] = 1

    def changed(c, embedding=None):
        return metric(pass_with_edges(graph, clean, c * cut[None], end, embedding=embedding, fixed=end - start))

    def slope(embedding=None):
        zero, one = torch.zeros((), dtype=WIDE), torch.ones((), dtype=WIDE)
        return torch.func.jvp(lambda c: changed(c, embedding), (zero,), (one,))[1].detach()

    for num_nodes in (0, 1):
        found = edge_attribution(net, net.params, clean, corrupt, metric, num_nodes=num_nodes)
        theirs = slope((start[0] + end[0]) / 2 if num_nodes else None)
        assert_close(found.samples[found.names.index(edge)], theirs, rtol=1e-4, atol=1e-7)
    exact = edge_patching(net, net.params, clean, corrupt, metric, [edge], chunk=1)
    whole = pass_with_edges(graph, clean, cut[None], end)
    assert_close(exact[0], metric(whole) - metric(fs.apply_with(net, net.params, clean, {})[0]), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_circuits_are_the_largest_edges_beside_random_ones_of_their_size():
    net, (clean, corrupt) = net_of("gpt2"), inputs_of(2)
    found = edge_attribution(net, net.params, clean, corrupt, metric)
    options = {"key": fs.key(0), "sizes": [3, 46], "num_random": 3, "num_exact": 6}
    judged = circuit_faithfulness(net, net.params, clean, corrupt, metric, found, **options)
    graph = graph_of(net, net.params)
    names = [f"{graph.senders[s]} -> {graph.receivers[r]}" for s, r in graph.edges.nonzero().tolist()]
    assert names == found.names
    cut = graph.edges.clone()
    for edge in found.circuit(3):
        s, r = graph.edges.nonzero()[names.index(edge)]
        cut[s, r] = False
    with torch.no_grad():
        kept = metric(pass_with_edges(graph, clean, cut[None].to(WIDE), writes_of(graph, corrupt)))
        own, other = (metric(fs.apply_with(net, net.params, x, {})[0]) for x in (clean, corrupt))
    assert_close(judged.faithfulness[0], (kept - other).sum() / (own - other).sum())
    assert_close(judged.faithfulness[1], torch.ones((), dtype=WIDE))
    assert_close(judged.random_mean[0], judged.random[0].mean())
    assert_close(judged.random_mean_stderr[0], judged.random[0].std() / 3**0.5)
    assert judged.edges == found.circuit(6)
    exact = edge_patching(net, net.params, clean, corrupt, metric, judged.edges)
    assert_close(judged.exact, exact.sum(1) / (other - own).sum())
    both = torch.stack([judged.estimated, judged.exact])
    assert_close(judged.correlation.value, torch.corrcoef(both)[0, 1])
    wrong = (judged.exact.abs() > 2 * judged.exact_stderr) & (judged.exact.sign() != judged.estimated.sign())
    assert judged.num_sign_errors == int(wrong.sum())
    again = circuit_faithfulness(net, net.params, clean, corrupt, metric, found, **options)
    assert again == judged


def test_a_circuit_of_few_edges_is_judged_on_all_of_them():
    config = GPT2Config(n_layer=1, n_embd=4, n_head=1, vocab_size=VOCAB, n_positions=8)
    net, (clean, corrupt) = fs.functional(seeded(0, lambda: GPT2LMHeadModel(config)).double()), inputs_of(2)
    found = edge_attribution(net, net.params, clean, corrupt, metric)
    judged = circuit_faithfulness(net, net.params, clean, corrupt, metric, found, key=fs.key(0))
    assert len(judged.edges) == len(found.names) < 20


def test_bad_requests_of_edges_get_one_clear_line():
    net, (clean, corrupt) = net_of("gpt2"), inputs_of(2)
    found = edge_attribution(net, net.params, clean, corrupt, metric, num_nodes=0)
    for line in ("gemma2", "bert"):
        other = net_of(line)
        with pytest.raises(ValueError, match=f"the residual stream of '{line}' is not known as a sum"):
            edge_attribution(other, other.params, clean, corrupt, metric)
    with pytest.raises(ValueError, match="`num_nodes` must be an integer of at least 0"):
        edge_attribution(net, net.params, clean, corrupt, metric, num_nodes=-1)
    with pytest.raises(ValueError, match=r"there is no edge 'm9 -> logits': they are written 'embed -> a0\.0\.q'"):
        edge_patching(net, net.params, clean, corrupt, metric, ["m9 -> logits"])
    with pytest.raises(ValueError, match="`edges` must name an edge"):
        edge_patching(net, net.params, clean, corrupt, metric, [])
    with pytest.raises(ValueError, match="`chunk` must be an integer"):
        edge_patching(net, net.params, clean, corrupt, metric, found.names[:2], chunk=True)
    whole = net_of("gpt_neox")
    for options, message in (
        ({"sizes": [47]}, "`sizes` must be from 0 to the 46 edges"),
        ({"num_exact": 1}, "`num_exact`"),
    ):
        with pytest.raises(ValueError, match=message):
            circuit_faithfulness(net, net.params, clean, corrupt, metric, found, key=fs.key(0), **options)
    with pytest.raises(ValueError, match="another model"):
        circuit_faithfulness(whole, whole.params, clean, corrupt, metric, found, key=fs.key(0))
