"""`funcscope curvature`: from a folder and a file to a spectrum, blocks and sharpness, whole or interrupted."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from folders import TEXTS, folder, texts, tokenizer
from problems import problem
from scipy.sparse.linalg import eigsh
from torch.testing import assert_close

import funcscope as fs
from funcscope import cli
from funcscope.core.store import load, save
from funcscope.curvature import hessian, hessian_block_eigenvalues, hessian_block_traces, hessian_summary
from funcscope.curvature.ascent_sharpness import sam_sharpness
from funcscope.linalg import to_scipy
from funcscope.study import curvature, curvature_stages, opening
from funcscope.study import numbers as plain
from funcscope.study.curvature import run
from funcscope.study.curvature_stages import STAGES, Settings
from funcscope.study.unfinished import reusable, unfinished

FEW = {
    "num_samples": 6, "max_seq_length": 8, "batch_size": 3, "num": 2, "probes": 3, "steps": 8, "trace_products": 12,
    "block_products": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """A study without interruption."""
    return run(Settings(data, **FEW), model, tmp_path_factory.mktemp("whole"), quiet=True)


@pytest.fixture(scope="module")
def loss():
    """The same loss without the study: the catalogue's model, texts tokenised one by one."""
    words = tokenizer()
    rows = [words(text, truncation=True, max_length=8)["input_ids"] for text in TEXTS[:6]]
    net = fs.functional(problem("gpt2", torch.float32).model)
    return fs.objective(net, [{"input_ids": torch.tensor([row])} for row in rows], fs.causal_lm)


def test_the_numbers_are_those_of_the_pure_functions(whole, loss):
    wanted = hessian_summary(
        loss, loss.net.theta, key=fs.key(42), num=2, num_probes=3, steps=8, trace_matvecs=12
    )  # fmt: skip
    assert_close(whole.summary.ends.values, wanted.ends.values, rtol=1e-3, atol=1e-4)
    assert float(whole.summary.trace.value) == pytest.approx(float(wanted.trace.value), rel=1e-3)
    assert float(whole.summary.trace.stderr) == pytest.approx(float(wanted.trace.stderr), rel=1e-2)
    points = wanted.density.grid(50)
    for got, right in zip(whole.summary.density.density(points), wanted.density.density(points), strict=True):
        assert_close(got, right, rtol=1e-2, atol=1e-3 * float(right.max()))
    assert whole.summary.condition_number == pytest.approx(wanted.condition_number, rel=1e-2)
    assert whole.summary.num_matvecs == sum(
        stage["products"] for name, stage in whole.meta["cost"]["stages"].items() if not name.startswith("block")
    )


def test_the_eigenvalues_are_those_of_arpack(whole, loss):
    matvec = to_scipy(hessian(loss, loss.net.theta), loss.net.theta)
    start = np.ones(loss.layout.num)
    wanted = np.concatenate([np.sort(eigsh(matvec, 2, which=end, v0=start)[0])[::-1] for end in ("LA", "SA")])
    found = whole.summary.ends
    assert (np.abs(found.values.numpy() - wanted) <= found.residuals.numpy() + 1e-4 * wanted.max()).all()


def test_the_eigenvalues_have_the_errors_over_texts_of_the_pure_function(whole, loss):
    arrays = load(whole.numbers).arrays
    theta, key = loss.net.theta, whole.summary.key
    pairs = fs.eigenpairs(
        fs.hessian(loss, theta),
        theta,
        key=fs.fold_in(key, "ends"),
        num=len(arrays["end_values"]) // 2,
        which="both",
        vectors=True,
    )
    errors = fs.eigenvalue_errors(loss, theta, pairs)
    assert_close(torch.from_numpy(arrays["end_data_stderr"]), errors.stderr, rtol=1e-2, atol=1e-6)
    assert (arrays["end_data_low"] < arrays["end_data_high"]).all()


