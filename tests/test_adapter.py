"""Low-rank adapters from their folders: merged, and beside the weights. Oracles: W + scale B A by hand, and PEFT."""

import json
from pathlib import Path

import pytest
import torch
from folders import folder, texts, tokenizer
from problems import seeded, tokens
from safetensors.torch import load_file, save_file
from torch.func import grad
from torch.testing import assert_close

import funcscope as fs
from funcscope.study.adapter import base_of, read_adapter
from funcscope.study.digest import Sums
from funcscope.study.inputs import load_model, load_tokenizer
from funcscope.study.inputs.opened import OpenedModel
from funcscope.study.sources import Pretrained
from funcscope.study.texts import DataSpec

RANK, ALPHA = 3, 6.0


def random(*shape):
    return seeded(sum(shape), lambda: torch.randn(shape) * 0.3)


def adapter(
    path: Path, base: Path | str, modules: dict[str, tuple[int, int]], more=None, rank=RANK, **settings
) -> Path:
    """A folder as PEFT saves it; modules: their outputs and inputs."""
    path.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": RANK, "lora_alpha": ALPHA, **settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name, (out, into) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = random(rank, into)
        tensors[f"base_model.model.{name}.lora_B.weight"] = random(out, rank)
    save_file({**tensors, **(more or {})}, path / "adapter_model.safetensors")
    return path


@pytest.fixture
def base(tmp_path):
    return folder(tmp_path / "base", "gpt2")


def of(base: Path, path: Path, **settings) -> Path:
    """Of the first layer's fused projection, a Conv1D, and the second's last linear map."""
    model = load_model(base)
    shapes = {name: tuple(model.get_submodule(name).weight.shape[::-1]) for name in MODULES}
    return adapter(path, base, shapes, **settings)


MODULES = ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj")


