"""Wrong inputs at Python doors: each case is called as a user calls it, in a process without runtime type checks.

`python tests/wrong_inputs.py` prints what each of them raises, as JSON.
"""

import json
import threading
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import funcscope as fs
from funcscope.documented import FisherSpectral
from funcscope.view import show


def points():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0])


X, Y = points()


def mlp():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Around(nn.Module):
    """A module around an MLP."""

    def __init__(self, **attributes):
        super().__init__()
        self.inner = mlp()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.inner(x)


class Checkpointed(Around):
    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0].exp()


class Exponential(Around):
    def forward(self, x):
        return OldStyle.apply(self.inner(x))


class Counting(Around):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        return self.inner(x)


class Assigning(Counting):
    def forward(self, x):
        self.steps = self.steps + 1
        return self.inner(x) * (1 + self.steps / 100)


class Item(Around):
    def forward(self, x):
        out = self.inner(x)
        return out * 2 if out.sum().item() > 0 else out


class Branching(Around):
    def forward(self, x):
        out = self.inner(x)
        return out * 2 if out.sum() > 0 else out


class Numpy(Around):
    def forward(self, x):
        out = self.inner(x)
        return out * torch.as_tensor(out.detach().numpy() > 0)


class Routed(Around):
    """Two experts: each sees the rows that a gate gives to it."""

    def __init__(self, way):
        super().__init__(way=way)
        with torch.random.fork_rng(devices=[]):
            self.gate, self.other = nn.Linear(4, 2), nn.Linear(4, 3)
        with torch.no_grad():
            self.gate.weight.copy_(torch.eye(2, 4))
            self.gate.bias.zero_()
            self.other.weight.copy_(torch.linspace(-1, 1, 12).view(3, 4))
            self.other.bias.zero_()

    def forward(self, x):
        expert, out = self.gate(x).argmax(-1), x.new_zeros(len(x), 3)
        numbers = expert.tolist() if self.way == "list" else torch.unique(expert) if self.way == "unique" else (0, 1)
        for i in sorted({int(number) for number in numbers}):
            rows = expert == i if self.way == "mask" else (expert == i).nonzero()[:, 0]
            out[rows] = (self.inner, self.other)[i](x[rows])
        return out


class Noisy(Around):
    def forward(self, x):
        return F.dropout(self.inner(x), 0.5)


class Remembering(Around):
    """Keeps a table that it makes of its weights at the first call."""

    def forward(self, x):
        if getattr(self, "table", None) is None:
            self.table = self.inner[0].weight * 2
        return self.inner[2](torch.tanh(x @ self.table.T))


def pruned():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def hooked():
    model = mlp()
    bias = model[2].bias
    model[0].register_forward_hook(lambda module, inputs, out: out + bias.sum())
    return model


def loss_of(model=None, batches=None, criterion=fs.classification):
    return fs.objective(fs.functional(model or mlp()), [(X, Y)] if batches is None else batches, criterion)


def hessian_of(*args):
    loss = loss_of(*args)
    return fs.hessian(loss, loss.net.theta)(loss.net.theta)


def sampled(*args):
    loss = loss_of(*args)
    return fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=2)


def mapped(model):
    loss = loss_of(model)
    return torch.func.vmap(fs.restrict(loss, loss.net.theta, fs.directions(loss.net, key=fs.key(0), num=2)))(
        torch.eye(2)
    )


def on_plane(*coefficients, lazy=None):
    loss = loss_of()
    return fs.restrict(loss, loss.net.theta, fs.directions(loss.net, key=fs.key(0), num=2), lazy=lazy)(*coefficients)


def path_to(end):
    loss = loss_of()
    return fs.linear_path(loss, loss.net.theta, end, num=3)


def grams(by):
    loss = loss_of()
    return fs.curvature.gram(loss, loss.net.theta, by=by)


def kept(sparsity):
    net = fs.functional(mlp())
    return fs.fisher.pruning_mask(net.theta, net.layout, sparsity=sparsity)


