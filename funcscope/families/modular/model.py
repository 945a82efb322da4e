"""The network: one attention layer, one ReLU layer, no layer norm, read at the last of three tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...core.keys import fold_in, key, normal
from ...core.model import Functional, functional
from .variants import Config


class ModularAddition(nn.Module):
    """(batch, 3) tokens -> (batch, p) logits for the answer. Only the last position is computed: only it is read."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        width = config.d_model
        self.embed = nn.Embedding(config.p + 1, width)
        self.position = nn.Parameter(torch.empty(3, width))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp_in = nn.Linear(width, config.d_mlp, bias=config.biases)
        self.mlp_out = nn.Linear(config.d_mlp, width, bias=config.biases)
        self.unembed = nn.Linear(width, config.p, bias=False)

    def forward(self, tokens: Int[Tensor, "b 3"]) -> Float[Tensor, "b p"]:
        """Keys, values and scores are made once for every token at every position, 3 (p + 1) of them, and then looked up."""
        x = self.embed.weight + self.position[:, None]
        q, k = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj))
        scores = torch.einsum("qhd,pthd->qpth", q[-1], k) / q.shape[-1] ** 0.5
        at = tokens + torch.arange(3, device=tokens.device) * x.shape[1]
        attention = F.embedding(tokens[:, -1:] * (3 * x.shape[1]) + at, scores.flatten(0, 2)).softmax(dim=1)
        v = F.embedding(at, self.v_proj(x).flatten(0, 1)).unflatten(-1, (self.num_heads, -1))
        last = F.embedding(tokens[:, -1], x[-1]) + self.o_proj((attention[..., None] * v).sum(1).flatten(1))
        last = last + self.mlp_out(self.mlp_in(last).relu_())
        return self.unembed(last)


def make(config: Config) -> ModularAddition:
    """The untrained model: weights normal with variance 1 / d_model, biases 0, from the configuration's seed.

    >>> make(Config()).embed.weight.shape
    torch.Size([54, 64])
    """
    with torch.device("meta"):  # the constructors draw weights from the global generator; on meta they draw nothing
        model = ModularAddition(config)
    model = model.to_empty(device="cpu")
    root = fold_in(key(config.seed), "weights")
    with torch.no_grad():
        for name, param in model.named_parameters():
            scale = 0.0 if name.endswith("bias") else config.d_model**-0.5
            param.copy_(normal(fold_in(root, name), param) * scale)
    return model


def network(config: Config) -> Functional:
    """The model as a pure function; its own weights are the untrained ones."""
    return functional(make(config))
