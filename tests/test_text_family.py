"""Models of prose and code: texts that nobody made up, folders that everything reads, training that can be interrupted."""

import dataclasses
import html
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import seeded

import funcscope as fs
from funcscope import cli
from funcscope.core.store import Damaged
from funcscope.families import text
from funcscope.families.text import texts, training
from funcscope.gradients.influential_texts import SPACES
from funcscope.study import text_demo
from funcscope.study.inputs.pretrained import load_model, load_tokenizer
from funcscope.study.results import Results

TINY = text.Config(
    hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=1, length=24, train_bytes=6000,
    heldout_bytes=2000, batch_size=4, steps=4, tuning_steps=2,
)  # fmt: skip
SETTINGS = text_demo.TextSettings(TINY, num_samples=3, num_windows=6, n_samples=2)
SOURCE = '''# A comment.
"""The module: what it says of itself, at the length that is needed to count as a text."""

def double(x):
    """Twice the number.

    >>> double(2), double("some more text, so that it would be long enough to count")
    (4, ...)
    """
    # not said
    return x + x  # said


class Pair:
    "Short."
    first, second = "a string that is long enough", "and another one, which is that, too"
'''


@pytest.fixture(autouse=True)
def small_states(monkeypatch):
    monkeypatch.setattr(training, "EVERY", 2)
    monkeypatch.setattr(training, "SCORED", 8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The tiny models, trained without interruption."""
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "EVERY", 2)
        patch.setattr(training, "SCORED", 8)
        points = list(text.train(TINY, folder))
    return folder, points


def with_texts(whole, folder) -> Path:
    """A new folder with the texts of the other one: to read the standard library again takes seconds."""
    for split in texts.SPLITS:
        shutil.copytree(whole[0] / split, folder / split)
    return folder


def stored(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_prose_is_what_docstrings_say_and_code_is_the_rest():
    made = text.texts_of(SOURCE)
    assert made.prose == ["The module: what it says of itself, at the length that is needed to count as a text."]
    (code,) = made.code
    assert "return x + x  # said" in code
    for absent in ("comment", "not said", "Twice", "Short", "itself"):
        assert absent not in code
    assert text.texts_of("x = 1\n") == ([], [])


def test_pieces_of_code_are_whole_lines_and_lose_nothing():
    lines = [f"value_{i} = {i} * 'é'" for i in range(500)]
    pieces = text.texts_of("\n".join(lines)).code
    assert "".join(pieces) == "\n".join(lines) + "\n"
    assert all(64 <= len(piece.encode()) <= 1024 for piece in pieces)


@pytest.mark.slow
def test_texts_are_of_the_standard_library_and_no_module_is_in_both_splits(whole):
    folder, _ = whole
    rows = {
        (split, kind): [json.loads(line) for line in (folder / split / f"{kind}.jsonl").read_text().splitlines()]
        for split in texts.SPLITS
        for kind in text.KINDS
    }
    of = {split: {row["module"] for kind in text.KINDS for row in rows[split, kind]} for split in texts.SPLITS}
    assert of["train"]
    assert of["heldout"]
    assert not of["train"] & of["heldout"]
    for (split, kind), each in rows.items():
        size = sum(len(row["text"].encode()) for row in each)
        most = TINY.train_bytes if split == "train" else TINY.heldout_bytes
        assert 0.3 * most < size <= most, (split, kind)


def test_modules_are_read_in_the_encoding_that_they_say_and_in_order(tmp_path):
    said = "Die Länge eines Textes, in Zeichen gezählt, und nicht in Bytes, was größer wäre."
    (tmp_path / "b.py").write_bytes(f'# -*- coding: latin-1 -*-\n"""{said}"""\n'.encode("latin-1"))
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "_sysconfigdata_here.py").write_text("built = {}\n")
    (tmp_path / "package").mkdir()
    assert list(text.modules(tmp_path)) == [("a", texts.Texts([], [])), ("b", texts.Texts([said], []))]


def test_another_seed_holds_out_other_modules_and_a_python_without_sources_is_refused():
    found = {f"m{i}": texts.Texts([f"prose {i} " * 40] * 5, [f"code {i} " * 40] * 5) for i in range(20)}
    of = [texts.selected(dataclasses.replace(TINY, seed=seed), found)["heldout"]["code"] for seed in (0, 1)]
    assert {name for name, _ in of[0]} != {name for name, _ in of[1]}
    assert of[0] == texts.selected(TINY, dict(reversed(found.items())))["heldout"]["code"]
    with pytest.raises(
        ValueError, match=r"there are 0 bytes of prose for the heldout data, and at least 192 are needed"
    ):
        texts.selected(TINY, {})


def test_folders_are_those_of_hugging_face_and_a_token_is_a_byte(whole):
    folder, _ = whole
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = "Two é words,\n\tx = y_0\t€ 1234 \x00 <|end|>"
    for name in text.NAMES:
        model, tokenizer = (
            load_model(folder / name),
            AutoTokenizer.from_pretrained(folder / name, local_files_only=True),
        )
        ids = tokenizer(said.removesuffix("<|end|>"))["input_ids"]
        assert ids == list(said.removesuffix("<|end|>").encode())
        assert tokenizer.decode(ids) == said.removesuffix("<|end|>")
        assert tokenizer(said)["input_ids"][-1] == 256 == tokenizer.eos_token_id
        assert len(load_tokenizer(folder / name, model)) == 257
        theirs = AutoModelForCausalLM.from_pretrained(folder / name, local_files_only=True)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), theirs.parameters(), strict=True))


def test_held_out_losses_are_those_that_a_study_measures(whole):
    folder, _ = whole
    for name in text.NAMES:
        for kind in text.KINDS:
            data = fs.UnifiedConfig(dataset_name=str(folder / "heldout" / f"{kind}.jsonl"), num_samples=8).tasks()
            subject = fs.Pretrained(str(folder / name), data, length=TINY.length).open()
            measured = float(subject.loss("data")(subject.theta))
            assert text.losses(folder)[name][kind] == pytest.approx(measured, rel=1e-5)


def test_a_batch_is_windows_of_both_kinds_and_the_untrained_model_knows_nothing_of_them(whole):
    folder, _ = whole
    streams = [training._stream(text.read(folder / "train" / f"{kind}.jsonl")) for kind in text.KINDS]
    rows = training._batch(fs.key(0), streams, TINY)
    assert rows.shape == (4, 24)
    joined = ["".join(f"{t:04d}" for t in stream.tolist()) for stream in streams]
    assert ["".join(f"{t:04d}" for t in row.tolist()) in joined[i // 2] for i, row in enumerate(rows)] == [True] * 4
    assert training._nats(text.make(TINY), rows).item() / rows[:, 1:].numel() == pytest.approx(math.log(257), abs=0.02)


def test_windows_are_those_that_a_model_was_trained_on(whole, tmp_path, monkeypatch):
    seen, step = [], training._step

    def watched(model, optimiser, rows, rate):
        seen.extend(map(tuple, rows.tolist()))
        return step(model, optimiser, rows, rate)

    monkeypatch.setattr(training, "_step", watched)
    list(text.train(TINY, with_texts(whole, tmp_path)))
    rows = {"base": seen[:16], "prose": seen[16:24], "code": seen[24:]}
    encode = text.tokenizer().encode
    for name, each in rows.items():
        every = [tuple(encode(said).ids) for said in text.windows(name, TINY, tmp_path, 100)]
        assert sorted(every) == sorted(each)
        assert every[:5] == [tuple(encode(said).ids) for said in text.windows(name, TINY, tmp_path, 5)]
        assert every != each  # in a random order
    with pytest.raises(ValueError, match="`name` must be one of 'base', 'prose', 'code', got 'both'"):
        text.windows("both", TINY, tmp_path, 5)
    with pytest.raises(ValueError, match="`num` must be an integer of at least 1"):
        text.windows("base", TINY, tmp_path, 0)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted_and_resumed_is_the_uninterrupted_run_byte_for_byte(whole, tmp_path, stop):
    folder, points = whole
    assert [(p.model, p.step) for p in points] == [("base", 2), ("base", 4), ("prose", 2), ("code", 2)]
    run = text.train(TINY, with_texts(whole, tmp_path))
    for _ in range(stop):
        next(run)
    run.close()
    assert stored(tmp_path) != stored(folder)
    list(text.train(TINY, tmp_path))
    assert stored(tmp_path) == stored(folder)
    assert not list(tmp_path.rglob("*.tmp"))


def test_finished_models_are_reused_and_nothing_global_moves(whole, tmp_path):
    folder, _ = whole
    before, threads = stored(folder), torch.get_num_threads()
    next(text.train(TINY, with_texts(whole, tmp_path / "begun")))
    assert torch.get_num_threads() == threads
    torch.set_num_threads(threads + 1)  # the bits do not depend on it
    assert list(text.train(TINY, folder)) == []
    assert stored(folder) == before
    again = seeded(99, lambda: list(text.train(TINY, with_texts(whole, tmp_path / "anew"))))
    assert stored(tmp_path / "anew") == before
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert again


def test_a_missing_model_is_made_again_from_the_texts_that_are_there(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "code")
    list(text.train(TINY, tmp_path / "copy"))
    assert stored(tmp_path / "copy") == stored(folder)


def test_folders_of_other_settings_other_texts_and_changed_weights_are_refused(whole, tmp_path):
    folder, _ = whole
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with pytest.raises(ValueError, match=r"base.training.json is of another configuration: choose a new folder"):
        list(text.train(dataclasses.replace(TINY, seed=1), copy))
    weights = copy / "prose" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Damaged, match=r"prose.model.safetensors is not as it was after training: delete the folder"):
        list(text.train(TINY, copy))
    (copy / "base" / "training.json").write_text("{")
    with pytest.raises(Damaged, match=r"base.training.json is damaged"):
        list(text.train(TINY, copy))
    shutil.rmtree(copy)
    shutil.copytree(folder, copy)
    with (copy / "train" / "code.jsonl").open("a") as file:
        file.write('{"text": "more", "module": "mine"}\n')
    with pytest.raises(ValueError, match="is of other texts"):
        list(text.train(TINY, copy))


def test_a_damaged_state_is_said_to_be_one(whole, tmp_path):
    run = text.train(TINY, with_texts(whole, tmp_path))
    next(run)
    run.close()
    (state,) = tmp_path.rglob("training.safetensors")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(Damaged, match=r"base.training.safetensors is damaged .* delete it"):
        list(text.train(TINY, tmp_path))
    state.unlink()
    list(text.train(TINY, tmp_path))


@pytest.mark.slow
def test_importing_the_family_imports_no_transformers():
    code = "import sys, funcscope.families.text; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.slow
def test_the_demo_measures_every_model_on_both_and_writes_its_page(whole, tmp_path, capsys, monkeypatch):
    with_texts(whole, tmp_path / "new" / TINY.name)
    monkeypatch.setattr(text_demo, "QUICK", SETTINGS)
    few = {"fisher_overlap": {"num": 1}, "cross_task_conflicts": {"num": 19}}
    monkeypatch.setattr(text_demo, "TEXT", {"mean_loss": {}, "loss_comparison": {}, **few})
    call = ["demo", "--family", "text", "--quick", "--out", str(tmp_path / "new")]
    assert cli.main(call) == 0
    out, err = capsys.readouterr()
    results = Results.open(tmp_path / "new")
    assert not results.failed
    of = {
        metric: [o.subject for o in results.outcomes if o.metric == metric]
        for metric in ("mean_loss", "loss_comparison", "fisher_overlap")
    }
    assert [name.rpartition("/")[2] for name in of["mean_loss"]] == [
        f"{m} on {k}" for m in text.NAMES for k in text.KINDS
    ]
    assert len(of["loss_comparison"]) == 4
    assert [name.rpartition("/")[2] for name in of["fisher_overlap"]] == [f"{m} on prose and code" for m in text.NAMES]
    influences = [o for o in results.outcomes if o.metric == "most_influential"]
    assert [o.subject.rpartition("/")[2] for o in influences] == [
        f"{name} on training texts and {kind}" for kind in text.KINDS for name in ("base", kind)
    ]
    for outcome in influences:
        name = outcome.subject.rpartition("/")[2].partition(" ")[0]
        assert outcome.result.num_sequences == 6
        chosen = text.windows(name, TINY, tmp_path / "new" / TINY.name, 6)
        assert {*outcome.result.passages} <= {said.translate(SPACES) for said in chosen}
    for row in ("base on prose", "prose on code", "code on code"):
        assert row in out
    page = (tmp_path / "new" / "text.html").read_text()
    assert "Language models of prose and code" in page
    assert "All are measured on both" in page
    assert len(re.findall("Fine-tuned on (prose|code), the loss changes by", page)) == 2
    assert re.search(
        r"overlap by −?[\d.]+, where 0 is chance.*Gradients of prose and code differ in \d of \d blocks", page
    )
    assert "The training texts are 6 windows that the model was trained on" in page
    assert len(re.findall(r"Leaving a training text out moves the test loss by about [\d.]+", page)) == 4
    plain = html.unescape(page.replace("<wbr>", ""))
    for outcome in influences:
        for said in outcome.result.passages:
            assert "‹{}›".format(said.replace("\n", " ↵ ")) in plain
    assert "training" in err
    assert all(o.reused for o in text_demo.run(SETTINGS, tmp_path / "new", quiet=True).outcomes)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--samples", "0"], "`--samples` must be an integer of at least 1"),
        (["--span", "nan"], "`--span` must be a finite"),
    ],
)
def test_bad_numbers_get_one_clear_line_before_any_training(tmp_path, capsys, args, message):
    assert cli.main(["demo", "--family", "text", "--out", str(tmp_path / "out"), *args]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_seed_is_that_of_the_texts_the_weights_and_the_draws():
    assert text_demo.adjusted(SETTINGS, seed=7, span=None).config.seed == 7
    assert text_demo.adjusted(SETTINGS, seed=7).seed == 7
    assert text_demo.adjusted(SETTINGS) == SETTINGS
    assert text.Config().name != dataclasses.replace(text.Config(), steps=10).name
    with pytest.raises(ValueError, match="`steps` must be an integer of at least 1"):
        text.Config(steps=0)


@pytest.mark.slow
def test_each_fine_tuned_model_is_the_best_on_its_own_task(tmp_path, monkeypatch):
    """The real training: held out, each is better than the base on its own kind of text and worse on the other one."""
    monkeypatch.undo()
    list(text.train(text.Config(), tmp_path))
    after = text.losses(tmp_path)
    for kind, other in (("prose", "code"), ("code", "prose")):
        assert after["base"][kind] < 2.0 < math.log(257)
        assert after[kind][kind] < after["base"][kind] - 0.03
        assert after[kind][other] > after["base"][other]
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < 12_000_000