def masks(first):
    return fs.fisher.mask_overlap(first, torch.ones(51, dtype=torch.bool), fs.functional(mlp()).layout)


def column(criterion):
    return hessian_of(nn.Linear(4, 1), [(X, X[:, 0])], criterion)


CASES = {
    # doors of data
    "one pair as a list of batches": (lambda: loss_of(None, [X, Y]), "[(inputs, targets)]"),
    "a dataset": (lambda: loss_of(None, TensorDataset(X, Y)), "DataLoader"),
    "a number for batches": (lambda: loss_of(None, 3), "list of batches"),
    "a path for batches": (lambda: loss_of(None, "texts.jsonl"), "list of batches"),
    "only empty batches": (lambda: loss_of(None, [(X[:0], Y[:0])]), "no sequence"),
    "one label without a dimension": (lambda: loss_of(None, [(X[0], Y[0])]), "x[None]"),
    "a label of -1": (lambda: loss_of(None, [(X, Y - 1)]), "-100"),
    "a label of 255": (lambda: hessian_of(None, [(X, torch.where(Y == 0, 255, Y))]), "-100"),
    "a label of 255 in the loss itself": (
        lambda: (lambda loss: loss(loss.net.theta))(loss_of(None, [(X, torch.where(Y == 0, 255, Y))])),
        "-100",
    ),
    "labels as a list": (lambda: loss_of(None, [(X, Y.tolist())]), "torch.as_tensor"),
    "float64 inputs": (lambda: hessian_of(None, [(X.double(), Y)]), "x.to(torch.float32)"),
    "float64 arrays": (lambda: hessian_of(None, [(X.double().numpy(), Y.numpy())]), "x.to(torch.float32)"),
    "float32 inputs of a bfloat16 model": (lambda: hessian_of(mlp().bfloat16()), "x.to(torch.bfloat16)"),
    # doors of models
    "a class": (lambda: fs.functional(nn.Linear), "make one"),
    "a state dict": (lambda: fs.functional(mlp().state_dict()), "load_state_dict"),
    "a name": (lambda: fs.functional("gpt2"), "from_pretrained"),
    "a functional of a functional": (lambda: fs.functional(fs.functional(mlp())), "torch.nn.Module"),
    "a lazy module": (lambda: fs.functional(nn.LazyLinear(3)), "run the lazy module on one batch"),
    "a scripted model": (lambda: fs.functional(torch.jit.script(mlp())), "pass the Python module"),
    "a traced model": (lambda: fs.functional(torch.jit.trace(mlp(), X)), "pass the Python module"),
    "a lock": (lambda: fs.functional(Around(guard=threading.Lock())), "`guard`"),
    "a generator": (lambda: fs.functional(Around(rows=(i for i in range(3)))), "`rows`"),
    "a pruned module": (lambda: fs.functional(pruned()), "prune.remove"),
    "a hook with a parameter": (lambda: fs.functional(hooked()), "make it a method"),
    # doors of forward passes
    "checkpointing": (lambda: hessian_of(Checkpointed(reentrant=False)), "switch it off"),
    "reentrant checkpointing": (lambda: hessian_of(Checkpointed(reentrant=True)), "switch the checkpointing off"),
    "an old-style function": (lambda: hessian_of(Exponential()), "setup_context"),
    "a counter": (lambda: hessian_of(Counting()), "Leave the write out"),
    "a buffer assigned anew": (lambda: hessian_of(Assigning()), "Leave the write out"),
    "an item under vmap": (lambda: mapped(Item()), "chunk=1"),
    "a branch under vmap": (lambda: mapped(Branching()), "torch.where"),
    "a mask under vmap": (lambda: mapped(Routed(way="mask")), "torch.where"),
    "values taken out of torch": (lambda: hessian_of(Numpy()), "compute with tensors"),
    "random numbers": (lambda: hessian_of(Noisy()), "Take that out"),
    "random numbers in a sharpness": (
        lambda: (lambda loss: fs.sam_sharpness(loss, loss.net.theta))(loss_of(Noisy())),
        "Take that out",
    ),
    "a table of the first weights": (lambda: hessian_of(Remembering()), "Take that out"),
    # doors of criteria
    "a module for a criterion": (lambda: loss_of(None, None, nn.CrossEntropyLoss()), "fs.custom"),
    "a function for a criterion": (lambda: loss_of(None, None, F.cross_entropy), "fs.custom"),
    "a number for a loss": (lambda: fs.custom(0.5), "without reduction"),
    "columns against rows": (lambda: column(fs.custom(lambda out, y: (out - y) ** 2)), "targets[:, None]"),
    "columns against rows in mse": (lambda: column(fs.mse), "targets[:, None]"),
    "missing targets in mse": (lambda: loss_of(None, [(X, X[:, :3] / 0)], fs.mse), "y.isfinite()"),
    **{
        f"a label of {label} in {criterion.name}": (
            lambda criterion=criterion, label=label: hessian_of(None, [(X, torch.where(Y == 0, label, Y))], criterion),
            "-100",
        )
        for criterion in (fs.cross_entropy(), fs.cross_entropy(label_smoothing=0.1))
        for label in (-1, 3)
    },
    "labels of -1 and 1": (lambda: loss_of(nn.Linear(4, 4), [(X, X.sign())], fs.binary_cross_entropy), "(y + 1) / 2"),
    "weights for other classes": (
        lambda: hessian_of(None, None, fs.cross_entropy(weight=torch.ones(5))), "holds 5 classes",
    ),
    "smoothing above 1": (lambda: fs.cross_entropy(label_smoothing=1.5), "from 0 to 1"),
    "weights that depend on the output": (
        lambda: hessian_of(None, None, fs.custom(lambda out, y: (out[:, 0], out[:, 1].exp()))), "into the loss",
    ),
    "no slope where nothing is scored": (
        lambda: hessian_of(None, None, fs.custom(lambda out, y: ((out - out)[:, 0].sqrt(), (y > 0).float()))),
        "torch.where",
    ),
    # doors of losses, thetas and vectors
    "a module for a net": (lambda: fs.objective(mlp(), [(X, Y)], fs.classification), "functional(model)"),
    "a module for a loss": (lambda: fs.hessian(mlp(), fs.functional(mlp()).theta), "objective("),
    "a closure for a loss": (lambda: fs.ggn(lambda t: t @ t, torch.ones(3)), "objective("),
    "a net for a loss": (lambda: fs.restrict(fs.functional(mlp()), torch.ones(51), torch.ones(51)), "objective("),
    "a net in a landscape": (
        lambda: fs.directional_losses(fs.functional(mlp()), torch.ones(51), key=fs.key(0), n_samples=2), "objective(",
    ),
    "a module for theta": (lambda: fs.hessian(loss_of(), mlp()), "net.theta"),
    "a list for theta": (lambda: fs.hessian(loss_of(), list(mlp().parameters())), "net.params"),
    "an array for theta": (lambda: fs.hessian(loss_of(), np.ones(51)), "torch.as_tensor"),
    "theta elsewhere": (lambda: fs.hessian(loss_of(), torch.ones(51, device="meta")), ".to('cpu')"),
    "a dict for v": (lambda: fs.hessian(loss_of(), torch.ones(51))(fs.functional(mlp()).params), "ravel(params)"),
    "directions of a module": (lambda: fs.directions(mlp(), key=fs.key(0), num=2), "functional(model)"),
    "a matrix for a matvec": (
        lambda: fs.eigenpairs(torch.eye(5), torch.ones(5), key=fs.key(0), num=1), "lambda v: A @ v",
    ),
    "a dict for `like`": (
        lambda: fs.eigenpairs(lambda v: v, fs.functional(mlp()).params, key=fs.key(0), num=1), "ravel(params)",
    ),
    "a module at the end of a path": (lambda: path_to(mlp()), "fs.functional(model)"),
    "an array at the end of a path": (lambda: path_to(np.ones(51)), "torch.as_tensor"),
    "a net for many models": (lambda: fs.barrier_matrix(loss_of(), fs.functional(mlp())), "fs.functional(model)"),
    "a module for an axis": (lambda: fs.loss_plane(loss_of(), torch.ones(51), mlp()), "plane_directions"),
    "a module for directions": (lambda: fs.restrict(loss_of(), torch.ones(51), mlp()), "fs.directions"),
    "numbers for directions": (lambda: fs.stack([1.0, 2.0]), "fs.directions"),
    "no direction": (lambda: fs.stack([]), "at least 1"),
    "three coefficients of two": (lambda: on_plane(torch.ones(3)), "vmap(phi)"),
    "three coefficients of two, lazily": (lambda: on_plane(torch.ones(3), lazy=True), "vmap(phi)"),
    "one coefficient of two": (lambda: on_plane(0.5), "one per direction"),
    "an array of coefficients": (lambda: on_plane(np.ones(2)), "torch.as_tensor"),
    "numbers for results": (lambda: fs.compare_directional(1, 2), "directional_losses"),
    "vectors for eigenpairs": (lambda: fs.eigenvector_axes(torch.ones(2, 51)), "vectors=True"),
    "a net for points": (lambda: fs.principal_directions(fs.functional(mlp())), "net.theta"),
    "a net for running statistics": (
        lambda: fs.running_statistics(fs.functional(mlp()), torch.ones(51)), "objective(",
    ),
    "a net for a sampled Fisher": (lambda: fs.fisher_mc(fs.functional(mlp()), torch.ones(51), key=fs.key(0)), "objective("),
    "a list for `like`": (lambda: fs.hutchinson_trace(lambda v: v, [1.0], key=fs.key(0), num=3), "net.theta"),
    "a generator for a key": (lambda: fs.directions(fs.functional(mlp()), key=torch.Generator(), num=1), "fs.key(0)"),
    "None for a key": (lambda: fs.normal(None, torch.ones(3)), "fs.key(0)"),
    "a seed for a key": (lambda: fs.directions(fs.functional(mlp()), key=7, num=1), "fs.key(7)"),
    "a number of numpy for a key": (lambda: fs.fold_in(np.int64(7), 1), "fs.key(7)"),
    "a tensor for a key": (lambda: fs.fold_in(torch.tensor(7), 1), "fs.key(0)"),
    "a text for a key": (lambda: fs.rademacher("a", torch.ones(3)), "fs.key(0)"),
    "a number of numpy for a seed": (lambda: fs.key(np.int64(7)), "int(seed)"),
    "a negative epsilon": (lambda: fs.flatness_profile(loss_of(), torch.ones(51), key=fs.key(0), epsilons=-1.0), "above 0"),
    # doors of Fisher information
    "a name for a view": (lambda: grams({"rows": ["0.weight"]}), "lists of views"),
    "a partition of another name": (lambda: grams("row"), "views by name"),
    "a result for a mask": (lambda: masks(kept(0.5)), "the `mask` of `pruning_mask`"),
    "a list for a mask": (lambda: masks([True] * 51), "`score > threshold`"),
    "a mask of integers": (lambda: masks(kept(0.5).mask.long()), "torch.bool"),
    "a text for a sparsity": (lambda: kept("a half"), "in [0, 1]"),
    "a module for its heads": (lambda: fs.fisher.head_views(mlp(), None), "functional(model)"),
    "a net for a documented model": (
        lambda: FisherSpectral().compute_fisher_spectrum(fs.functional(mlp()), (X, Y)), "the module itself",
    ),
    "a dictionary of settings": (lambda: FisherSpectral({"seed": 1}), "SpectralConfig(seed=42)"),
    "a page that is not there": (lambda: show("nowhere.npz"), "`.npz`"),
}  # fmt: skip
"""Name: what is done, and words of the remedy."""


def complaint(case):
    """The type and text of what a case raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        try:
            CASES[case][0]()
        except (ValueError, TypeError, FileNotFoundError) as err:
            return [type(err).__name__, str(err)]
    return ["nothing", ""]


if __name__ == "__main__":
    print(json.dumps({case: complaint(case) for case in CASES}))  # noqa: T201
