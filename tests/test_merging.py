"""Merging of folders: the rules of `weights.merge_rules`, one leaf at a time, on models as they lie on disk."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import folder, texts, tokenizer
from problems import loss_of, problem
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import funcscope as fs
from funcscope import cli
from funcscope.curvature.fisher import fisher_diagonal_mc
from funcscope.study import merge_leaves
from funcscope.study.fisher_files import linear_layers, write_fisher, write_input_grams
from funcscope.study.merge_data import measure_for_merge
from funcscope.study.merging import merge_folders
from funcscope.study.stored_model import parts
from funcscope.study.tensor_file import NewTensorFile, Shape, TensorFile
from funcscope.study.texts import DataSpec
from funcscope.weights import merge_rules as rules

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A base and three models near it: tied."""
    return near(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return near(tmp_path_factory.mktemp("llama"), "llama")


def near(root: Path, name: str, num: int = 3) -> list[Path]:
    made = [folder(root / "base", name)]
    for k in range(num):
        model, draws = problem(name, torch.float32).model, torch.Generator().manual_seed(k)
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.1 * torch.randn(param.shape, generator=draws))
        model.save_pretrained(root / f"m{k}")
        tokenizer().save_pretrained(root / f"m{k}")
        made.append(root / f"m{k}")
    return made


@pytest.fixture
def small_parts(monkeypatch):
    """Leaves in parts of 101 entries, as those of large models are in parts of 2 million."""
    monkeypatch.setattr(merge_leaves, "parts", lambda what: parts(what, 101))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / WEIGHTS)


def in_memory(method: str, base, models, names, **given):
    """The oracle: every leaf whole."""
    zero, each = tensors(base), [tensors(model) for model in models]
    out = {}
    cuts = []
    if method == "ties":
        joined = [torch.cat([(one[n] - zero[n]).flatten() for n in names]) for one in each]
        cuts = [rules.global_cut(lambda tau=tau: [tau], given["density"]) for tau in joined]
    for name in names:
        leaves = [one[name] for one in each]
        if method == "linear":
            out[name] = rules.linear(leaves, given["weights"])
        elif method == "slerp":
            out[name] = rules.slerp(*leaves, 0.25)
        elif method == "task_arithmetic":
            out[name] = rules.task_arithmetic(zero[name], leaves, [0.4, 0.8, 1.2])
        elif method == "ties":
            out[name] = rules.ties(zero[name], leaves, cuts=cuts, scale=0.7)
            cuts = [cut.behind(one[name] - zero[name]) for cut, one in zip(cuts, each, strict=True)]
        else:
            out[name] = rules.ties(zero[name], leaves, density=0.3, scale=0.7)
    return out


GIVEN = {
    "linear": {"weights": [1.0, 2.0, 3.0]},
    "slerp": {"weights": [3.0, 1.0]},
    "task_arithmetic": {"weights": [1.0, 2.0, 3.0], "scale": 0.4},
    "ties": {"density": 0.3, "scale": 0.7},
    "ties by tensor": {"density": 0.3, "scale": 0.7, "scope": "tensor"},
}


@pytest.mark.parametrize("method", GIVEN)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_merge_of_folders_is_the_merge_in_memory(method, family, request, tmp_path, small_parts):
    base, *models = request.getfixturevalue(family)
    models = models[:2] if method == "slerp" else models
    start = base if method.split()[0] in ("task_arithmetic", "ties") else None
    made = merge_folders(models, base=start, method=method.split()[0], out=tmp_path / "out", **GIVEN[method])
    got, names = tensors(made.path), list(tensors(base))
    want = in_memory(method, base, models, names, **GIVEN[method])
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-7)
    assert max(float((got[name] - tensors(models[0])[name]).abs().max()) for name in got) > 1e-3


