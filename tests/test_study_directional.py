"""`funcscope directional`: from a folder and a file to numbers, whole or interrupted, one model or two."""

import json
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from folders import TEXTS, folder, texts, tokenizer
from problems import problem
from torch.testing import assert_close

import funcscope as fs
from funcscope import cli
from funcscope.core.store import load
from funcscope.landscape import directional as landscape
from funcscope.landscape.directional import Sampling
from funcscope.study import directional, opening
from funcscope.study.directional import Settings, run
from funcscope.study.record import file_stem

FEW = {"num_samples": 8, "max_seq_length": 8, "batch_size": 3, "n_samples": 5}
QUICK = FEW | {"curvature": "none", "slopes": False}


@pytest.fixture
def model(tmp_path):
    return folder(tmp_path / "gpt2")


@pytest.fixture
def data(tmp_path):
    return texts(tmp_path / "texts.jsonl")


def by_hand(model, num_texts, **options):
    """The same numbers without the study: the catalogue's model, texts tokenised one by one."""
    words = tokenizer()
    rows = [words(text, truncation=True, max_length=8)["input_ids"] for text in TEXTS[:num_texts]]
    loss = fs.objective(fs.functional(model), [{"input_ids": torch.tensor([row])} for row in rows], fs.causal_lm)
    return fs.directional_losses(
        loss, loss.net.params, key=fs.key(42), span=0.1, two_sided=True, compute_gradient=True, compute_curvature=True,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(("curvature", "num_texts", "num"), [("difference", 8, 5), ("exact", 4, 2)])
def test_the_numbers_are_those_of_the_model_on_the_texts(model, data, tmp_path, curvature, num_texts, num):
    settings = FEW | {"num_samples": num_texts, "n_samples": num, "curvature": curvature}
    study = run(Settings(data, **settings), model, tmp_path / "out", quiet=True)
    wanted = by_hand(problem("gpt2", torch.float32).model, num_texts, n_samples=num, curvature=curvature)
    stored = load(study.numbers)
    for name in ("losses", "losses_negative", "slopes", "curvatures"):
        assert_close(torch.from_numpy(stored.arrays[name]), getattr(wanted, name), rtol=1e-4, atol=2e-3)
    assert stored.meta["models"][0]["values"]["baseline_loss"] == pytest.approx(wanted.baseline_loss, rel=1e-6)
    assert stored.meta["kind"] == "directional"
    assert study.comparison is None
    assert stored.meta["data"]["num_samples"] == num_texts
    assert stored.meta["data"]["num_batches"] == -(-num_texts // 3)
    assert stored.meta["models"][0]["class"] == "GPT2LMHeadModel"
    assert json.loads(study.numbers.with_suffix(".json").read_text())["meta"] == stored.meta


def test_what_is_not_asked_for_is_not_computed(model, data, tmp_path):
    study = run(Settings(data, curvature="none", slopes=False, **FEW), model, tmp_path / "out", quiet=True)
    assert load(study.numbers).arrays.keys() == {"losses", "losses_negative", "direction_norms"}
    assert study.results[0].num_gradients == study.results[0].num_jvps == 0


@pytest.mark.parametrize("name", ["qwen2", "bert"])  # the masks of the others: tests/test_families.py
def test_other_families_run_from_their_folder(name, data, tmp_path):
    study = run(Settings(data, **FEW), folder(tmp_path / name, name), tmp_path / "out", quiet=True)
    assert study.results[0].losses.isfinite().all()
    task = load(study.numbers).meta["data"]["task"]
    assert task == ("masked" if name == "bert" else "causal")


def test_half_precision_and_the_compute_dtype_reach_the_result(model, data, tmp_path):
    half = run(Settings(data, dtype="bfloat16", **FEW), model, tmp_path / "half", quiet=True).results[0]
    wide = run(
        Settings(data, dtype="bfloat16", compute_dtype="float32", **FEW),
        model,
        tmp_path / "wide",
        quiet=True,
    )
    assert half.realised is not None
    assert wide.results[0].realised is None
    described = load(wide.numbers).meta["models"][0]
    assert (described["dtype"], described["compute_dtype"]) == ("torch.bfloat16", "torch.float32")
    assert_close(half.losses, wide.results[0].losses, rtol=1e-2, atol=1e-2)


class Interrupted:
    """Sampling.rows that is interrupted after some chunks."""

    def __init__(self, monkeypatch, after):
        self.rows, self.after, self.firsts = Sampling.rows, after, []
        monkeypatch.setattr(Sampling, "rows", lambda sampling, first=0: self(sampling, first))

    def __call__(self, sampling, first):
        self.firsts.append(first)
        for number, row in enumerate(self.rows(sampling, first)):
            if self.after is not None and number == self.after:
                raise KeyboardInterrupt
            yield row


def test_an_interrupted_study_goes_on_and_ends_with_the_same_bits(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(landscape, "CHUNKED_UP_TO", 0)  # one direction at a time
    settings = Settings(data, **FEW)
    whole = load(run(settings, model, tmp_path / "whole", quiet=True).numbers)
    watched = Interrupted(monkeypatch, after=2)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(settings, model, tmp_path / "parts", quiet=True)
    watched.after = None
    parts = load(run(settings, model, tmp_path / "parts", quiet=True).numbers)
    assert watched.firsts == [0, 2, 4]
    assert all(np.array_equal(parts.arrays[name], whole.arrays[name]) for name in whole.arrays)
    assert parts.meta["models"] == whole.meta["models"]
    assert not list((tmp_path / "parts").glob("*unfinished*"))


@pytest.mark.parametrize(
    ("change", "scale", "dtype"),
    [({"span": 0.2}, 1.0, "auto"), ({"seed": 7}, 1.0, "auto"), ({"num_samples": 6}, 1.0, "auto"), ({}, 1.5, "auto"),
     ({}, 1.0001, "bfloat16")],  # in half precision another model may have the same loss up to rounding: its files tell
)  # fmt: skip
def test_samples_of_other_settings_or_weights_are_not_taken_over(data, tmp_path, monkeypatch, change, scale, dtype):
    monkeypatch.setattr(landscape, "CHUNKED_UP_TO", 0)
    watched, model = Interrupted(monkeypatch, after=2), folder(tmp_path / "gpt2")
    with pytest.raises(KeyboardInterrupt):
        run(Settings(data, dtype=dtype, **QUICK), model, tmp_path / "out", quiet=True)
    watched.after = None
    if scale != 1:
        shutil.rmtree(model)
        folder(model, scale=scale)
    run(Settings(data, dtype=dtype, **{**QUICK, **change}), model, tmp_path / "out", quiet=True)
    assert watched.firsts == [0, 0]


def test_an_interrupt_in_the_second_model_keeps_the_first(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(landscape, "CHUNKED_UP_TO", 0)
    other = folder(tmp_path / "scaled", scale=1.5)
    watched = Interrupted(monkeypatch, after=None)
    sampled = directional._sampled

    def second(*args):
        watched.after = 2 if args[4] == "scaled" else None
        return sampled(*args)

    monkeypatch.setattr(directional, "_sampled", second)
    with pytest.raises(KeyboardInterrupt):
        run(Settings(data, **QUICK), model, tmp_path / "out", other=other, quiet=True)
    monkeypatch.setattr(directional, "_sampled", sampled)
    watched.after = None
    run(Settings(data, **QUICK), model, tmp_path / "out", other=other, quiet=True)
    assert watched.firsts == [0, 0, 5, 2]


def test_padding_ids_may_differ_between_paired_models_and_labels_may_not(data, tmp_path):
    first, second = folder(tmp_path / "a", pad_token_id=0), folder(tmp_path / "b", scale=1.2, pad_token_id=1)
    words = tokenizer()
    words.pad_token = "[EOS]"
    words.save_pretrained(second)
    assert run(Settings(data, **QUICK), first, tmp_path / "out", other=second, quiet=True).comparison is not None
    one, two = (folder(tmp_path / name, "bert") for name in ("c", "d"))
    words = tokenizer()
    words.mask_token = "[UNK]"
    words.save_pretrained(two)
    with pytest.raises(ValueError, match=r"make different tokens"):
        run(Settings(data, **QUICK), one, tmp_path / "out", other=two, quiet=True)


def test_a_damaged_rest_of_an_interrupted_study_is_made_again(model, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gpt2.1.unfinished.npz").write_bytes(b"PK\x03\x04 cut short")
    assert run(Settings(data, **QUICK), model, tmp_path / "out", quiet=True).results[0].n_samples == 5


def test_two_models_are_paired_on_the_same_draws(model, data, tmp_path):
    other = folder(tmp_path / "scaled", scale=1.5)
    study = run(Settings(data, **FEW), model, tmp_path / "out", other=other, quiet=True)
    alone = [run(Settings(data, **FEW), one, tmp_path / "one", quiet=True).results[0] for one in (model, other)]
    assert all(torch.equal(a.losses, b.losses) for a, b in zip(study.results, alone, strict=True))
    stored = load(study.numbers)
    assert study.numbers.name == "gpt2-vs-scaled.npz"
    assert [described["name"] for described in stored.meta["models"]] == ["gpt2", "scaled"]
    assert np.array_equal(stored.arrays["second_curvatures"], alone[1].curvatures.numpy())
    gap = float((alone[1].curvatures - alone[0].curvatures).mean())
    assert stored.meta["comparison"]["curvature_mean_difference"] == pytest.approx(gap, rel=1e-12)


def test_models_without_common_directions_or_tokens_are_refused(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(directional, "prepare", None)  # before any sample is taken
    with pytest.raises(ValueError, match=r"cannot be paired: \d+ parameters are in one of them only.*once for each"):
        run(Settings(data, **FEW), model, tmp_path / "out", other=folder(tmp_path / "llama", "llama"), quiet=True)
    with pytest.raises(ValueError, match=r"tokenizers of .* make different tokens.*same tokenizer"):
        run(Settings(data, **FEW), model, tmp_path / "out", other=folder(tmp_path / "moved", shift=5), quiet=True)


def test_results_of_another_folder_of_the_same_name_are_not_overwritten(data, tmp_path):
    first, second = folder(tmp_path / "a" / "model"), folder(tmp_path / "b" / "model", scale=1.5)
    made = [
        run(Settings(data, **QUICK), one, tmp_path / "out", quiet=True).numbers
        for one in (first, second, first, second)
    ]
    assert [path.name for path in made] == ["model.npz", "model-2.npz"] * 2
    sources = [load(path).meta["models"][0]["folder"] for path in made[:2]]
    assert sources == [str(first.resolve()), str(second.resolve())]


def test_names_are_safe_and_different(tmp_path):
    first, second = folder(tmp_path / "a" / "model"), folder(tmp_path / "b" / "model")
    assert opening.names_of([first, second]) == ["a-model", "b-model"]
    assert opening.names_of([first, first]) == ["a-model-1", "a-model-2"]
    assert opening.names_of([first / ".." / ".." / "b" / "model"]) == ["model"]
    assert file_stem("x/../../etc/passwd") == "x-..-..-etc-passwd"
    assert "/" not in file_stem("a\x00/\\b")


# --- the command ------------------------------------------------------------------------------------------------------


def command(*words):
    return cli.main(["directional", *map(str, words)])


@pytest.fixture(autouse=True)
def _half_precision_warns():
    """Warnings are shown by the command, not raised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("default", message="span .* in half precision", category=UserWarning)
        yield


SMALL = ["--num-samples", 8, "--max-seq-length", 8, "--samples", 4, "--quiet"]


def test_the_command_prints_a_table_and_writes_page_and_numbers(model, data, tmp_path, capsys):
    assert command(model, "--data", data, "--out", tmp_path / "out", *SMALL) == 0
    printed = capsys.readouterr().out
    assert "curvature_mean" in printed
    assert "8 sequences in 1 batch" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpt2.npz", "gpt2.json", "gpt2.html"}


def test_the_command_compares(model, data, tmp_path, capsys):
    other = folder(tmp_path / "scaled", scale=1.5)
    assert command(model, "--data", data, "--compare", other, "--out", tmp_path / "out", *SMALL) == 0
    printed = capsys.readouterr().out
    assert "scaled - gpt2, paired over 4" in printed
    assert "Wilcoxon" in printed
    assert (tmp_path / "out" / "gpt2-vs-scaled.html").exists()


def test_progress_is_shown_and_an_interrupt_says_what_is_kept(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(landscape, "CHUNKED_UP_TO", 0)
    Interrupted(monkeypatch, after=2)
    assert command(model, "--data", data, "--out", tmp_path / "out", *SMALL[:-1]) == 130
    printed = capsys.readouterr()
    assert "2/4" in printed.err
    assert "the same command goes on from there" in printed.out
    assert (tmp_path / "out" / "gpt2.1.unfinished.npz").exists()


def test_a_warning_is_a_line_without_code(model, data, tmp_path, capsys):
    assert command(model, "--data", data, "--out", tmp_path, "--dtype", "bfloat16", "--span", 0.001, *SMALL) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "half precision" in line]
    assert len(lines) == 1
    assert lines[0].startswith("funcscope: span 0.001 in half precision")


def _without(pattern):
    return lambda folder, data: [path.unlink() for path in folder.glob(pattern)]


def _config(**changes):
    def edit(folder, data):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _cut(folder, data):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(folder, data):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _text(content):
    return lambda folder, data: data.write_text(content)


MISTAKES = {
    "missing folder": (lambda folder, data: shutil.rmtree(folder), "only local folders are read"),
    "no weights": (_without("*.safetensors"), "weights"),
    "no tokenizer": (_without("tokenizer*"), "tokenizer"),
    "unknown family": (_config(model_type="frobnicate"), "frobnicate"),
    "empty data": (_text(""), "empty"),
    "not JSON": (_text('{"text": "w4 w5"}\nnot json\n'), "line 2"),
    "missing field": (_text('{"story": "w4 w5"}\n'), "'story'"),
    "short texts": (_text('{"text": "w4"}\n{"text": ""}\n'), "two tokens"),
    "pickle": (_pickled, "pickle"),
    "truncated safetensors": (_cut, "safetensors"),
    "large tokenizer": (lambda folder, data: _big(folder), "rows"),
}


def _big(folder):
    words = tokenizer()
    words.add_tokens([f"new{i}" for i in range(5)])
    words.save_pretrained(folder)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input_is_one_clear_line(mistake, model, data, tmp_path, capsys):
    harm, word = MISTAKES[mistake]
    harm(model, tmp_path / "texts.jsonl")
    assert command(model, "--data", data, "--out", tmp_path / "out", *SMALL) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("funcscope: ")
    assert word in printed.err, printed.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no/such/../model"], ".."),
        (["--samples", "0"], "`--samples` must be an integer of at least 1"),
        (["--span", "-1", "--max-seq-length", "8"], "`--span` must be a finite number above 0"),
        (["--device", "cuda:7"], "the device 'cuda:7' cannot be used"),
        (["--attention", "keep", "--curvature", "exact"], "no second derivative"),
        (["--max-seq-length", "1000"], "`--max-seq-length` is 1000, and the GPT2LMHeadModel has 16 positions"),
        (["--span", "1e-200"], "`--span` must have a square that is not 0"),
    ],
)
def test_bad_options_are_one_clear_line(words, said, model, data, tmp_path, capsys):
    first = [] if not words[0].startswith("--") else [model]
    assert command(*first, *words, "--data", data, "--out", tmp_path / "out", "--quiet") == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1, printed.err


def test_a_model_shorter_than_the_default_needs_no_option(model, data, tmp_path, capsys):
    assert command(model, "--data", data, "--out", tmp_path / "out", "--samples", 2, "--quiet") == 0
    assert "24 sequences" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ImportError("no pyarrow"), RuntimeError("out of\nmemory"), MemoryError()])
def test_what_goes_wrong_inside_is_a_line_too(error, model, data, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        error.add_note("take a smaller batch")
        raise error

    monkeypatch.setattr(directional, "run", fail)
    assert command(model, "--data", data, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "take a smaller batch" in printed


def test_an_interrupt_before_the_first_sample_says_so(model, data, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(directional, "run", interrupt)
    assert command(model, "--data", data, "--out", tmp_path / "out") == 130
    assert "nothing was sampled yet" in capsys.readouterr().out


def test_a_family_whose_masks_are_not_known_is_told_what_to_pass(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(opening, "family_of", lambda _: None)
    assert command(model, "--data", data, "--out", tmp_path / "out", *SMALL) == 2
    assert "--attention keep" in capsys.readouterr().err
    assert command(model, "--data", data, "--out", tmp_path / "out", "--attention", "keep", *SMALL) == 0


def test_plotly_is_asked_for_before_any_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setattr(cli.shared.importlib.util, "find_spec", lambda name: None)
    assert command(tmp_path, "--data", "x.txt") == 2
    assert "pip install 'funcscope[view]'" in capsys.readouterr().err