def by_hand(base: Path, path: Path, scale: float):
    """The model with W + scale B A written out; a Conv1D holds the transpose."""
    model, stored = load_model(base, dtype="float64"), load_file(path / "adapter_model.safetensors")
    with torch.no_grad():
        for name in MODULES:
            a, b = (stored[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
            model.get_submodule(name).weight += scale * (b @ a).T
    return model


def test_the_merged_model_is_the_sum_and_the_adapter_beside_it_the_same_function(base, tmp_path):
    path = of(base, tmp_path / "adapter")
    oracle, batch = by_hand(base, path, ALPHA / RANK), tokens(1, 3, 7, pad=2)
    expected = oracle(**batch).logits
    merged, beside = (load_model(path, dtype="float64", trainable=kind) for kind in ("all", "adapter"))
    assert type(merged) is type(oracle)
    for model in (merged, beside):
        assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        net = fs.functional(model)
        assert_close(net.apply(net.params, batch), expected, rtol=1e-5, atol=1e-5)
    assert (load_model(base, dtype="float64")(**batch).logits - expected).abs().max() > 1e-2
    assert_close(merged.state_dict(), oracle.state_dict(), rtol=1e-6, atol=1e-7)
    assert merged.get_parameter(f"{MODULES[0]}.weight").requires_grad


def test_theta_is_the_adapters_and_its_gradient_follows_from_that_of_the_weights(base, tmp_path):
    path = of(base, tmp_path / "adapter")
    batch = {**tokens(1, 3, 7, pad=2)}
    merged, beside = (
        fs.objective(fs.functional(load_model(path, dtype="float64", trainable=kind).double()), [batch], fs.causal_lm)
        for kind in ("all", "adapter")
    )
    assert set(beside.layout.names) == {f"{name}.{part}.weight" for name in MODULES for part in ("down", "up")}
    whole, own = (loss.layout.unravel(grad(loss)(loss.net.theta)) for loss in (merged, beside))
    for name in MODULES:
        g, scale = whole[f"{name}.weight"].T, ALPHA / RANK
        a, b = (beside.net.params[f"{name}.{part}.weight"] for part in ("down", "up"))
        assert_close(own[f"{name}.up.weight"], scale * g @ a.T, rtol=1e-4, atol=1e-7)
        assert_close(own[f"{name}.down.weight"], scale * b.T @ g, rtol=1e-4, atol=1e-7)
    theta, v = beside.net.theta, fs.normal(fs.key(1), beside.net.theta)
    difference = (grad(beside)(theta + 1e-4 * v) - grad(beside)(theta - 1e-4 * v)) / 2e-4
    assert float((fs.hessian(beside, theta)(v) - difference).norm() / difference.norm()) < 1e-2
    kfac = fs.curvature.kfac_factors(beside, theta, key=fs.key(0), num=1)
    assert kfac is not None


def test_scales_by_square_roots_and_patterns(base, tmp_path):
    path = of(base, tmp_path / "a", use_rslora=True, alpha_pattern={r"h\.1\.mlp\.c_proj": 2.0, "c_proj": 99.0})
    scales = {name: part.scale for name, part in read_adapter(path).low_rank.items()}
    assert scales == pytest.approx({MODULES[0]: ALPHA / 3**0.5, MODULES[1]: 2 / 3**0.5})
    other = of(base, tmp_path / "b", rank=2, rank_pattern={"c_attn": 2, "c_proj": 2})
    assert [part.scale for part in read_adapter(other).low_rank.values()] == [ALPHA / 2, ALPHA / 2]


def test_parameters_that_were_trained_as_a_whole(base, tmp_path):
    name = "transformer.ln_f.weight"
    value = random(*load_model(base).get_parameter(name).shape)
    path = of(base, tmp_path / "adapter", more={f"base_model.model.{name}": value})
    for kind in ("all", "adapter"):
        model = load_model(path, trainable=kind)
        assert torch.equal(model.get_parameter(name), value)
        assert model.get_parameter(name).requires_grad


def test_bfloat16_is_rounded_once(base, tmp_path):
    path = of(base, tmp_path / "adapter")
    model, name = load_model(path, dtype="bfloat16"), f"{MODULES[0]}.weight"
    exact = by_hand(base, path, 0.0).get_parameter(name).bfloat16().double()
    change = by_hand(base, path, ALPHA / RANK).get_parameter(name) - by_hand(base, path, 0.0).get_parameter(name)
    assert torch.equal(model.get_parameter(name), (exact + change).bfloat16())


def test_a_study_of_an_adapter(base, tmp_path):
    path = of(base, tmp_path / "adapter")
    data = texts(tmp_path / "texts.jsonl")
    losses = []
    for kind in ("all", "adapter"):
        opened = OpenedModel.of(DataSpec(data, num_samples=4, trainable=kind), path)
        loss, _ = opened.loss(DataSpec(data, num_samples=4))
        losses.append(float(loss(opened.net.theta)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(load_tokenizer(path, load_model(path))) == len(tokenizer())  # that of the model
    sums, source = Sums(None), Pretrained(str(path), {})
    before = source.digest(sums)
    of(base, path, lora_alpha=1.0)
    assert source.digest(Sums(None)) != before


# Bad input


def test_a_model_that_is_not_there_is_named_with_the_remedy(base, tmp_path):
    path = of(base, tmp_path / "adapter", base_model_name_or_path="meta/some-7b")
    with pytest.raises(
        FileNotFoundError, match=r"adapter of 'meta/some-7b'.*download that model to .*some-7b.*or write"
    ):
        load_model(path)
    base.rename(tmp_path / "some-7b")
    assert base_of(path) == tmp_path / "some-7b"
    load_model(path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say whose adapter it is"):
        load_model(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "the kind 'IA3'"),
        ({"use_dora": True}, "`use_dora`"),
        ({"lora_bias": True}, "`lora_bias`"),
        ({"target_parameters": ["experts.down_proj"]}, "`target_parameters`"),
        ({"init_lora_weights": "pissa_niter_4"}, "started by 'pissa_niter_4'"),
        ({"r": 4}, "settings say rank 4"),
        ({"lora_alpha": "high"}, "must be a number, got 'high'"),
        ({"alpha_pattern": {"(": 1}}, "is no pattern"),
    ],
)
def test_adapters_that_are_something_else(base, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        load_model(of(base, tmp_path / "adapter", **settings))


def test_tensors_that_do_not_fit(base, tmp_path):
    out, into = load_model(base).get_submodule(MODULES[0]).weight.shape[::-1]
    cases = {
        "does not have": ({"transformer.h.9.attn.c_attn": (out, into)}, {}),
        "belongs to another model": ({MODULES[0]: (out + 1, into)}, {}),
        "only linear layers": ({"transformer.wpe": (4, 4)}, {}),
        "tied to": ({"lm_head": tuple(load_model(base).lm_head.weight.shape)}, {}),
        "is incomplete": ({}, {"base_model.model.x.lora_A.weight": torch.ones(1, 1)}),
        "it is no low-rank adapter": ({}, {"base_model.model.x": torch.ones(1, 1)}),
        "no part of W": ({MODULES[0]: (out, into)}, {"base_model.model.wte.lora_embedding_A": torch.ones(1, 1)}),
        "replaces `x`": ({MODULES[0]: (out, into)}, {"base_model.model.x": torch.ones(1, 1)}),
        "replaces `transformer.ln_f.bias` by": (
            {MODULES[0]: (out, into)},
            {"base_model.model.transformer.ln_f.bias": torch.ones(1)},
        ),
    }
    for message, (modules, more) in cases.items():
        with pytest.raises(ValueError, match=message):
            load_model(adapter(tmp_path / "adapter", base, modules, more))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="as safetensors"):
        load_model(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds no adapter"):
        load_model(base, trainable="adapter")


@pytest.mark.outsider
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_makes_the_same_of_its_own_folder(base, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], rank_pattern={"h.0.attn.c_attn": 2},
        alpha_pattern={r"mlp.c_proj": 3}, use_rslora=True, fan_in_fan_out=True, modules_to_save=["ln_f"],
        init_lora_weights=False,
    )  # fmt: skip
    theirs = seeded(0, lambda: peft.get_peft_model(load_model(base), settings))
    with torch.no_grad():
        theirs.base_model.model.transformer.ln_f.modules_to_save["default"].weight.add_(0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    batch = tokens(1, 3, 7, pad=2)
    for kind in ("all", "adapter"):
        ours = load_model(tmp_path / "theirs", trainable=kind)
        assert_close(ours(**batch).logits, theirs.eval()(**batch).logits, rtol=1e-4, atol=1e-5)
    trained = {name for name, param in theirs.named_parameters() if param.requires_grad}
    assert len(trained) == sum(param.requires_grad for param in ours.parameters())
