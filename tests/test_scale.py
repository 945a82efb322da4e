"""Large leaves: memory of what is perturbed leaf by leaf, measured in processes of their own."""

import subprocess
import sys
import textwrap

import pytest
import torch
from problems import loss_of, problem
from torch import nn
from torch.func import vmap
from torch.testing import assert_close

import funcscope as fs

WIDE = textwrap.dedent("""
    import sys
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    import funcscope as fs

    def high_water():  # of this process alone: `ru_maxrss` would start with its parent's
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

    torch.set_num_threads(1)
    config = dict(n_layer=1, n_embd=512, n_head=2, vocab_size=50_000, n_positions=16, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**config)).to(getattr(torch, sys.argv[2])).eval()
    model.to_empty(device="cpu").tie_weights()  # in place: making it leaves no peak behind
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.02)
    ids = torch.randint(0, 1000, (1, 8))
    with torch.no_grad():
        model(ids)
    before = high_water()
    net = fs.functional(model)
    loss = fs.objective(net, {"input_ids": ids}, fs.causal_lm)
    options = {"losses": {}, "slopes": {"compute_gradient": True, "slope": "jvp"}, "dense": {"lazy": False}}[sys.argv[1]]
    options |= {"two_sided": True, "compute_curvature": True, "span": 0.5}
    fs.directional_losses(loss, net.params, key=fs.key(0), n_samples=2, **options)
    print(high_water() - before)
""")


def growth(way, dtype):
    """MiB above a process that has made the model and run it."""
    done = subprocess.run([sys.executable, "-c", WIDE, way, dtype], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


LEAF = 98
"""MiB of 50,000 x 512 entries in float32."""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_the_largest_leaf_for_both_signs(dtype):
    """In half precision, of the largest leaf in float32 too: the loss is computed once in it, to know its rounding."""
    for way in ("losses", "slopes"):
        assert growth(way, dtype) < 2.8 * LEAF
    assert growth("dense", dtype) > 3.2 * LEAF  # negative control


class Looking(nn.Module):
    """Looks rows up in every way that torch offers."""

    def __init__(self, **options):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).view(4, 3) / 7)
        self.options = options

    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight, **self.options) + nn.functional.embedding(
            input=ids, weight=self.weight
        )


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}])
def test_rows_are_looked_up_without_copying_the_weights(options):
    net = fs.functional(Looking(**options))
    ids = torch.tensor([[0, 1], [3, 3]])
    scaled = vmap(lambda a: net.apply_leaves(lambda _, value: a * value, ids))(torch.tensor([1.0, -2.0]))
    wanted = net.apply(net.params, ids)
    assert_close(scaled, torch.stack([wanted, -2 * wanted]))


def test_large_models_are_perturbed_leaf_by_leaf_whatever_the_number_of_batches(monkeypatch):
    loss = loss_of("gpt2", torch.float32)
    assert len(loss.batches) == 2

    def plan():
        return fs.directional_losses(loss, loss.net.params, key=fs.key(0), n_samples=1).plan

    assert not plan().lazy
    monkeypatch.setattr("funcscope.landscape.directional.LAZY_FROM", 1)
    assert not plan().lazy  # two batches would draw twice
    monkeypatch.setattr("funcscope.landscape.directional.GRADIENT_UP_TO", 1)
    assert plan().lazy
    one = fs.objective(loss.net, problem("gpt2", torch.float32).batches[:1], fs.causal_lm)
    monkeypatch.setattr("funcscope.landscape.directional.GRADIENT_UP_TO", 2**28)
    assert fs.directional_losses(one, loss.net.params, key=fs.key(0), n_samples=1).plan.lazy
