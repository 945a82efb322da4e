"""The circuit of induction: its inputs, its ends, and that it is found where models were seen to grow it."""

import dataclasses

import pytest
import results as made
import torch
from torch.testing import assert_close

import funcscope as fs
from funcscope.families import induction
from funcscope.mechanistic import induction_circuit, induction_heads
from funcscope.mechanistic.induction_circuit import _pair


@pytest.fixture(scope="module")
def small():
    net = made.language().net
    return net, induction_circuit(net, net.params, key=fs.key(0), num=4, num_nodes=2, num_random=2, period=3)


def test_clean_and_corrupt_differ_in_what_the_match_is_made_of():
    ids = torch.tensor([3, 5, 6, 9])
    tokens = torch.tensor([[0, 3, 5, 6, 9, 3, 5, 6, 9], [0, 9, 9, 3, 3, 9, 9, 3, 3]])
    clean, corrupt, target = _pair(tokens, 4, ids, fs.key(1))
    assert clean.tolist() == [[0, 3, 5, 6, 9, 3, 5], [0, 9, 9, 3, 3, 9, 9]]
    assert target.tolist() == [6, 3]
    different = (clean != corrupt).nonzero().tolist()
    assert different == [[0, 2], [1, 2]]  # the earlier occurrence of the last token
    assert set(corrupt[:, 2].tolist()) <= set(ids.tolist())


def test_ends_are_what_is_known_of_them(small):
    net, found = small
    assert float(found.faithfulness[-1]) == pytest.approx(1)
    assert float(found.random_faithfulness[-1]) == pytest.approx(1)
    heads = induction_heads(net, net.params, key=fs.key(0), num=4, period=3)
    assert float(found.gain_without[0]) == pytest.approx(float(heads.gain.value))
    assert float(found.gain_without_random[0]) == pytest.approx(float(heads.gain.value))
    assert found.ranking == heads.ranking
    assert found.removed == [0, 1, 2, 4]
    assert_close(found.gain_without[-1], found.gain_without_random[-1])  # all of them
    assert float(found.gain_without_random_stderr[-1]) == pytest.approx(0, abs=1e-9)


def test_through_keys_are_edges_of_heads_to_later_heads(small):
    _, found = small
    rows, columns = found.coords["writing head"], found.coords["reading head"]
    known = dict(zip(found.names, found.shares.tolist(), strict=True))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            value, name = float(found.through_keys[i, j]), f"{row} -> {column}"
            assert value == pytest.approx(known[name]) if name in known else name and value != value
    assert int(found.through_keys.isfinite().sum()) == 4


def test_heads_that_are_removed_write_their_mean():
    net = made.language().net
    found = induction_circuit(net, net.params, key=fs.key(0), num=4, num_nodes=1, num_random=1, period=3)
    tokens = fs.mechanistic.repeated_tokens(fs.key(0), 4, 3, torch.tensor([i for i in range(9) if i != 1]), 1)
    (layer, head), *_ = found.ranking
    z = fs.trace(net, net.params, tokens, ["z"])[f"z.{layer}"]
    new = z.clone()
    new[:, :, head] = z[:, :, head].mean((0, 1))
    logits = fs.apply_with(net, net.params, tokens, {f"z.{layer}": new})[0].log_softmax(-1)
    losses = -logits[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    oracle = (losses[:, 1:3].mean(1) - losses[:, 4:6].mean(1)).mean()
    assert float(found.gain_without[1]) == pytest.approx(float(oracle), rel=1e-5, abs=1e-7)


def test_what_has_no_circuit_is_said():
    net = made.language().net
    with pytest.raises(ValueError, match="`num` must be an integer of at least 2"):
        induction_circuit(net, net.params, key=fs.key(0), num=1)
    with pytest.raises(ValueError, match="`num_random` must be"):
        induction_circuit(net, net.params, key=fs.key(0), num_random=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_layers", "llama"])
def test_models_that_complete_repeated_text_do_it_by_the_heads_that_the_scores_find(tmp_path, name):
    """The circuit has the induction heads, the head of the previous token, and the keys by which they compose."""
    config = dataclasses.replace(induction.CONFIGS[name], seed=0)
    for _ in induction.train(config, tmp_path, (config.steps,)):
        pass
    net, params = induction.network(config), induction.checkpoint(config, tmp_path, config.steps).params
    found = induction_circuit(net, params, key=fs.key(3), num=32)
    heads = induction_heads(net, params, key=fs.key(3), num=32)
    previous = int(heads.previous[0].argmax())
    best, circuit = int(heads.induction[1].argmax()), found.circuit(16)
    assert f"a1.{best} -> logits" in circuit
    assert f"embed -> a0.{previous}.v" in circuit
    assert any(edge.startswith(f"a0.{previous} -> a1.") and edge.endswith(".k") for edge in circuit)
    at = found.sizes.index(16)
    assert float(found.faithfulness[at]) > 0.9
    assert float(found.random_faithfulness[at]) < 0.2
    assert float(found.gain_without[0]) > 4
    assert float(found.gain_without[found.removed.index(4)]) < 1
    assert [layer for layer, _ in found.ranking[:3]] == [1] * 3
    first_order = induction_circuit(net, params, key=fs.key(3), num=32, num_nodes=0, num_random=1)
    assert float(first_order.shares.abs().max()) < 0.1  # negative control: gradients vanish where the answer is sure
