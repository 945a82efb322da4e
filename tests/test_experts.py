"""Mixtures of experts: their kernel under every transform, and the jumps of their routing. Oracle: the models' own loop."""

import pytest
import torch
import transformers
from folders import texts, tokenizer
from problems import seeded, tokens
from test_architectures import FAMILIES, LINES, labelled, model_of
from torch.func import grad, hessian, jvp, vmap
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.experts import recorded_routing
from funcscope.curvature import routing_changes
from funcscope.study.inputs.opened import OpenedModel
from funcscope.study.texts import DataSpec

ROUTED = [line for line in LINES if FAMILIES[line.split(",")[0]].routed]
QUICK = [line if line == "mixtral" else pytest.param(line, marks=pytest.mark.slow) for line in ROUTED]


def loss_of(line, dtype=torch.float64):
    net = fs.functional(model_of(line, dtype))
    return fs.objective(net, [labelled(line, tokens(1, 3, 9, pad=3))], fs.causal_lm)


def apart(loss):
    """Parameters among which tokens go to different experts."""
    theta = loss.net.theta
    steps = torch.stack([0.0 * theta, *(0.3 * fs.normal(fs.key(i), theta) for i in (1, 2))])
    assert (routing_changes(loss, theta, steps).changed[1:] > 0).all()
    return theta + steps


@pytest.mark.parametrize("line", QUICK)
def test_a_mapped_routing_gives_what_the_loop_over_experts_gives(line):
    loss = loss_of(line)
    thetas, v = apart(loss), fs.normal(fs.key(5), loss.net.theta)
    assert loss.is_mapped()
    assert loss.net.routed
    forms = (loss, grad(loss), lambda t: jvp(grad(loss), (t,), (v,))[1], lambda t: jvp(loss, (t,), (v,))[1])
    for form in forms:
        one_by_one = torch.stack([form(theta) for theta in thetas])
        assert_close(vmap(form)(thetas), one_by_one, rtol=1e-4, atol=1e-4 * float(one_by_one.abs().max()))


def test_every_second_derivative_is_that_of_the_model_itself():
    """Of the router's weights, entry by entry, by double backward through the loop of transformers."""
    model, loss = model_of("gpt_oss", torch.float64), loss_of("gpt_oss")
    name = "model.layers.1.mlp.router.weight"
    part = fs.Loss(loss.net.only([name], loss.net.params), loss.batches, loss.criterion)
    ours = hessian(part)(part.net.theta)
    batch = labelled("gpt_oss", tokens(1, 3, 9, pad=3))
    weight, labels = model.get_parameter(name), batch["labels"][:, 1:].reshape(-1)
    logits = model(**tokens(1, 3, 9, pad=3)).logits[:, :-1].flatten(0, 1)
    slope = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), weight, create_graph=True)[0]
    rows = [torch.autograd.grad(x, weight, retain_graph=True)[0].reshape(-1) for x in slope.reshape(-1)]
    assert_close(ours, torch.stack(rows), rtol=0, atol=2e-5 * float(ours.abs().max()))


@pytest.mark.parametrize("line", QUICK)
def test_values_and_gradients_are_those_of_the_fast_kernel(line):
    """That of transformers' own choice, which has neither float64 nor second derivatives."""
    config = model_of(line, torch.float32).config
    make = transformers.AutoModelForCausalLM.from_config
    fast = seeded(0, lambda: make(config, experts_implementation="grouped_mm")).eval()
    fast.load_state_dict(model_of(line, torch.float32).state_dict())
    batch = tokens(1, 3, 9, pad=3)
    loss = fs.objective(fs.functional(fast), [labelled(line, batch)], fs.causal_lm)
    labels = labelled(line, batch)["labels"][:, 1:].reshape(-1)
    value = torch.nn.functional.cross_entropy(fast(**batch).logits[:, :-1].flatten(0, 1), labels)
    slopes = torch.autograd.grad(value, [fast.get_parameter(name) for name in loss.layout.names])
    ours = grad(loss)(loss.net.theta)
    theirs = torch.cat([x.reshape(-1) for x in slopes])
    assert_close(loss(loss.net.theta), value.detach().to(loss(loss.net.theta).dtype), rtol=1e-5, atol=0)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    assert fast.config._experts_implementation == "grouped_mm"  # the user's model keeps its kernel