def test_blocks_are_those_of_the_pure_functions(whole, loss):
    root = fs.key(42)
    traces = hessian_block_traces(loss, loss.net.theta, key=fs.fold_in(root, "block traces"), num=4)
    tops = hessian_block_eigenvalues(
        loss, loss.net.theta, key=fs.fold_in(root, "block eigenvalues"), which="largest", tol=1e-3
    )
    arrays = load(whole.numbers).arrays
    names = whole.meta["stages"]["block_traces"]["names"]
    assert names == list(traces.samples) == list(tops)
    for i, name in enumerate(names):
        np.testing.assert_allclose(arrays["block_trace_samples"][i], traces.samples[name], rtol=1e-2, atol=1e-3)
        assert arrays["block_eigenvalues"][i] == pytest.approx(float(tops[name].values[0]), rel=1e-3, abs=1e-4)
    np.testing.assert_allclose(arrays["block_trace_samples"].sum(0), arrays["hutchinson_samples"], rtol=1e-4, atol=1e-4)
    assert arrays["block_sizes"].sum() == loss.layout.num


def test_sharpness_is_that_of_the_pure_function(whole, loss):
    wanted, told = sam_sharpness(loss, loss.net.theta), whole.meta["stages"]["sharpness"]
    for name in ("absolute", "first_order", "second_order", "stderr", "relative", "relative_stderr"):
        assert told["sam"][name] == pytest.approx(getattr(wanted, name), rel=1e-3), name
    assert told["gradient_norm"] == pytest.approx(wanted.gradient_norm, rel=1e-5)
    assert told["critical"]["low"] <= told["critical"]["value"] <= told["critical"]["high"]
    half = told["average"]["epsilon"] ** 2 / 2 / loss.layout.num
    assert told["average"]["second_order"] == pytest.approx(half * float(whole.summary.trace.value))


def test_what_is_stored_is_read_back(whole):
    stored = load(whole.numbers)
    assert stored.meta == whole.meta
    assert json.loads(whole.numbers.with_suffix(".json").read_text())["meta"] == stored.meta
    assert stored.meta["kind"] == "curvature"
    values = stored.meta["models"][0]["values"]
    assert values["max_eigenvalue"] == stored.arrays["end_values"][0] == whole.summary.max_eigenvalue
    assert values["trace"] == pytest.approx(stored.arrays["trace_samples"].mean())
    assert {path.name for path in whole.numbers.parent.iterdir()} == {"gpt2-curvature.npz", "gpt2-curvature.json"}


def _interrupted_at(monkeypatch, stage):
    """After a product of this stage, if it has any."""
    real = STAGES[stage]

    def cut(work, parts):
        work.tick = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
        if stage == "sharpness":
            raise KeyboardInterrupt
        return real(work, parts)

    monkeypatch.setitem(curvature_stages.STAGES, stage, cut)


@pytest.mark.slow
def test_an_interrupted_study_goes_on_from_every_stage_and_ends_with_the_same_numbers(
    whole, model, data, tmp_path, monkeypatch
):
    ended = []
    for name, real in list(STAGES.items()):

        def watched(work, parts, name=name, real=real):
            made = real(work, parts)
            ended.append(name)
            return made

        monkeypatch.setitem(STAGES, name, watched)
    for number, stage in enumerate(STAGES):
        with monkeypatch.context() as patch:
            _interrupted_at(patch, stage)
            with pytest.raises(KeyboardInterrupt):
                run(Settings(data, **FEW), model, tmp_path, quiet=True)
        assert len(list(tmp_path.glob("*unfinished.npz"))) == number
    parts = run(Settings(data, **FEW), model, tmp_path, quiet=True)
    assert ended == list(STAGES)  # each was made once
    for name, x in load(whole.numbers).arrays.items():
        np.testing.assert_array_equal(load(parts.numbers).arrays[name], x)
    for name in ("stages", "models", "settings"):
        assert parts.meta[name] == whole.meta[name]
    costs = parts.meta["cost"]["stages"], whole.meta["cost"]["stages"]
    assert [{k: v["products"] for k, v in cost.items()} for cost in costs] == [
        {k: v["products"] for k, v in costs[1].items()}
    ] * 2
    assert not list(tmp_path.glob("*unfinished*"))


