"""The flat vector and its map."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import CATALOGUE, loss_of, problem, seeded
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.core import layout as layouts

SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=4).map(tuple), min_size=1, max_size=5)


def module_of(shapes) -> torch.nn.Module:
    module = torch.nn.Module()
    for i, shape in enumerate(shapes):
        module.register_parameter(f"p{i}", torch.nn.Parameter(fs.normal(fs.key(i), torch.zeros(shape))))
    return module


@given(shapes=SHAPES)
def test_ravel_and_unravel_are_inverse_and_in_the_order_of_named_parameters(shapes):
    params = {name: p.detach() for name, p in module_of(shapes).named_parameters()}
    layout = fs.Layout.of(module_of(shapes))
    theta = layout.ravel(params)
    assert theta.shape == (layout.num,)
    assert torch.equal(theta, torch.cat([p.flatten() for p in params.values()]))
    assert all(torch.equal(layout.unravel(theta)[name], value) for name, value in params.items())
    assert all(torch.equal(theta[leaf.slice], params[leaf.name].flatten()) for leaf in layout.leaves)


def test_unravel_gives_views_of_one_dtype():
    net = fs.functional(problem("gpt2").model)
    theta = net.theta
    back = net.layout.unravel(theta)
    assert all(value.untyped_storage().data_ptr() == theta.untyped_storage().data_ptr() for value in back.values())


def covered(layout: fs.Layout, by) -> torch.Tensor:
    """How often each coordinate lies in a block."""
    counts = {leaf.name: torch.zeros(leaf.shape) for leaf in layout.leaves}
    for views in layout.blocks(by).values():
        for leaf, dim, part in views:
            tensor = counts[leaf]
            (tensor.movedim(dim, 0)[part] if tensor.ndim else tensor).add_(1)
    return torch.cat([count.flatten() for count in counts.values()])


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("by", ["tensor", "layer", "module", "filter", lambda leaf: leaf[0]])
def test_blocks_cover_every_coordinate_once(name, by):
    layout = loss_of(name).layout
    assert (covered(layout, by) == 1).all()


def test_blocks_of_a_gpt2_are_what_the_field_calls_them():
    layout = loss_of("gpt2").layout
    assert set(layout.blocks("layer")) == {"embedding", "transformer.h.0", "transformer.h.1", "transformer.ln_f"}
    kinds = layout.group_of("module")
    assert kinds["transformer.wte.weight"] == "embedding"
    assert kinds["transformer.h.0.attn.c_attn.weight"] == "attention"
    assert kinds["transformer.h.1.mlp.c_fc.bias"] == "mlp"
    assert kinds["transformer.h.1.ln_2.weight"] == "norm"
    assert set(loss_of("llama").layout.group_of("module").values()) == {
        "embedding",
        "attention",
        "mlp",
        "norm",
        "other",
    }
    assert {"bert.encoder.layer.0", "bert.encoder.layer.1"} < set(loss_of("bert").layout.blocks("layer"))


def test_a_filter_is_an_output_unit_also_where_weights_are_stored_transposed():
    layout = loss_of("gpt2").layout
    assert layout.by_name["transformer.h.0.attn.c_attn.weight"].filter_dim == 1  # Conv1D: (in, out)
    assert layout.by_name["transformer.wte.weight"].filter_dim == 0
    assert len(layout.blocks("filter")) == sum(
        1 if leaf.filter_dim is None else leaf.shape[leaf.filter_dim] for leaf in layout.leaves
    )
    cnn = loss_of("cnn").layout
    assert [leaf.filter_dim for leaf in cnn.leaves if len(leaf.shape) == 4] == [0, 1]  # Conv2d, ConvTranspose2d


def test_wrong_vectors_are_refused():
    layout = loss_of("mlp").layout
    with pytest.raises(ValueError, match=r"`theta` must be a flat vector of shape \(51,\), got \(50,\).*layout.ravel"):
        layout.unravel(torch.zeros(50))
    with pytest.raises(ValueError, match=r"missing: \['0.bias'"):
        layout.ravel({"0.weight": torch.zeros(6, 4)})
    with pytest.raises(ValueError, match="'tensor', 'layer', 'module', 'filter' or a callable, got 'row'"):
        inspect.unwrap(layouts._group)(layout.leaves[0], "row")


def test_ravel_is_differentiable_and_casts():
    net = fs.functional(problem("mlp", torch.float32).model)
    g = torch.func.grad(lambda params: (net.layout.ravel(params, torch.float64) ** 2).sum())(dict(net.params))
    assert_close(g, {name: 2 * value for name, value in net.params.items()})
    assert net.layout.ravel(net.params, torch.float64).dtype == torch.float64


def test_a_dict_of_other_shapes_is_no_vector():
    """A transposed weight has as many entries, in another order."""
    net = fs.functional(seeded(0, lambda: nn.Linear(3, 2)))
    turned = {name: value.T.contiguous() if value.ndim == 2 else value for name, value in net.params.items()}
    with pytest.raises(ValueError, match=r"`params\['weight'\]` must have shape \(2, 3\), got \(3, 2\)"):
        net.layout.ravel(turned)
    loss = fs.objective(net, [(torch.eye(3), torch.tensor([0, 1, 0]))], fs.classification)
    for make in (fs.hessian, fs.ggn):
        with pytest.raises(ValueError, match=r"must have shape \(2, 3\)"):
            make(loss, turned)