@pytest.mark.parametrize("method", ["ties", "ties by tensor"])
def test_equal_magnitudes_are_counted_on_from_part_to_part(method, gpt2, tmp_path, small_parts):
    base, *models = gpt2
    places, draws = [tmp_path / place.name for place in (base, *models)], torch.Generator().manual_seed(3)
    zero = {name: (1024 * x).round() / 1024 for name, x in tensors(base).items()}
    for k, (place, copy) in enumerate(zip((base, *models), places, strict=True)):
        shutil.copytree(place, copy)
        steps = {name: torch.randint(-1, 2, x.shape, generator=draws) / 2 for name, x in zero.items()}
        save_file({name: x + steps[name] * (k > 0) for name, x in zero.items()}, copy / WEIGHTS, {"format": "pt"})
    given = {"density": 0.3, "scale": 0.7}
    scope = "model" if method == "ties" else "tensor"
    made = merge_folders(places[1:], base=places[0], method="ties", scope=scope, out=tmp_path / "out", **given)
    got, want = tensors(made.path), in_memory(method, places[0], places[1:], list(zero), **given)
    for name in zero:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["ties", "dare", "fisher", "regmean"])
def test_weights_scale_and_shrink_reach_the_rules(method, gpt2, tmp_path):
    base, *models = gpt2
    name, weights, files = "transformer.h.0.mlp.c_fc.weight", [1.0, 2.0, 5.0], diagonals(models, tmp_path)
    zero, leaves, key = tensors(base)[name], [tensors(model)[name] for model in models], fs.fold_in(fs.key(42), "dare")
    if method == "regmean":
        rows = [fs.normal(fs.fold_in(fs.key(1), k), torch.zeros(20, len(zero))) for k in range(3)]
        for file, x in zip(files, rows, strict=True):
            save_file({name: x.T @ x}, file, {"transposed": json.dumps([name])})
    known = [load_file(file) for file in files]
    given, want = {
        "ties": lambda: ({"base": base, "scope": "tensor", "density": 0.5, "scale": 0.5},
                         rules.ties(zero, leaves, density=0.5, scale=0.5, weights=weights)),
        "dare": lambda: ({"base": base, "drop": 0.5, "scale": 0.5},
                         rules.dare(zero, leaves, drop=0.5, scale=0.5, key=key, name=name, weights=weights)),
        "fisher": lambda: ({"fishers": files}, rules.fisher(leaves, [each[name] for each in known], weights)),
        "regmean": lambda: ({"grams": files, "shrink": 0.5},
                            rules.regmean(leaves, [each[name] for each in known], shrink=0.5, weights=weights)),
    }[method]()  # fmt: skip
    got = tensors(merge_folders(models, method=method, weights=weights, out=tmp_path / "out", **given).path)[name]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_merged_folder_loads_with_the_logits_of_the_merge_in_memory(gpt2, tmp_path):
    _, *models = gpt2
    out = merge_folders(models, out=tmp_path / "out", shard_bytes=4000).path
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    merged = AutoModelForCausalLM.from_pretrained(out)
    oracle = AutoModelForCausalLM.from_pretrained(models[0])
    each = [tensors(model) for model in models]
    oracle.load_state_dict({n: rules.linear([one[n] for one in each]) for n in each[0]}, strict=False)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    ids = torch.arange(5, 13)[None]
    torch.testing.assert_close(merged(ids).logits, oracle(ids).logits)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer().get_vocab()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.numel() * 4 for x in each[0].values())


def test_shards_are_merged_as_a_whole_file(gpt2, tmp_path):
    _, *models = gpt2
    for model in models:
        AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / model.name, max_shard_size="5KB")
    assert (tmp_path / "m0" / "model.safetensors.index.json").is_file()
    whole = merge_folders(models, out=tmp_path / "whole").path
    parted = merge_folders([tmp_path / model.name for model in models], out=tmp_path / "parted").path
    assert all(torch.equal(tensors(whole)[name], x) for name, x in tensors(parted).items())


def test_a_weight_that_is_stored_twice_is_merged_once(gpt2, tmp_path):
    """DARE would draw two masks for it, and the model would not be tied any more."""
    base, *models = gpt2
    for place in (base, *models):
        shutil.copytree(place, tmp_path / place.name)
        stored = tensors(place)
        stored["lm_head.weight"] = stored["transformer.wte.weight"].clone()
        save_file(stored, tmp_path / place.name / WEIGHTS, {"format": "pt"})
    twice = [tmp_path / model.name for model in models]
    made = merge_folders(twice, base=tmp_path / "base", method="dare", drop=0.5, out=tmp_path / "out")
    got = tensors(made.path)
    assert torch.equal(got["lm_head.weight"], got["transformer.wte.weight"])
    assert made.num_parameters == sum(x.numel() for x in tensors(base).values())


