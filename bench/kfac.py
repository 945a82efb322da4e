"""Kronecker factors beside those of curvlinops (bench/install_peers.sh): time, memory, distance to the exact blocks.

    python bench/fisher.py kfac

Labels are the data's. off: the distance of two libraries' products with a vector; positions without a gradient (queries of
the first token) are in no factor of ours and in A of curvlinops. Parameters are those of the linear layers, as curvlinops has
no other. Time is in units of the bare forward pass on the same data that takes turns with it, memory the growth of the
resident set, each way in a process of its own. EKFAC is with its eigenvectors. distance: of the block-diagonal matrices of a
small model to the blocks of the exact Fisher information, relative, Frobenius; labels are drawn. One thread.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from fisher import config_of, run_one, timed
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import funcscope as fs
from funcscope.curvature import ekfac_factors, exact_fisher, kfac_factors
from funcscope.linalg import dense

WAYS = ("KFAC curvlinops", "KFAC funcscope", "EKFAC curvlinops", "EKFAC funcscope")
MODELS = ("mlp", "llama-1M", "llama-4M")
ROUNDS, SEEDS = 5, 4
DRAWS = (1, 50)


class Logits(nn.Module):
    """The logits of a model; `flat`: one row for every position, as curvlinops takes them."""

    def __init__(self, model: nn.Module, flat: bool = False):
        super().__init__()
        self.model, self.flat = model, flat

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        out = out if isinstance(out, Tensor) else out.logits
        return out.flatten(0, -2) if self.flat else out


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with random weights, inputs and labels of all positions."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name == "mlp":
        layers = nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
        return nn.Sequential(*layers), torch.randn(1024, 256), torch.randint(10, (1024,))
    if name == "small":
        config = LlamaConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=12,
            max_position_embeddings=8, tie_word_embeddings=False, attn_implementation="eager", use_cache=False,
        )  # fmt: skip
    else:
        config = config_of(name)
        config.use_cache = False
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(config.vocab_size, (128, 9) if name == "small" else (32, 33))
    return Logits(model), ids[:, :-1], ids[:, 1:]


def linear(model: nn.Module) -> dict[str, nn.Parameter]:
    owners = {
        f"{name}.{kind}" for name, m in model.named_modules() if isinstance(m, nn.Linear) for kind in ("weight", "bias")
    }
    return {name: p for name, p in model.named_parameters() if name in owners}


def ours(model: nn.Module, x: Tensor, y: Tensor) -> fs.Loss:
    net = fs.functional(model, trainable=list(linear(model)))
    return fs.objective(net, [(x, y)], fs.classification)


def theirs(kind: str, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Any:
    import curvlinops

    made = getattr(curvlinops, f"{kind}LinearOperator")(
        Logits(model, flat=True), nn.CrossEntropyLoss(), list(linear(model).values()), [(x, y.flatten())],
        separate_weight_and_bias=False, check_deterministic=False, num_data=len(x),
        num_per_example_loss_terms=y[0].numel(), **options,
    )  # fmt: skip
    made.compute_kronecker_factors()
    if kind == "EKFAC":
        made.compute_eigenvalue_correction()
    return made


def measured(name: str, way: str) -> dict[str, Any]:
    model, x, y = problem(name)
    kind, library = way.split()
    loss = ours(model, x, y)
    theta, v = loss.net.theta, fs.normal(fs.key(1), loss.net.theta)
    loss.check_function()
    make = {"KFAC": kfac_factors, "EKFAC": ekfac_factors}[kind]

    def call() -> Any:
        if library == "funcscope":
            return make(loss, theta, labels="data", chunk_size=len(x))
        return theirs(kind, model, x, y, fisher_type="empirical")

    @torch.no_grad()
    def bare() -> Tensor:
        return model(x)

    found, made = timed(call, bare, ROUNDS)
    product = made.matvec(v) if library == "funcscope" else made @ v
    return found | {"P": len(theta), "product": product[:: max(1, len(v) // 1000)].tolist()}


def distances() -> None:
    """To the exact blocks, of one draw of the labels for every position and of many: mean and its error over seeds."""
    model, x, y = trained()
    loss = ours(model, x, y)
    theta = loss.net.theta
    exact = dense(exact_fisher(loss, theta), theta)
    blocks = torch.zeros_like(exact)
    for leaf in loss.layout.leaves:
        blocks[leaf.slice, leaf.slice] = exact[leaf.slice, leaf.slice]
    print(f"distance to the exact blocks, P {len(theta):,}:", flush=True)
    for num in DRAWS:
        for way in WAYS:
            kind, library = way.split()
            make = {"KFAC": kfac_factors, "EKFAC": ekfac_factors}[kind]
            off = []
            for seed in range(SEEDS):
                if library == "funcscope":
                    matvec = make(loss, theta, key=fs.key(seed), num=num, chunk_size=len(x)).matvec
                else:
                    matvec = theirs(kind, model, x, y, fisher_type="mc", mc_samples=num, seed=seed).__matmul__
                off.append(float((dense(matvec, theta) - blocks).norm() / blocks.norm()))
            spread = torch.tensor(off).std() / SEEDS**0.5
            print(f"{num:3} draws  {way:17} {sum(off) / SEEDS:.3f} +- {spread:.3f}", flush=True)


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """The small model after 300 steps on a rule that holds for three tokens of four."""
    model, x, _ = problem("small")
    ids = x[:, :1]
    for _ in range(x.shape[1]):
        other = torch.randint(12, (len(x), 1))
        ids = torch.cat([ids, torch.where(torch.rand(len(x), 1) < 0.75, (5 * ids[:, -1:] + 3) % 12, other)], 1)
    x, y = ids[:, :-1], ids[:, 1:]
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        adam.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        adam.step()
    return model.double(), x, y


def main() -> None:
    for name in MODELS:
        oracle: dict[str, Tensor] = {}
        for way in WAYS:
            found = run_one(__file__, [name, way])
            if "refusal" in found:
                print(f"{name:10} {way:17} does not run: {found['refusal']}", flush=True)
                continue
            product = torch.tensor(found["product"])
            first = oracle.setdefault(way.split()[0], product)
            off = float((product - first).norm() / first.norm())
            print(
                f"{name:10} {way:17} {found['ratio']:6.2f} forwards {found['MiB']:8.0f} MiB  P {found['P']:,}  off {off:.0e}",
                flush=True,
            )
    distances()


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(measured(*json.loads(sys.argv[2]))))
    else:
        main()
