"""The geometry of a model's residual streams on its data: spectra, dimensions, similarity and linear maps of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ..core.checks import check_choice, check_count, check_number
from ..core.keys import Key, check_key, fold_in
from ..core.layout import Params
from ..core.objective import Loss
from ..core.reading import Reading, one_pass, read
from ..core.sites import spread
from ..core.streams import Reservoir, sampled, streams_of
from ..core.trace import sites_of
from .calibration import LEAST
from .dimension import LayerDimensions, layer_dimensions
from .layer_similarity import MEASURES, LayerSimilarity, layer_similarity
from .reconstruction import LinearReconstruction, linear_reconstruction
from .ricci import RicciCurvature, ollivier_ricci
from .scales import DimensionByScale, check_even, gride
from .spectrum import ActivationSpectra, activation_spectra

R = TypeVar("R")


@one_pass
def feature_geometry(
    loss: Loss, params: Params, *, key: Key, size: int = 2048, sites: Sequence[str] | None = None  # noqa: ARG001
) -> Reading[ActivationSpectra]:  # fmt: skip
    """In how many directions each residual stream varies: participation ratio, effective, spectral and stable rank.

    `activation_spectra` over a uniform sample of `size` positions, with errors over sequences. Of fewer rows than units all
    ranks but the debiased one are too small. For dimensions of curved clouds see `intrinsic_dimension`, for how layers are
    alike `similarity_of_layers`. sites: others than the residual streams, `module:NAME` of any network among them.

    Raises ValueError for models that are not described, where there is no token, and for streams that are not finite.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.arange(40).view(10, 4) % 9], fs.causal_lm)
    >>> feature_geometry(loss, net.params, key=fs.key(0)).layers
    ('resid_pre.0', 'resid_post.0', 'resid_post.1')
    """
    return _of_streams(loss, key, size, lambda layers, sample: activation_spectra(layers, sample.sequence), sites)


@one_pass
def intrinsic_dimension(
    loss: Loss, params: Params, *, key: Key, size: int = 2048, sites: Sequence[str] | None = None  # noqa: ARG001
) -> Reading[LayerDimensions]:  # fmt: skip
    """The intrinsic dimension of each residual stream by TwoNN, over a uniform sample of `size` positions.

    `layer_dimensions`: neighbours are positions of other sequences, equal rows (the same token at the same place) count once.
    Behind the first layer such rows are no longer equal but near, which makes the dimension of nearest neighbours small where
    sequences begin alike: `dimension_by_scale` shows it. sites: as of `feature_geometry`.

    Raises ValueError for models that are not described, where there is no token, and for streams that are not finite.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.arange(40).view(10, 4) % 9], fs.causal_lm)
    >>> intrinsic_dimension(loss, net.params, key=fs.key(0)).mle.shape
    torch.Size([2])
    """
    return _of_streams(loss, key, size, lambda layers, sample: layer_dimensions(layers, sample.sequence), sites)


@one_pass
def dimension_by_scale(
    loss: Loss, params: Params, *, key: Key, layer: int = -1, size: int = 2048,  # noqa: ARG001
    neighbours: Sequence[int] = (2, 4, 8, 16, 32),
) -> Reading[DimensionByScale]:  # fmt: skip
    """The intrinsic dimension of one residual stream at growing scales, by Gride: where it is flat it is a dimension.

    `gride` over a uniform sample of `size` positions. layer: behind which layer, -1 is the last.

    Raises ValueError for models that are not described, a layer that is not there, a stream that is not finite, and as
    `gride`.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.arange(160).view(40, 4) % 9], fs.causal_lm)
    >>> dimension_by_scale(loss, net.params, key=fs.key(0), neighbours=[2, 4]).dimension.shape
    torch.Size([2])
    """
    check_key(key)
    check_even(neighbours)
    name = _behind(loss, layer)
    return sampled(
        [name], lambda sample: gride(_finite(sample, name), sample.sequence, neighbours=neighbours), key=key, size=size
    )


@one_pass
def similarity_of_layers(
    loss: Loss,
    params: Params,  # noqa: ARG001
    *,
    key: Key,
    measure: Literal["debiased_cka", "cka", "cca", "procrustes", "neighbours"] = "debiased_cka",
    size: int = 2048,
    num: int = 199,
    sites: Sequence[str] | None = None,
) -> Reading[LayerSimilarity]:
    """How alike the residual streams of all layers are, each pair beside the null of permuted sequences.

    `layer_similarity` over a uniform sample of `size` positions, of which each sequence gives one: pairings are of
    independent samples. num: permutations. sites: as of `feature_geometry`. With one sequence there is no null.

    Raises ValueError for models that are not described, where there is no token, and for streams that are not finite.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.arange(40).view(10, 4) % 9], fs.causal_lm)
    >>> similarity_of_layers(loss, net.params, key=fs.key(0), num=19).similarity.shape
    torch.Size([2, 2])
    """
    check_choice("measure", measure, MEASURES)
    check_count("num", num, LEAST)

    def made(layers: dict[str, Tensor], sample: Reservoir) -> LayerSimilarity:
        return layer_similarity(
            layers, groups=sample.sequence, key=fold_in(key, "null"), measure=measure, num=num, per_sequence=1
        )

    return _of_streams(loss, key, size, made, sites)


@one_pass
def reconstruction_of_layers(
    loss: Loss, params: Params, *, key: Key, size: int = 2048, folds: int = 5,  # noqa: ARG001
    sites: Sequence[str] | None = None,
) -> Reading[LinearReconstruction]:  # fmt: skip
    """How well each residual stream follows from the one before by a linear map, held out by sequences.

    `linear_reconstruction` over a uniform sample of `size` positions. sites: as of `feature_geometry`, in their order.

    Raises ValueError for models that are not described, where there is no token, and for streams that are not finite.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.arange(40).view(10, 4) % 9], fs.causal_lm)
    >>> reconstruction_of_layers(loss, net.params, key=fs.key(0)).num_folds
    5
    """
    check_count("folds", folds, 2)

    def made(layers: dict[str, Tensor], sample: Reservoir) -> LinearReconstruction:
        return linear_reconstruction(layers, sample.sequence, key=fold_in(key, "folds"), folds=folds)

    return _of_streams(loss, key, size, made, sites)


@one_pass
def curvature_of_stream(
    loss: Loss, params: Params, *, key: Key, layer: int = -1, size: int = 256, k: int = 5, alpha: float = 0.5,  # noqa: ARG001
    num: int = 200,
) -> Reading[RicciCurvature]:  # fmt: skip
    """The Ollivier-Ricci curvature of one residual stream as a cloud of points, with exact transport.

    `ollivier_ricci` over `num` edges of the graph of k nearest neighbours of a uniform sample of `size` positions, equal
    rows counted once. It grows with the width and falls with the number of points: compare like with like.

    Raises ValueError for models that are not described, a layer that is not there, a stream that is not finite, and as
    `ollivier_ricci`.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.arange(40).view(10, 4) % 9], fs.causal_lm)
    >>> curvature_of_stream(loss, net.params, key=fs.key(0), k=2, num=5).k
    2
    """
    check_key(key)
    check_count("k", k)
    check_number("alpha", alpha, 0.0, 1.0)
    check_count("num", num)
    name = _behind(loss, layer)

    def made(sample: Reservoir) -> RicciCurvature:
        rows = _finite(sample, name)
        _, index = rows.unique(dim=0, return_inverse=True)
        first = torch.full((int(index.max()) + 1,), len(rows)).scatter_reduce(
            0, index.cpu(), torch.arange(len(rows)), "amin"
        )
        kept = first.sort().values
        return ollivier_ricci(
            rows[kept.to(rows.device)],
            k=k,
            alpha=alpha,
            groups=sample.sequence[kept],
            num=num,
            key=fold_in(key, "edges"),
        )

    return sampled([name], made, key=key, size=size)


def stream_sample(loss: Loss, params: Params, *, key: Key, size: int, sites: Sequence[str] | None = None) -> Reservoir:
    """A uniform sample of positions of all residual streams, or of other sites: the same for all models of the same texts."""
    names = _names(loss, sites)

    def made(kept: Reservoir) -> Reservoir:
        return kept._replace(rows={name: _finite(kept, name) for name in names})

    return read(loss, params, {"rows": sampled(names, made, key=key, size=size)})["rows"]


def _finite(sample: Reservoir, name: str) -> Tensor:
    """The sampled rows of a stream. Raises ValueError where they are not finite."""
    rows = sample.rows[name]
    if not bool(rows.isfinite().all()):
        raise ValueError(
            f"the stream `{name}` is not finite, and has no geometry: check the weights, and whether {rows.dtype} holds it."
        )
    return rows


def _names(loss: Loss, sites: Sequence[str] | None) -> tuple[str, ...]:
    """Of all residual streams, or of single sites."""
    return streams_of(loss.net) if sites is None else tuple(spread(sites, sites_of(loss.net)))


def _behind(loss: Loss, layer: int) -> str:
    """The stream behind a layer."""
    names = streams_of(loss.net)[1:]
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError(f"`layer` must be an integer, got {layer!r}.")
    if not -len(names) <= layer < len(names):
        raise ValueError(f"`layer` must be one of 0 to {len(names) - 1}, or -1 for the last, got {layer}.")
    return names[layer]


def _of_streams(
    loss: Loss,
    key: Key,
    size: int,
    result: Callable[[dict[str, Tensor], Reservoir], R],
    sites: Sequence[str] | None = None,
) -> Reading[R]:
    """What is made of a sample of all residual streams, or of other sites, by their names in the order of the pass."""
    check_key(key)
    names = _names(loss, sites)
    return sampled(
        names, lambda sample: result({name: _finite(sample, name) for name in names}, sample), key=key, size=size
    )