def test_dare_draws_the_masks_of_its_seed_whatever_else_is_merged(gpt2, tmp_path):
    base, *models = gpt2
    made = merge_folders(models, base=base, method="dare", drop=0.5, seed=3, out=tmp_path / "out")
    key = fs.fold_in(fs.key(3), "dare")
    each, zero, got = [tensors(model) for model in models], tensors(base), tensors(made.path)
    for name in zero:
        want = rules.dare(zero[name].flatten(), [one[name].flatten() for one in each], drop=0.5, key=key, name=name)
        torch.testing.assert_close(got[name].flatten(), want)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_fisher_file_is_the_diagonal_of_the_same_draws(name, tmp_path):
    loss = loss_of(name, torch.float32).split(1)
    write_fisher(loss, tmp_path / "f.safetensors", key=fs.key(5), num=2)
    want = loss.layout.unravel(fisher_diagonal_mc(loss, loss.net.theta, key=fs.key(5), num=2).value)
    got = load_file(tmp_path / "f.safetensors")
    assert got.keys() == want.keys()
    for leaf in want:
        torch.testing.assert_close(got[leaf], want[leaf], rtol=1e-4, atol=1e-9)
    assert not any(module.sparse for module in loss.net._running.modules() if isinstance(module, torch.nn.Embedding))


def test_scores_in_a_fisher_file_have_the_roots_of_the_weights(tmp_path):
    def prepare(batch):
        inputs, labels = fs.classification.prepare(batch)
        return inputs, labels._replace(weight=torch.tensor([1.0, 4.0]))

    weighted = replace(fs.classification, prepare=prepare)
    with torch.random.fork_rng():
        net = fs.functional(torch.nn.Linear(2, 3, bias=False))
    loss = fs.objective(net, [(torch.eye(2), torch.tensor([0, 1]))], weighted)
    write_fisher(loss, tmp_path / "f.safetensors", key=fs.key(1))
    got = load_file(tmp_path / "f.safetensors")["weight"]
    torch.testing.assert_close(got.flatten(), fisher_diagonal_mc(loss, net.theta, key=fs.key(1), num=1).value)
    scores = net.params["weight"][:, 1].softmax(0).detach() - torch.eye(3)  # of the second input, one for each label
    assert min(float((got[:, 1] - 4 / 5 * score.square()).abs().max()) for score in scores) < 1e-6