@pytest.mark.parametrize("change", [{"seed": 7}, {"matrix": "ggn"}, "weights"])
def test_stages_of_other_settings_or_weights_are_not_taken_over(change, data, tmp_path, monkeypatch):
    model = folder(tmp_path / "gpt2")
    made, real = [], STAGES["ends"]
    monkeypatch.setitem(STAGES, "ends", lambda work, parts: made.append(work) or real(work, parts))
    _interrupted_at(monkeypatch, "trace")
    for num, settings in ((1, FEW), (1, FEW), (2, FEW if change == "weights" else {**FEW, **change})):
        if num == 2 and change == "weights":
            shutil.rmtree(model)
            folder(model, scale=1.0001)
        with pytest.raises(KeyboardInterrupt):
            run(Settings(data, blocks=False, **settings), model, tmp_path, quiet=True)
        assert len(made) == num


def test_a_part_needs_the_same_loss_too(tmp_path):
    part = unfinished(tmp_path, "a", "ends")
    save(part, {}, {"seed": 1, "baseline": 2.0, "more": 3})
    assert reusable(part, {"seed": 1, "baseline": 2.0 + 1e-7}, 1e-6) is not None
    assert reusable(part, {"seed": 1, "baseline": 2.001}, 1e-6) is None
    assert reusable(part, {"seed": 2, "baseline": 2.0}, 1e-6) is None
    assert reusable(unfinished(tmp_path, "a", "trace"), {"baseline": 2.0}, 1e-6) is None


def test_the_gauss_newton_matrix_has_no_negative_eigenvalues_and_blocks_may_be_left_out(model, data, tmp_path):
    fewer = FEW | {"num": 1, "probes": 2, "steps": 4, "trace_products": 4}
    study = run(Settings(data, matrix="ggn", blocks=False, keep=False, **fewer), model, tmp_path, quiet=True)
    assert not study.summary.has_negative_eigenvalues
    assert "block_trace_samples" not in load(study.numbers).arrays
    assert study.meta["stages"]["sharpness"]["average"]["second_order"] is None  # the trace is not the Hessian's


@pytest.mark.slow
def test_less_memory_changes_the_algorithms_and_not_the_numbers(whole, model, data, tmp_path, monkeypatch):
    vectors = 7
    gib = (vectors + 0.5) * 4 * whole.meta["models"][0]["num_parameters"] / 2**30
    asked = {}
    for name in ("eigenpairs", "spectral_density"):
        real = getattr(curvature_stages, name)

        def spy(*args, name=name, real=real, **options):
            asked[name] = options
            return real(*args, **options)

        monkeypatch.setattr(curvature_stages, name, spy)
    study = run(Settings(data, memory=gib, blocks=False, **{**FEW, "trace_products": 64}), model, tmp_path, quiet=True)
    assert bool((study.summary.ends.residuals <= 2e-3 * study.summary.ends.values.abs()).all())
    assert_close(study.summary.ends.values, whole.summary.ends.values, rtol=1e-3, atol=1e-3)
    trace, whole_trace = study.summary.trace, whole.summary.trace
    assert trace.method == "hutchinson"
    assert abs(float(trace.value - whole_trace.value)) < 4 * float(torch.hypot(trace.stderr, whole_trace.stderr))
    assert study.summary.density.num_matvecs == 24
    assert asked["eigenpairs"]["max_basis"] == vectors
    assert asked["spectral_density"]["reorthogonalize"] is False  # 8 steps, 7 vectors
    with pytest.raises(ValueError, match=r"`memory` = .* holds 5 vectors .* `num` = 2 .* need 6"):
        run(Settings(data, memory=gib * 5.5 / 7.5, **FEW), model, tmp_path, quiet=True)


# --- the command ------------------------------------------------------------------------------------------------------

SMALL = [f"--{name.replace('_', '-')}={value}" for name, value in FEW.items()]


def command(*words):
    return cli.main(["curvature", *map(str, words)])