def test_inner_products_are_those_of_the_gradients_of_sequences():
    loss = loss_of("mixtral")
    theta, batch = loss.net.theta, labelled("mixtral", tokens(1, 3, 9, pad=3))
    num = loss.batches[0][1].weight.sum()
    rows = []
    for i in range(3):
        one = fs.objective(loss.net, [{name: x[i : i + 1] for name, x in batch.items()}], fs.causal_lm)
        rows.append(grad(one)(theta) * one.batches[0][1].weight.sum() / num)
    rows = torch.stack(rows)
    ours, theirs = fs.curvature.gram(loss, theta).total, rows @ rows.T
    ours, theirs = ours / ours.diagonal().mean(), theirs / theirs.diagonal().mean()  # in one unit
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# Jumps


def planted():
    """Two experts in one layer, of which the first likes even tokens by a margin of 1 and the second odd ones."""
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 1}
    model = seeded(
        0, lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=8, **sizes, **experts))
    )
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.tensor([1.0, -1.0] * 4)[:, None] * torch.eye(4)[:1])
        model.model.layers[0].mlp.gate.weight.copy_(torch.tensor([0.5, -0.5])[:, None] * torch.eye(4)[:1])
    return fs.functional(model.double().eval())


def test_jumps_of_a_planted_router_are_counted():
    net = planted()
    ids = torch.tensor([[2, 4, 6, 1, 3], [1, 1, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    loss = fs.objective(net, [{"input_ids": ids, "attention_mask": mask}], fs.causal_lm)

    def step(scale):
        """Adds scale * e_0 to the second expert's row: at 1.5 it is the first for even tokens, and the last for odd ones."""
        moved = {name: torch.zeros_like(x) for name, x in net.params.items()}
        moved["model.layers.0.mlp.gate.weight"][1, 0] = scale
        return net.layout.ravel(moved)

    result = routing_changes(loss, net.theta, torch.stack([step(x) for x in (0.0, 0.9, 1.5)]))
    assert (result.num, result.changed.tolist()) == (8, [0, 0, 8])
    only_even = {name: torch.zeros_like(x) for name, x in net.params.items()}
    only_even["model.embed_tokens.weight"][2::2, 0] = -2.0  # they become odd: one each of 2, 4 and 6, and one more 2
    result = routing_changes(loss, net.theta, net.layout.ravel(only_even)[None])
    assert (result.num, result.changed.tolist()) == (8, [4])
    assert_close(result.share, torch.tensor([0.5], dtype=torch.float64))


def test_a_loss_jumps_where_a_choice_changes_and_derivatives_do_not_see_it():
    loss = loss_of("mixtral")
    theta = loss.net.theta
    d = fs.normal(fs.key(1), theta)
    ends = torch.linspace(0, 0.004, 81, dtype=theta.dtype)
    counts = routing_changes(loss, theta, ends[:, None] * d).changed
    first = int((counts > 0).nonzero()[0, 0])
    values = torch.stack([loss(theta + end * d) for end in ends[: first + 9].tolist()]).detach()
    second = values.diff().diff().abs()
    assert int(second.argmax()) >= first - 2  # the roughest place is a jump, none before the first
    assert float(second.max()) > 20 * float(second[: first - 2].max())


def test_a_trace_of_routing_is_per_layer():
    net = fs.functional(model_of("deepseek_v3", torch.float32))
    with recorded_routing() as layers:
        net.apply(net.params, tokens(1, 3, 9))
    assert [tuple(layer.shape) for layer in layers] == [(27, 2)]  # the first layer is dense


def test_a_study_says_that_derivatives_are_within_a_routing(tmp_path):
    model_of("mixtral", torch.float32).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    spec = DataSpec(texts(tmp_path / "texts.jsonl"), num_samples=4)
    _, data = OpenedModel.of(spec, tmp_path / "model").loss(spec)
    assert "derivatives are those within the routing at theta" in str(data)


def test_models_without_a_router_and_wrong_steps_are_refused():
    plain = fs.objective(
        fs.functional(model_of("llama", torch.float32)), [labelled("llama", tokens(1, 3, 9))], fs.causal_lm
    )
    assert not plain.net.routed
    assert not fs.functional(seeded(0, lambda: torch.nn.Linear(2, 2))).routed
    with pytest.raises(ValueError, match="must be that of a mixture of experts"):
        routing_changes(plain, plain.net.theta, plain.net.theta[None])
    loss = loss_of("mixtral")
    with pytest.raises(ValueError, match=r"`steps` must have shape \(n, "):
        routing_changes(loss, loss.net.theta, loss.net.theta[None, :-1])
    kept = fs.objective(
        fs.functional(model_of("mixtral", torch.float32), attention="keep"), [tokens(1, 3, 9)], fs.causal_lm
    )
    with pytest.raises(ValueError, match="make the functional with another `attention`"):
        routing_changes(kept, kept.net.theta, kept.net.theta[None])