def test_a_fisher_file_needs_weights_that_have_roots_and_labels_that_can_be_drawn(tmp_path):
    data = [(torch.ones(2, 1), torch.tensor([0, 1]))]
    with torch.random.fork_rng():
        net = fs.functional(torch.nn.Linear(1, 2))
    below = replace(fs.classification, token_loss=lambda out, y: (out[:, 0], torch.tensor([-1.0, 3.0])))
    for criterion, says in ((below, "at least 0"), (fs.custom(lambda out, y: out[:, 0]), "no `sample`")):
        with pytest.raises(ValueError, match=says):
            write_fisher(fs.objective(net, data, criterion), tmp_path / "f.safetensors", key=fs.key(0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_grams_are_those_of_the_inputs_at_tokens_that_are_there(name, tmp_path):
    model = problem(name, torch.float32).model.eval()
    batch = {"input_ids": torch.arange(4, 16).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    write_input_grams(model, [batch, batch], tmp_path / "g.safetensors")
    file = TensorFile(tmp_path / "g.safetensors")
    first = {"gpt2": "transformer.h.0.attn.c_attn.weight", "llama": "model.layers.0.self_attn.q_proj.weight"}[name]
    body = model.transformer if name == "gpt2" else model.model
    with torch.no_grad():
        if name == "gpt2":
            x = body.h[0].ln_1(body.wte(batch["input_ids"]) + body.wpe(torch.arange(6)))
        else:
            x = body.layers[0].input_layernorm(body.embed_tokens(batch["input_ids"]))
    rows = x[batch["attention_mask"].bool()]
    torch.testing.assert_close(file.read(first), 2 * rows.T @ rows)
    assert not torch.allclose(file.read(first), 2 * x.flatten(0, 1).T @ x.flatten(0, 1))  # with the padding
    turned = json.loads(file.metadata["transposed"])
    assert (first in turned) == (name == "gpt2")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert ("lm_head.weight" in file.tensors) == (not tied)
    assert set(file.tensors) == set(linear_layers(model))


class Rows(torch.nn.Module):
    """A layer that sees all tokens in one row after another, and one that sees one token of each text."""

    def __init__(self, cut: int = 0):
        super().__init__()
        self.cut, self.table = cut, torch.nn.Embedding(9, 2)
        self.flat, self.pooled = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def forward(self, input_ids, attention_mask=None):
        x = self.table(input_ids)
        self.pooled(x[:, 0])
        return self.flat(x.flatten(0, 1)[self.cut :])


def test_grams_of_layers_that_see_flat_rows_or_one_row_per_text(tmp_path):
    with torch.random.fork_rng():
        model, other = Rows(), Rows(cut=1)
    ids, mask = torch.arange(8).view(2, 4), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    x = model.table.weight.detach()[ids]
    for there, batch in ((mask.bool(), {"attention_mask": mask}), (torch.ones(2, 4).bool(), {})):
        out = tmp_path / f"{len(batch)}.safetensors"
        write_input_grams(model, [{"input_ids": ids, "labels": ids, **batch}], out)
        got = load_file(out)
        torch.testing.assert_close(got["flat.weight"], x[there].T @ x[there])
        torch.testing.assert_close(got["pooled.weight"], x[:, 0].T @ x[:, 0])
    with pytest.raises(ValueError, match=r"inputs of `flat.weight` have the shape \(7, 2\)"):
        write_input_grams(other, [{"input_ids": ids}], tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def diagonals(models, root: Path) -> list[Path]:
    made = []
    for k, model in enumerate(models):
        draws = torch.Generator().manual_seed(90 + k)
        made.append(root / f"f{k}.safetensors")
        save_file({n: torch.rand(x.shape, generator=draws) for n, x in tensors(model).items()}, made[-1])
    return made


def test_fisher_merging_has_the_floor_of_the_whole_diagonal(gpt2, tmp_path, small_parts):
    _, *models = gpt2
    files = diagonals(models, tmp_path)
    got = tensors(merge_folders(models, method="fisher", fishers=files, out=tmp_path / "out").path)
    each, fishers = [tensors(model) for model in models], [load_file(file) for file in files]
    means = [float(torch.cat([x.flatten() for x in one.values()]).double().mean()) for one in fishers]
    for name in each[0]:
        want = rules.fisher([one[name] for one in each], [one[name] for one in fishers], means=means)
        torch.testing.assert_close(got[name], want)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_regmean_from_texts_is_that_of_the_rule_in_the_layers_orientation(family, request, tmp_path):
    _, *models = request.getfixturevalue(family)
    data = [
        texts(tmp_path / f"t{k}.jsonl", [f"w{4 + (5 * i + k) % 30} w{6 + i} w7" for i in range(9)]) for k in range(3)
    ]
    specs = [DataSpec(file, batch_size=4) for file in data]
    out = merge_folders(models, method="regmean", data=specs, out=tmp_path / "out").path
    got, each = tensors(out), [tensors(model) for model in models]
    for k, (model, spec) in enumerate(zip(models, specs, strict=True)):
        measure_for_merge(model, spec, tmp_path / f"g{k}.safetensors", what="inputs")
    grams = [load_file(tmp_path / f"g{k}.safetensors") for k in range(3)]
    assert grams[0]
    for name in each[0]:
        leaves = [one[name] for one in each]
        if name not in grams[0]:
            want = rules.linear(leaves)
        elif family == "gpt2":
            want = rules.regmean(leaves, [one[name] for one in grams])
        else:
            want = rules.regmean([leaf.T for leaf in leaves], [one[name] for one in grams]).T
        torch.testing.assert_close(got[name], want)
        assert name not in grams[0] or not torch.allclose(want, rules.linear(leaves))
    assert sorted(file.name for file in out.iterdir() if "data" in file.name) == []


def with_buffers(models, root: Path, last: float = -1e4) -> list[Path]:
    """As old checkpoints store them: a causal mask, and what hides an entry."""
    made = [root / f"old{k}" for k in range(len(models))]
    for k, (model, copy) in enumerate(zip(models, made, strict=True)):
        shutil.copytree(model, copy)
        mask = torch.ones(1, 1, 16, 16).tril().to(torch.bfloat16 if k else torch.float32)
        buffers = {"h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(last if k else -1e4)}
        bare = {name.removeprefix("transformer."): x for name, x in tensors(model).items()}
        save_file({**bare, **buffers}, copy / WEIGHTS, {"format": "pt"})
    return made


def test_buffers_of_old_checkpoints_are_copied_where_a_fisher_file_has_parameters_alone(gpt2, tmp_path, small_parts):
    _, *models = gpt2
    files = diagonals(models, tmp_path)
    want = tensors(merge_folders(models, method="fisher", fishers=files, out=tmp_path / "plain").path)
    old = with_buffers(models, tmp_path)
    got = tensors(merge_folders(old, method="fisher", fishers=files, out=tmp_path / "out").path)
    assert all(torch.equal(got.pop(name.removeprefix("transformer.")), x) for name, x in want.items())
    assert got.keys() == {"h.0.attn.bias", "h.0.attn.masked_bias"}
    assert torch.equal(got["h.0.attn.bias"], torch.ones(1, 1, 16, 16).tril())
    assert got["h.0.attn.masked_bias"] == -1e4


def test_a_parameter_without_a_diagonal_is_that_of_another_model(gpt2, tmp_path):
    _, *models = gpt2
    files = diagonals(models, tmp_path)
    old = with_buffers(models, tmp_path, last=-1e3)
    with pytest.raises(
        ValueError, match=r"no diagonal for `h.0.attn.masked_bias`, which differs in .*old1.*another model"
    ):
        merge_folders(old, method="fisher", fishers=files, out=tmp_path / "out")
    kept = {name: x for name, x in load_file(files[0]).items() if "ln_f.bias" not in name}
    save_file(kept, files[0])
    with pytest.raises(ValueError, match=r"f0.safetensors has no diagonal for `transformer.ln_f.bias`"):
        merge_folders(models, method="fisher", fishers=files, out=tmp_path / "out")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_a_file_of_what_is_known_of_a_model_is_finite(method, value, gpt2, tmp_path):
    _, *models = gpt2
    name, files = "transformer.h.0.mlp.c_fc.weight", diagonals(models, tmp_path)
    if method == "regmean":
        width = len(tensors(models[0])[name])
        for file in files:
            save_file({name: torch.eye(width)}, file, {"transposed": json.dumps([name])})
    broken = load_file(files[1])
    broken[name][1, 1] = value
    save_file(broken, files[1], {"transposed": json.dumps([name])})
    given = {"fishers" if method == "fisher" else "grams": files}
    with pytest.raises(ValueError, match=rf"`{name}` of f1.safetensors has 1 entries that are nan or infinite"):
        merge_folders(models, method=method, out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_was_merged_and_how_without_places_of_this_machine(gpt2, tmp_path):
    base, *models = gpt2
    out = merge_folders(models, base=base, method="ties", density=0.5, out=tmp_path / "out").path
    text = (out / "README.md").read_text()
    assert str(tmp_path) not in text
    assert str(models[0].parent) not in text
    for words in ("ties", "density: 0.5", "scope: model", "`m0`", "`base`", "2306.01708", fs.__version__):
        assert words in text
    assert text.count("| `") == 4 + 4  # a name and a sum for each


def test_names_that_differ_by_a_prefix_are_matched(gpt2, tmp_path):
    """Files of `funcscope fisher` have the names of the model's parameters, old checkpoints those of its body."""
    _, *models = gpt2
    files = diagonals(models, tmp_path)
    for model in models:
        shutil.copytree(model, tmp_path / model.name)
        bare = {name.removeprefix("transformer."): x for name, x in tensors(model).items()}
        save_file(bare, tmp_path / model.name / WEIGHTS, {"format": "pt"})
    whole = tensors(merge_folders(models, method="fisher", fishers=files, out=tmp_path / "one").path)
    old = [tmp_path / model.name for model in models]
    bare = tensors(merge_folders(old, method="fisher", fishers=files, out=tmp_path / "two").path)
    assert all(torch.equal(bare[name.removeprefix("transformer.")], x) for name, x in whole.items())


def test_models_of_several_dtypes_merge_into_the_widest(gpt2, tmp_path):
    _, one, other, _ = gpt2
    half = AutoModelForCausalLM.from_pretrained(other, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    tokenizer().save_pretrained(tmp_path / "half")
    out = merge_folders([tmp_path / "half", one], out=tmp_path / "out").path
    name = "transformer.wte.weight"
    want = (tensors(tmp_path / "half")[name].double() + tensors(one)[name].double()) / 2
    torch.testing.assert_close(tensors(out)[name].double(), want, rtol=1e-7, atol=1e-9)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    small = merge_folders([tmp_path / "half", one], dtype="bfloat16", out=tmp_path / "small").path
    assert tensors(small)[name].dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(small).dtype == torch.bfloat16


def test_files_are_the_librarys_format_and_parts_are_those_of_the_whole(tmp_path):
    x = {
        "a": torch.linspace(-1, 1, 15).view(3, 5),
        "b": torch.arange(4, dtype=torch.uint8),
        "c": torch.linspace(0, 1, 7).bfloat16(),
        "d": torch.zeros(0, 2),
    }
    shapes = {name: Shape(value.dtype, tuple(value.shape)) for name, value in x.items()}
    with NewTensorFile(tmp_path / "x.safetensors", shapes, {"format": "pt"}) as file:
        for name in ("c", "d", "a", "b"):
            file.write(name, x[name].flatten()[2:], start=2) if x[name].numel() else file.write(name, x[name])
            file.add(name, x[name].flatten()[:2])
    got = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(got[name], value) and got[name].dtype == value.dtype for name, value in x.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as content:
        assert content.metadata() == {"format": "pt"}
    save_file(x, tmp_path / "y.safetensors")
    theirs = TensorFile(tmp_path / "y.safetensors")
    assert all(torch.equal(theirs.read(name), value) for name, value in x.items())
    assert torch.equal(theirs.read("a", 4, 9), x["a"].flatten()[4:9])
    with pytest.raises(ValueError, match="to be written"), NewTensorFile(tmp_path / "z.safetensors", shapes) as file:
        file.write("a", torch.zeros(9), start=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors", "y.safetensors"]
    (tmp_path / "y.safetensors").write_bytes((tmp_path / "y.safetensors").read_bytes()[:-3])
    with pytest.raises(ValueError, match="damaged"):
        TensorFile(tmp_path / "y.safetensors")


def test_sums_in_a_file_are_added_part_by_part_and_wide_entries_are_aligned(tmp_path):
    shapes = {"a": Shape(torch.int8, (3,)), "b": Shape(torch.float64, (7,))}
    with NewTensorFile(tmp_path / "x.safetensors", shapes) as file:
        file.add("b", torch.arange(1.0, 6.0).double(), start=2, size=2)
    made = TensorFile(tmp_path / "x.safetensors")
    assert made.read("b").tolist() == [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert made._starts["b"] % 8 == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_merge_leaves_nothing(error, gpt2, tmp_path, monkeypatch):
    _, *models = gpt2
    merged, count = merge_leaves.Merger.merged, []

    def stopped(self, name):
        count.append(name)
        if len(count) == 5:
            raise error
        return merged(self, name)

    monkeypatch.setattr(merge_leaves.Merger, "merged", stopped)
    with pytest.raises(error):
        merge_folders(models, out=tmp_path / "out")
    assert len(count) == 5
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    monkeypatch.undo()
    assert (merge_folders(models, out=tmp_path / "out").path / WEIGHTS).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


WRONG = {
    "one model": (lambda b, m, t: ([m[0]], {}), "two models or more"),
    "slerp of three": (lambda b, m, t: (m, {"method": "slerp"}), "exactly two"),
    "no base": (lambda b, m, t: (m, {"method": "ties"}), "needs `base`"),
    "a base too many": (lambda b, m, t: (m, {"base": b}), "has no base"),
    "its own base": (lambda b, m, t: (m, {"method": "ties", "base": m[1]}), "its own base"),
    "twice": (lambda b, m, t: ([m[0], m[0]], {}), "given twice"),
    "density 0": (lambda b, m, t: (m, {"method": "ties", "base": b, "density": 0.0}), "`density` must be"),
    "drop 1": (lambda b, m, t: (m, {"method": "dare", "base": b, "drop": 1.0}), "`drop` must be"),
    "two weights": (lambda b, m, t: (m, {"weights": [1.0, 2.0]}), "each of the 3 models, got 2"),
    "nan weight": (lambda b, m, t: (m, {"weights": [1.0, 2.0, float("nan")]}), "`weights` must be a finite number"),
    "weights of 0": (lambda b, m, t: (m, {"weights": [1.0, -2.0, 1.0]}), "must not sum to 0"),
    "no data": (lambda b, m, t: (m, {"method": "fisher"}), "or its texts"),
    "data of two": (lambda b, m, t: (m, {"method": "fisher", "data": [DataSpec("x")] * 2}), "each of the 3 models"),
    "no such data": (lambda b, m, t: (m, {"method": "fisher", "data": [DataSpec("no/x.jsonl")] * 3}), "no file"),
    "out is a model": (lambda b, m, t: (m, {"out": m[0]}), "one of the folders that are merged"),
    "out is in a model": (lambda b, m, t: (m, {"out": m[0] / "x"}), "one of the folders that are merged"),
    "out is full": (lambda b, m, t: (m, {"out": m[0].parent}), "not an empty folder"),
    "a family": (lambda b, m, t: ([m[0], folder(t / "l", "llama")], {}), "only models of one architecture"),
    "no folder": (lambda b, m, t: ([m[0], t / "none"], {}), "there is no"),
    "tokens": (lambda b, m, t: ([m[0], folder(t / "s", "gpt2", shift=3)], {}), "tokenizers of .* differ .*has the id"),
    "sizes": (lambda b, m, t: ([m[0], changed(m[1], t, {"transformer.wpe.weight": torch.ones(3, 12)})], {}), "has the shape"),
    "missing": (lambda b, m, t: ([m[0], changed(m[1], t, {"transformer.ln_f.bias": None})], {}), "lacks 1 .*ln_f.bias"),
    "nan": (
        lambda b, m, t: ([m[0], changed(m[1], t, {"transformer.ln_f.bias": torch.full((12,), torch.nan)})], {}),
        "`transformer.ln_f.bias` of .*x has 12 entries that are nan",
    ),
    "an arc of -1": (lambda b, m, t: (m[:2], {"method": "slerp", "weights": [1.0, -1.0]}), "`weights` of slerp must be"),
    "an arc of 2": (lambda b, m, t: (m[:2], {"method": "slerp", "weights": [2.0, -1.0]}), "`weights` of slerp must be"),
    "new folders": (
        lambda b, m, t: ([m[0], changed(m[1], t, {"transformer.ln_f.bias": torch.full((12,), torch.inf)})],
                         {"out": t / "new" / "er" / "out"}),
        "12 entries that are nan",
    ),
    "other Fishers": (lambda b, m, t: (m, {"method": "fisher", "fishers": others(m, t)}), "another model"),
    "negative Fishers": (lambda b, m, t: (m, {"method": "fisher", "fishers": others(m, t, -1.0)}), "entry below 0"),
}  # fmt: skip


def changed(model: Path, root: Path, new: dict) -> Path:
    """A copy with other tensors, or without."""
    shutil.copytree(model, root / "x")
    stored = {name: x for name, x in {**tensors(model), **new}.items() if x is not None}
    save_file(stored, root / "x" / WEIGHTS, {"format": "pt"})
    return root / "x"


def others(models, root: Path, value: float | None = None) -> list[Path]:
    """Fishers of a model of other shapes, or with a sign that none has."""
    files = diagonals(models, root)
    like = load_file(files[1])
    save_file({n: x[:1].clone() if value is None else value * x for n, x in like.items()}, files[1])
    return files


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_merged_says_so_and_writes_nothing(case, gpt2, tmp_path):
    base, *models = gpt2
    make, message = WRONG[case]
    given, options = make(base, models, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match=message):
        merge_folders(given, **{"out": tmp_path / "out", **options})
    assert sorted(tmp_path.iterdir()) == before


def test_settings_that_differ_are_said(gpt2, tmp_path):
    _, one, *_ = gpt2
    other = folder(tmp_path / "o", "gpt2", layer_norm_epsilon=1e-3)
    with pytest.warns(UserWarning, match="layer_norm_epsilon 1e-05 and 0.001"):
        merge_folders([one, other], out=tmp_path / "out")


def test_the_commands_make_fishers_and_merge_with_them(gpt2, tmp_path, capsys):
    _, *models = gpt2
    data = texts(tmp_path / "t.jsonl")
    files = [str(tmp_path / f"f{k}.safetensors") for k in range(2)]
    for model, file in zip(models[:2], files, strict=True):
        call = ["fisher", str(model), "--data", data, "--out", file, "--num-samples", "4", "--draws", "2"]
        assert cli.main(call) == 0
    made = json.loads(TensorFile(Path(files[0])).metadata["made"])
    assert (made["texts"], made["draws"], made["data"]) == (4, 2, "t.jsonl")
    assert len(made["weights_sha256"]) == 64
    given = [str(model) for model in models[:2]]
    assert (
        cli.main(["merge", *given, "--method", "fisher", "--fisher", *files, "--out", str(tmp_path / "a"), "--quiet"])
        == 0
    )
    call = ["merge", *given, "--method", "fisher", "--data", data, data, "--num-samples", "4", "--quiet"]
    assert cli.main([*call, "--out", str(tmp_path / "b")]) == 0
    assert "parameters of 2 models" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b") is not None
    assert cli.main([*call, "--out", str(tmp_path / "b")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert (
        cli.main(["merge", *given, "--density", "0", "--method", "ties", "--base", str(models[2]), "--out", "x"]) == 2
    )
    assert "`--density` must be" in capsys.readouterr().err


def test_the_working_directory_and_a_link_are_folders_to_merge_into(gpt2, tmp_path, monkeypatch):
    _, *models = gpt2
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert merge_folders(models, out=".").num_files == 1
    (tmp_path / "link").symlink_to(tmp_path / "there")
    merge_folders(models, out=tmp_path / "link")
    assert all((tmp_path / name / WEIGHTS).is_file() for name in ("here", "there", "link"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "there"]


@pytest.mark.parametrize("what", ["fisher", "inputs"])
def test_nothing_is_measured_over_a_file_or_of_weights_that_are_nan(what, gpt2, tmp_path):
    """The file that is there may be the model itself."""
    _, model, *_ = gpt2
    spec = DataSpec(texts(tmp_path / "t.jsonl"))
    broken = changed(
        model,
        tmp_path,
        {"transformer.wpe.weight": torch.full_like(tensors(model)["transformer.wpe.weight"], torch.nan)},
    )
    before = (broken / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        measure_for_merge(broken, spec, broken / WEIGHTS, what=what)
    assert (broken / WEIGHTS).read_bytes() == before
    with pytest.raises(ValueError, match=r"wpe.weight` of .* nan or infinite"):
        measure_for_merge(broken, spec, tmp_path / "f.safetensors", what=what)
    assert not list(tmp_path.glob("*.safetensors")) + list(tmp_path.glob(".f*"))


@pytest.mark.slow
def test_memory_is_that_of_parts_however_large_the_models(tmp_path):
    """Three models of 400 MB with a table of 256 MB: all methods of entries stay within 150 MB of what they start with."""
    program = """
import resource, sys
import torch, safetensors, transformers
from funcscope.study.merging import merge_folders
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
root = sys.argv[1]
given = [f"{root}/m{k}" for k in range(3)]
merge_folders(given, out=f"{root}/a")
merge_folders(given, base=f"{root}/base", method="ties", out=f"{root}/b")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    shapes = {
        "wte.weight": Shape(torch.float32, (64000, 1000)),
        **{f"h.{i}": Shape(torch.float32, (3000, 3000)) for i in range(4)},
    }
    for k, name in enumerate(("base", "m0", "m1", "m2")):
        with NewTensorFile(tmp_path / name / WEIGHTS, shapes, {"format": "pt"}) as file:
            for leaf, what in shapes.items():
                for at in parts(what):
                    file.write(leaf, torch.linspace(-1, 1 + k, at[1] - at[0]), at[0])
        (tmp_path / name / "config.json").write_text('{"model_type": "gpt2"}')
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150


def test_an_interrupted_command_says_so_and_leaves_nothing(gpt2, tmp_path, monkeypatch, capsys):
    _, *models = gpt2

    def stopped(self, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_leaves.Merger, "merged", stopped)
    assert cli.main(["merge", str(models[0]), str(models[1]), "--out", str(tmp_path / "out"), "--quiet"]) == 130
    assert "interrupted; nothing half-made is left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