def test_the_command_prints_tables_and_writes_page_and_numbers(model, data, tmp_path, capsys, whole):
    assert command(model, "--data", data, "--out", tmp_path, *SMALL) == 0
    printed = capsys.readouterr()
    out = printed.out
    assert "6 sequences in 2 batches" in out
    top, trace = whole.summary.max_eigenvalue, whole.summary.trace
    for name, value, stderr in (
        ("largest eigenvalue", top, load(whole.numbers).arrays["end_data_stderr"][0]),
        ("trace", float(trace.value), float(trace.stderr)),
    ):
        (line, *_) = [line for line in out.splitlines() if line.startswith(f"{name}  ")]
        assert plain.number(value, 4) in line
        assert plain.number(float(stderr), 2) in line
    sam, average = (whole.meta["stages"]["sharpness"][name] for name in ("sam", "average"))
    assert plain.with_error(sam["absolute"], sam["stderr"]) in out
    assert f"{plain.number(100 * sam['relative'])} ({plain.number(100 * sam['relative_low'])} to " in out
    assert sam["relative_low"] < sam["relative"] < sam["relative_high"]
    assert plain.with_error(average["absolute"], average["stderr_joint"]) in out  # over steps and texts together
    assert max(average["stderr"], average["stderr_sequences"]) <= average["stderr_joint"]
    assert plain.number(2 / top) in out
    assert "forward passes" in printed.err
    assert {path.name for path in tmp_path.iterdir()} == {f"gpt2-curvature.{end}" for end in ("npz", "json", "html")}


def test_an_interrupt_says_what_is_kept(model, data, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        _interrupted_at(patch, "density")
        assert command(model, "--data", data, "--out", tmp_path, "--quiet", *SMALL) == 130
    assert "kept in" in (said := capsys.readouterr().out)
    assert "ends, trace; the same command goes on from there" in said
    _interrupted_at(monkeypatch, "ends")
    assert command(model, "--data", data, "--out", tmp_path / "new", "--quiet", *SMALL) == 130
    assert "no stage was finished yet" in capsys.readouterr().out


def test_a_point_without_gradient_has_a_spectrum_and_says_why_it_has_no_sharpness(data, tmp_path, capsys):
    flat = folder(tmp_path / "flat", scale=0.0)
    assert command(flat, "--data", data, "--out", tmp_path / "out", "--quiet", *SMALL) == 0
    out = capsys.readouterr().out
    assert "SAM is undefined: the gradient's norm is 0" in " ".join(out.split())
    assert re.search("critical sharpness +undefined +.*flat direction", out)
    assert "trace" in out
    page = (tmp_path / "out" / "flat-curvature.html").read_text()
    assert "The sharpness is undefined" in page


def _nan(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] = torch.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--attention", "keep"], "fused attention has no second derivative"),
        (["--num", "100000"], "`--num` = 100000 at each of both ends asks for 200000 eigenvalues of a matrix that has"),
        (["--num", "0"], "`--num` must be an integer of at least 1"),
        (["--trace-products", "1"], "`--trace-products` must be an integer of at least 2"),
        (["--tol", "-1"], "`--tol` must be a finite number above 0"),
        (["--epsilon", "nan"], "`--epsilon` must be a finite number above 0"),
        (["--device", "cuda:7"], "the device 'cuda:7' cannot be used"),
        (["--num-samples", "0"], "`--num-samples` must be an integer"),
        (["nan"], "the loss at the weights is nan"),
        (["missing"], "only local folders are read"),
    ],
)
def test_bad_input_is_one_clear_line(words, said, model, data, tmp_path, capsys):
    if words == ["nan"]:
        model, words = folder(tmp_path / "gpt2"), []
        _nan(model)
        capsys.readouterr()
    elif words == ["missing"]:
        model, words = tmp_path / "nowhere", []
    assert command(model, "--data", data, "--out", tmp_path / "out", "--quiet", *words) == 2
    printed = capsys.readouterr()
    assert said in printed.err, printed.err
    assert printed.err.count("\n") == 1, printed.err
    assert printed.out == ""


def test_a_product_that_is_not_finite_is_a_line_too(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(curvature_stages.MATRICES, "hessian", lambda loss, theta, keep: lambda v: v * torch.nan)
    assert command(model, "--data", data, "--out", tmp_path, "--quiet", *SMALL) == 2
    assert "product 1 has" in capsys.readouterr().err


def test_texts_are_cut_at_64_tokens_unless_asked(monkeypatch, model, data, tmp_path):
    asked = []
    monkeypatch.setattr(opening, "make_batches", lambda *_, max_seq_length, **__: asked.append(max_seq_length) or 1 / 0)
    monkeypatch.setattr(opening, "max_positions", lambda _: 1000)
    for length in (None, 70):
        with pytest.raises(ZeroDivisionError):
            run(Settings(data, max_seq_length=length), model, tmp_path, quiet=True)
    assert asked == [curvature.LENGTH, 70] == [64, 70]
