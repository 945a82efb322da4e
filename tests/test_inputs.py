"""From files to batches: exact weights and tokens, nothing made up, nothing run, and one clear line for each mistake."""

import inspect
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers as hf
from folders import folder
from folders import tokenizer as words
from hypothesis import given
from hypothesis import strategies as st
from problems import seeded
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch.testing import assert_close
from transformers.utils import logging as hf_logging

import funcscope as fs
from funcscope import cli
from funcscope.study import dataset
from funcscope.study.inputs import Example, load_model, load_tokenizer, make_batches, read_texts, task_of
from funcscope.study.inputs.tokens import max_positions
from funcscope.study.quiet import Turns, one_line

exact = partial(assert_close, rtol=1e-10, atol=1e-12)
TASKS = {"causal": fs.causal_lm, "masked": fs.masked_lm, "classification": fs.classification}


@contextmanager
def complaint(*words, kind=ValueError):
    """Raises this kind of error, in one line that says these words."""
    with pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert len(text) < 600
    assert [word for word in words if word not in text] == [], text


# --- what the tests are made of: tokenizers trained on docstrings, models of two layers -----------------------------


@cache
def corpus():
    found = [inspect.getdoc(x) or "" for module in (textwrap, json, inspect) for x in vars(module).values()]
    return [" ".join(text.split()) for text in found if len(text.split()) > 5][:60]


WORDS = " ".join(corpus()).split()


@cache
def bpe(eos=True):
    """GPT-2's kind: bytes, no token added, no padding token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|end|>"] if eos else [], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>" if eos else None)


@cache
def wordpiece(mask="[MASK]"):
    """BERT's kind: [CLS] text [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        corpus(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token=mask, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def gpt2(kind=hf.GPT2LMHeadModel, **changes):
    config = hf.GPT2Config(
        **{"n_layer": 2, "n_embd": 12, "n_head": 2, "vocab_size": 300, "n_positions": 40, "bos_token_id": 0,
           "eos_token_id": 0, "initializer_range": 0.4, **changes}
    )  # fmt: skip
    return seeded(0, lambda: kind(config)).eval()


def llama():
    config = hf.LlamaConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=300, max_position_embeddings=40, bos_token_id=0, eos_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    return seeded(0, lambda: hf.LlamaForCausalLM(config)).eval()


def gpt_neox():
    """A decoder with an `is_decoder` of false in its settings, which it does not read."""
    config = hf.GPTNeoXConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, vocab_size=300,
        max_position_embeddings=40,
    )  # fmt: skip
    assert config.is_decoder is False
    return seeded(0, lambda: hf.GPTNeoXForCausalLM(config)).eval()


def bert(kind=hf.BertForMaskedLM, **changes):
    config = hf.BertConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, vocab_size=300,
        max_position_embeddings=40, initializer_range=0.4, **changes,
    )  # fmt: skip
    return seeded(0, lambda: kind(config)).eval()


def t5():
    config = hf.T5Config(d_model=12, d_kv=6, d_ff=20, num_layers=1, num_heads=2, vocab_size=300)
    return seeded(0, lambda: hf.T5ForConditionalGeneration(config)).eval()


MODELS = {
    "gpt2": (gpt2, "causal"),
    "llama": (llama, "causal"),
    "gpt_neox": (gpt_neox, "causal"),
    "bert": (bert, "masked"),
    "bert decoder": (partial(bert, hf.BertLMHeadModel, is_decoder=True), "causal"),
    "bert classifier": (partial(bert, hf.BertForSequenceClassification, num_labels=3), "classification"),
    "gpt2 classifier": (
        partial(gpt2, hf.GPT2ForSequenceClassification, num_labels=3, pad_token_id=0),
        "classification",
    ),
}


def saved(folder, model=None, tokenizer=None, **options):
    (model or gpt2()).save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def logits(model):
    ids = torch.arange(18).reshape(2, 9)
    with torch.no_grad():
        return model(input_ids=ids).logits


def edit(path, **changes):
    """A JSON file with some entries changed; None takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_the_saved_one_whole_or_in_shards(name, tmp_path):
    make, task = MODELS[name]
    model = make()
    for part, options in (("whole", {}), ("shards", {"max_shard_size": "10KB"})):
        loaded = load_model(saved(tmp_path / part, model, **options))
        assert (tmp_path / part / "model.safetensors.index.json").exists() == (part == "shards")
        assert type(loaded) is type(model)
        assert task_of(loaded) == task
        assert not any(module.training for module in loaded.modules())
        assert torch.equal(logits(loaded), logits(model))
    assert fs.criterion_of(loaded) is TASKS[task]


def test_a_tied_head_may_be_absent_from_the_file(tmp_path):
    folder = saved(tmp_path)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_model(folder)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_code_of_the_folder_is_not_run_where_transformers_has_the_family(tmp_path):
    folder = saved(tmp_path)
    (folder / "evil.py").write_text("raise SystemExit('remote code was run')")
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert type(load_model(folder)) is hf.GPT2LMHeadModel


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_auto_keeps_the_stored_dtype_whatever_the_settings_say(stored, tmp_path):
    folder = saved(tmp_path, llama().to(stored), max_shard_size="10KB")
    edit(folder / "config.json", dtype="float16" if stored == torch.float32 else "float32")
    assert {param.dtype for param in load_model(folder).parameters()} == {stored}
    assert {param.dtype for param in load_model(folder, dtype="float64").parameters()} == {torch.float64}


def test_mixed_dtypes_are_loaded_in_the_widest_and_old_constants_do_not_count(tmp_path):
    folder = saved(tmp_path, llama().to(torch.bfloat16))
    weights = load_file(folder / "model.safetensors")
    constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    save_file(weights | constant, folder / "model.safetensors", {"format": "pt"})
    assert load_model(folder).dtype == torch.bfloat16
    weights["model.norm.weight"] = weights["model.norm.weight"].float() + 2.0**-20
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_model(folder).model.norm.weight, weights["model.norm.weight"])


def test_pickles_are_read_only_where_allowed_and_run_nothing_even_then(tmp_path):
    model = gpt2().to(torch.bfloat16)
    folder = saved(tmp_path, model)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with complaint("pytorch_model.bin", "pickle", "allow_pickle=True"):
        load_model(folder)
    loaded = load_model(folder, allow_pickle=True)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))

    torch.save({"transformer.wte.weight": Touch(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with complaint("pytorch_model.bin", "damaged"):
        load_model(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the trap was armed
    assert (tmp_path / "ran").exists()


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_loading_prints_nothing_and_leaves_the_settings_of_transformers_alone(tmp_path, capfd):
    folder = saved(tmp_path, bert(hf.BertForPreTraining), wordpiece())
    capfd.readouterr()
    before, logged = hf_logging.get_verbosity(), []
    handler = logging.Handler()
    handler.emit = logged.append
    hf_logging.add_handler(handler)
    hf_logging.set_verbosity_warning()
    try:
        load_tokenizer(folder, load_model(folder, task="masked"))  # with tensors for which it has no use
        with pytest.raises(ValueError, match="lacks"):
            load_model(folder, task="classification")
        assert (capfd.readouterr(), logged) == (("", ""), [])
        assert hf_logging.get_verbosity() == hf_logging.WARNING
        hf.BertForMaskedLM.from_pretrained(folder)
        assert "LOAD REPORT" in logged[0].getMessage()  # what was kept silent
        assert "Loading weights" in capfd.readouterr().err
    finally:
        hf_logging.set_verbosity(before)
        hf_logging.remove_handler(handler)


@pytest.mark.slow
def test_memory_holds_the_weights_once_and_no_network_is_used(tmp_path):
    """Peak resident memory in a process of its own. Negative control: a copied state dict is seen."""
    model = gpt2(n_layer=12, n_embd=512, n_head=8, vocab_size=30000)
    saved(tmp_path, model, max_shard_size="60MB")
    script = """
        import socket, sys
        def refuse(*args): raise RuntimeError("network")
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
        import torch
        from transformers import GPT2LMHeadModel
        from funcscope.study.inputs import load_model
        def peak():  # of this program: `ru_maxrss` starts at that of the process that started it
            status = open("/proc/self/status").read()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        base = peak()
        model = load_model(sys.argv[1])
        size = sum(p.nbytes for p in model.parameters())
        sum(float(p.sum()) for p in model.parameters())
        print((peak() - base) / size)
        copy = {name: value.clone() for name, value in model.state_dict().items()}
        print((peak() - base) / size)
    """
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    once, copied = map(float, done.stdout.split())
    assert 0.9 < once < 1.15
    assert copied > 1.8


def _unlink(name):
    return lambda path: (path / name).unlink()


def _write(name, content):
    return lambda path: (path / name).write_bytes(content)


def _config(**changes):
    return lambda path: edit(path / "config.json", **changes)


def _cut(pattern):
    def cut(path):
        file = sorted(path.glob(pattern))[-1]
        file.write_bytes(file.read_bytes()[:-40])

    return cut


def _weights(change):
    def changed(path):
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file(weights, path / "model.safetensors", {"format": "pt"})

    return changed


def _index(change):
    def changed(path):
        file = path / "model.safetensors.index.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return changed


def _first_shard(name):
    def named(content):
        content["weight_map"][min(content["weight_map"])] = name

    return _index(named)


WTE, LAST = "transformer.wte.weight", "transformer.h.1.ln_1.bias"
# fmt: off
DAMAGES = {
    "no config": (_unlink("config.json"), FileNotFoundError, ["no config.json"]),
    "half a config": (_write("config.json", b'{"model_type":'), ValueError, ["config.json", "not JSON"]),
    "config not text": (_write("config.json", b"\xff\xfe\x00"), ValueError, ["config.json", "not JSON"]),
    "config a list": (_write("config.json", b"[1]"), ValueError, ["config.json", "JSON object", "list"]),
    "deep config": (_write("config.json", b"[" * 200000), ValueError, ["config.json", "not JSON"]),
    "no family": (_config(model_type=None), ValueError, ["model type None", "does not know"]),
    "unknown family": (_config(model_type="zork"), ValueError, ["'zork'", "does not know", hf.__version__]),
    "remote code": (_config(model_type="zork", auto_map={"AutoConfig": "evil.C"}), ValueError, ["auto_map", "not run"]),
    "no architectures": (_config(architectures=3), ValueError, ["`architectures`", "3"]),
    "a word for a number": (_config(n_layer="two"), ValueError, ["config.json", "n_layer", "expected int", "'two'"]),
    "heads that do not fit": (_config(n_head=5), ValueError, ["cannot be loaded", "divisible"]),
    "quantised": (_config(quantization_config={"quant_method": "gptq", "bits": 4}), ValueError, ["quantised"]),
    "own file name": (_config(transformers_weights="x.safetensors"), ValueError, ["transformers_weights"]),
    "adapter": (_write("adapter_config.json", b"{}"), ValueError, ["adapter", "merge"]),
    "distributed": (_write("shard-00000-model-00001-of-00001.safetensors", b""), ValueError, ["distributed"]),
    "no weights": (_unlink("model.safetensors"), FileNotFoundError, ["no weights", "model.safetensors", "config.json"]),
    "empty weights": (_write("model.safetensors", b""), ValueError, ["model.safetensors", "damaged"]),
    "garbage": (_write("model.safetensors", b"garbage " * 99), ValueError, ["model.safetensors", "damaged"]),
    "cut short": (_cut("model.safetensors"), ValueError, ["model.safetensors", "cut short"]),
    "a weight is missing": (_weights(lambda w: w.pop(LAST)), ValueError, ["lacks 1 of the weights", LAST, "random"]),
    "many are missing": (
        _weights(lambda w: [w.pop(name) for name in [*w] if ".h.1." in name]), ValueError,
        ["lacks 12 of the weights", ".h.1.attn.c_attn.bias", ", ..."],
    ),
    "another shape": (
        _weights(lambda w: w.update({WTE: torch.zeros(8, 12)})), ValueError,
        ["another shape", "(1 in all)", WTE, "(8, 12) for (300, 12)"],
    ),
    "fewer layers": (_config(n_layer=1), ValueError, ["layers", "leaves out", "transformer.h.1."]),
    "integers only": (
        _weights(lambda w: w.update({name: w[name].to(torch.int8) for name in w})), ValueError,
        ["no floating-point weights"],
    ),
    "eight bits": (
        _weights(lambda w: w.update({WTE: w[WTE].to(torch.float8_e4m3fn)})), ValueError, ["F8_E4M3", "no derivatives"],
    ),
}
SHARD_DAMAGES = {
    "a shard is cut short": (_cut("model-*.safetensors"), ValueError, ["model-000", "cut short"]),
    "a shard is missing": (
        lambda path: sorted(path.glob("model-*"))[1].unlink(), FileNotFoundError,
        ["model-00002-of-", "not there", "incomplete"],
    ),
    "another folder": (_first_shard("../x.safetensors"), ValueError, ["'../x.safetensors'", "in the folder"]),
    "a sub-folder": (_first_shard("a/x.safetensors"), ValueError, ["'a/x.safetensors'", "in the folder"]),
    "the root": (_first_shard("/etc/x.safetensors"), ValueError, ["'/etc/x.safetensors'", "in the folder"]),
    "a backslash": (_first_shard("..\\x.safetensors"), ValueError, ["x.safetensors", "in the folder"]),
    "a pickle": (_first_shard("x.bin"), ValueError, ["'x.bin'", ".safetensors files"]),
    "a number": (_first_shard(7), ValueError, ["the shard 7", ".safetensors files"]),
    "no map": (_index(lambda c: c.pop("weight_map")), ValueError, ["index.json", "weight_map"]),
    "no metadata": (_index(lambda c: c.pop("metadata")), ValueError, ["index.json", "metadata"]),
    "half an index": (_write("model.safetensors.index.json", b'{"weight'), ValueError, ["index.json", "not JSON"]),
}
# fmt: on


@pytest.mark.parametrize("damage", [*DAMAGES, *SHARD_DAMAGES])
def test_a_damaged_folder_is_refused_in_one_line(damage, tmp_path):
    spoil, kind, words = (DAMAGES | SHARD_DAMAGES)[damage]
    folder = saved(tmp_path / "m", max_shard_size="10KB" if damage in SHARD_DAMAGES else "5GB")
    spoil(folder)
    with complaint(*words, kind=kind):
        load_model(folder)


@pytest.mark.parametrize("name", ["nowhere", "openai-community/gpt2", "../../gpt2"])
def test_only_local_folders_are_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (load_model, partial(load_tokenizer, model=gpt2())):
        with complaint(repr(name), "only local folders", "`..` are not resolved", kind=FileNotFoundError):
            load(name)
        (tmp_path / "file").touch()
        with complaint("is a file", kind=NotADirectoryError):
            load("file")


# fmt: off
CLASSES = hf.BertForSequenceClassification
REFUSED = {
    "no head": (partial(bert, hf.BertModel), None, ["BertModel", "no task", "'causal', 'masked', 'classification'"]),
    "no head, with a task": (partial(bert, hf.BertModel), "masked", ["lacks", "cls.predictions"]),
    "another task": (gpt2, "classification", ["`task` is 'classification'", "GPT2LMHeadModel", "'causal'"]),
    "sees what it predicts": (partial(bert, hf.BertLMHeadModel), None, ["is_decoder", "bert"]),
    "one class": (partial(bert, CLASSES, num_labels=1), None, ["two or more classes", "it has 1"]),
    "regression": (partial(bert, CLASSES, num_labels=3, problem_type="regression"), None, ["regression", "fs.custom"]),
    "many labels": (
        partial(bert, CLASSES, num_labels=3, problem_type="multi_label_classification"), None,
        ["multi_label_classification", "fs.custom"],
    ),
    "boxes": (
        lambda: seeded(
            0,
            lambda: hf.YolosForObjectDetection(
                hf.YolosConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=[32, 32])
            ),
        ),
        None, ["YolosForObjectDetection", "none of the tasks", "from Python", "fs.functional"],
    ),
    "no such head": (partial(gpt2, hf.GPT2Model), "masked", ["gpt2", "none of those for 'masked'"]),
}
# fmt: on


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_without_a_usable_task_is_refused(case, tmp_path):
    make, task, words = REFUSED[case]
    with complaint(*words):
        load_model(saved(tmp_path, make()), task=task)


def test_a_choice_that_there_is_not_is_named(tmp_path):
    load = inspect.unwrap(load_model)
    with complaint("`dtype`", "'int8'", "'bfloat16'"):
        load(tmp_path, dtype="int8")
    with complaint("`task`", "'poetry'", "'masked'"):
        load(saved(tmp_path / "m"), task="poetry")


def test_interrupts_pass_and_bare_exceptions_become_a_line():
    with pytest.raises(KeyboardInterrupt), one_line("x"):
        raise KeyboardInterrupt
    with complaint("x (one)"), one_line("x"):
        raise Exception("one\ntwo")


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "tokenizer"), [(gpt2, bpe), (llama, bpe), (bert, wordpiece)])
def test_a_loaded_tokenizer_is_the_saved_one(make, tokenizer, tmp_path):
    folder = saved(tmp_path, make(), tokenizer())
    loaded = load_tokenizer(folder, load_model(folder))
    for text in corpus()[:5]:
        assert loaded(text)["input_ids"] == tokenizer()(text)["input_ids"]


def _all(*damages):
    return lambda path: [damage(path) for damage in damages]


def _foreign(path):
    edit(path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})


# fmt: off
ZORK = b'{"version": "1.0", "added_tokens": [], "model": {"type": "Zork"}}'
NO_JSON = _unlink("tokenizer.json")
TOKENIZER_DAMAGES = {
    "none": (NO_JSON, FileNotFoundError, ["no tokenizer", "tokenizer.json"]),
    "half": (_write("tokenizer.json", b'{"model":'), ValueError, ["tokenizer.json", "not JSON"]),
    "unknown": (_write("tokenizer.json", ZORK), ValueError, ["the tokenizer in", "cannot be loaded"]),
    "half its settings": (_write("tokenizer_config.json", b"{"), ValueError, ["tokenizer_config.json", "not JSON"]),
    "no merges": (_all(NO_JSON, _write("vocab.json", b'{"a": 0}')), FileNotFoundError, ["merges.txt"]),
    "remote code": (_all(NO_JSON, _write("vocab.txt", b"a\nb"), _foreign), ValueError, ["auto_map", "not run"]),
}
# fmt: on


@pytest.mark.parametrize("damage", TOKENIZER_DAMAGES)
def test_a_damaged_tokenizer_is_refused_in_one_line(damage, tmp_path):
    spoil, kind, words = TOKENIZER_DAMAGES[damage]
    folder = saved(tmp_path, gpt2(), bpe())
    spoil(folder)
    with complaint(*words, kind=kind):
        load_tokenizer(folder, gpt2())


def test_a_tokenizer_that_transformers_rereads_in_its_own_way_is_reported(tmp_path):
    """Words as tokens, in the folder of a Qwen2: transformers makes a byte-level tokenizer of the vocabulary."""
    model = folder(tmp_path / "model", "qwen2")
    load_tokenizer(model, load_model(model))
    words().save_pretrained(model)
    with pytest.warns(UserWarning, match=r"as a Qwen2Tokenizer, which makes other tokens of a text"):
        load_tokenizer(model, load_model(model))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    folder = saved(tmp_path, gpt2(), bpe())
    with complaint("300 tokens", "299 rows", "resize_token_embeddings(300)"):
        load_tokenizer(folder, gpt2(vocab_size=299))


# --- texts -----------------------------------------------------------------------------------------------------------


def wrote(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


TEXT = "\ufeffone\ntwo \u00e9\r\n\n \t\nthree\n"


@pytest.mark.parametrize(
    ("unit", "wanted"),
    [
        ("line", [("one", "line 1"), ("two \u00e9", "line 2"), ("three", "line 5")]),
        ("paragraph", [("one\ntwo \u00e9", "line 1"), ("three", "line 5")]),
        ("document", [("one\ntwo \u00e9\n\n \t\nthree", "the document")]),
    ],
)
def test_a_text_file_is_cut_into_units(unit, wanted, tmp_path):
    found = list(read_texts(wrote(tmp_path / "a.TXT", TEXT), unit=unit))
    assert found == [Example(text, None, where) for text, where in wanted]


def test_json_lines_have_any_field_labels_and_blank_lines(tmp_path):
    lines = '\ufeff{"body": "one", "y": 2}\n\n{"y": "name", "body": "", "more": [1]}'
    for name in ("a.jsonl", "a.ndjson"):
        found = list(read_texts(wrote(tmp_path / name, lines), field="body", label_field="y"))
        assert found == [Example("one", 2, "line 1"), Example("", "name", "line 3")]


def parquet(path, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=100)
    return path


def test_parquet_is_read_by_columns_and_rows(tmp_path):
    texts = [f"text {i}" for i in range(250)]
    path = parquet(tmp_path / "a.parquet", text=texts, y=[i % 3 for i in range(250)], other=[[1]] * 250)
    found = list(read_texts(path, label_field="y"))
    assert found == [Example(text, i % 3, f"row {i + 1}") for i, text in enumerate(texts)]
    assert next(read_texts(path)) == Example("text 0", None, "row 1")


def test_texts_are_read_as_they_are_asked_for(tmp_path):
    """What lies behind is never looked at: a damaged line after the first eight texts goes unseen, and is seen at 9."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in corpus()[:8]) + "damage"
    path = wrote(tmp_path / "a.jsonl", lines)
    options = {"task": "causal", "max_seq_length": 40}
    assert make_batches(read_texts(path), bpe(), gpt2(), num_samples=8, **options).num_samples == 8
    assert make_batches(read_texts(path), bpe(), gpt2(), num_samples=3, packing=True, **options).num_samples == 3
    with complaint("a.jsonl, line 9", "not JSON"):
        make_batches(read_texts(path), bpe(), gpt2(), num_samples=9, **options)


TEXT_DAMAGES = {
    "unknown ending": ("a.xml", "x", {}, ValueError, [".jsonl", ".parquet", "'a.xml'"]),
    "empty": ("a.txt", "", {}, ValueError, ["a.txt is empty"]),
    "blank": ("a.txt", " \n\n", {"unit": "document"}, ValueError, ["a.txt is empty"]),
    "no lines": ("a.jsonl", "\n", {}, ValueError, ["a.jsonl is empty"]),
    "labels in text": ("a.txt", "x", {"label_field": "y"}, ValueError, ["label_field", "plain text"]),
    "not UTF-8": ("a.txt", b"fine\n\xff\xfe\n", {}, ValueError, ["a.txt, line 2", "not UTF-8"]),
    "JSON not UTF-8": ("a.jsonl", b'{"text": "\xe9"}', {}, ValueError, ["a.jsonl, line 1", "not UTF-8"]),
    "not JSON": ("a.jsonl", '{"text": "x"}\n{"text"', {}, ValueError, ["a.jsonl, line 2", "not JSON"]),
    "nested": ("a.jsonl", "[" * 200000, {}, ValueError, ["a.jsonl, line 1", "not JSON"]),
    "no object": ("a.jsonl", '"text"', {}, ValueError, ["line 1", "JSON object", "str"]),
    "no field": ("a.jsonl", '{"body": "x", "id": 1}', {}, ValueError, ["line 1", "'text'", "'body', 'id'"]),
    "no string": ("a.jsonl", '{"text": 3}', {}, ValueError, ["line 1", "`text`", "string", "int"]),
    "null": ("a.jsonl", '{"text": null}', {}, ValueError, ["line 1", "`text`", "NoneType"]),
    "half a character": ("a.jsonl", '{"text": "\\ud800"}', {}, ValueError, ["line 1", "surrogate"]),
    "no label": ("a.jsonl", '{"text": "x"}', {"label_field": "y"}, ValueError, ["line 1", "'y'", "'text'"]),
    "label a float": ("a.jsonl", '{"text": "x", "y": 1.0}', {"label_field": "y"}, ValueError, ["`y`", "float"]),
    "label a bool": ("a.jsonl", '{"text": "x", "y": true}', {"label_field": "y"}, ValueError, ["`y`", "bool"]),
    "label null": ("a.jsonl", '{"text": "x", "y": null}', {"label_field": "y"}, ValueError, ["`y`", "NoneType"]),
    "damaged": ("a.parquet", "PAR1 and more", {}, ValueError, ["a.parquet", "damaged or no parquet"]),
}


@pytest.mark.parametrize("damage", TEXT_DAMAGES)
def test_a_file_that_is_not_as_described_is_refused_in_one_line(damage, tmp_path):
    name, content, options, kind, words = TEXT_DAMAGES[damage]
    path = wrote(tmp_path / name, content)
    with complaint(*words, kind=kind):
        list(read_texts(path, **options))


def test_a_file_that_cannot_be_read_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # which takes folders, where it is installed
    with complaint("nowhere.txt", "there is no", kind=FileNotFoundError):
        read_texts(tmp_path / "nowhere.txt")
    with complaint("is a folder", kind=IsADirectoryError):
        read_texts(tmp_path)
    with complaint("`unit`", "'word'", "'paragraph'"):
        inspect.unwrap(read_texts)(wrote(tmp_path / "a.txt", "x"), unit="word")
    path = parquet(tmp_path / "a.parquet", text=[None, "a"], number=[1, 2])
    with complaint("no field 'body'", "'number', 'text'"):
        read_texts(path, field="body")
    with complaint("row 1", "`text`", "NoneType"):
        list(read_texts(path))
    with complaint("row 1", "`number`", "int"):
        list(read_texts(path, field="number"))
    path.write_bytes(path.read_bytes()[:4] + bytes(60) + path.read_bytes()[64:])
    with complaint("damaged after row 0"):
        list(read_texts(path))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with complaint("needs pyarrow", "funcscope[parquet]", kind=ImportError):
        read_texts(path)


# --- data sets by name -----------------------------------------------------------------------------------------------


class FakeSet:
    """As much of a data set as is asked of one, and how many of its rows were read."""

    def __init__(self, rows):
        self.rows, self.column_names, self.num_read = rows, list(rows[0]), 0

    def select_columns(self, names):
        for row in self.rows:
            self.num_read += 1
            yield {name: row[name] for name in names}


@pytest.fixture
def hub(monkeypatch):
    """A package `datasets` in which this is what there is, by name, configuration and split; and what it was asked for."""
    there, asked = {}, []

    def load_dataset(*args, **options):
        asked.append((*args, *options.items()))
        if (args[0], args[1], options["split"]) not in there:
            raise type("DatasetsError", (Exception,), {})(f"{args[0]} is not on the Hub\nand a second line")
        return there[args[0], args[1], options["split"]]

    package = types.SimpleNamespace(load_dataset=load_dataset, __version__="4.1.0")
    monkeypatch.setitem(sys.modules, "datasets", package)
    dataset._of_the_hub.cache_clear()
    yield there, asked, package
    dataset._of_the_hub.cache_clear()


def test_a_name_is_a_data_set_of_which_as_much_is_read_as_is_asked_for(hub):
    there, asked, _ = hub
    rows = [{"text": f"w{i} w{i}", "other": 0, "y": i % 2} for i in range(200)]
    there["owner/texts", "small", "test"] = made = FakeSet(rows)
    found = list(
        read_texts("owner/texts:small", label_field="y", split="test", num_samples=3),
    )
    assert found == [Example(f"w{i} w{i}", i % 2, f"row {i + 1}") for i in range(3 * dataset.ROWS)]
    assert made.num_read == 3 * dataset.ROWS
    assert asked == [("owner/texts", "small", ("split", "test"))]  # nothing about code of its own, ever
    with complaint("'owner/texts:small'", "no column 'body'", "'other', 'text', 'y'"):
        read_texts("owner/texts:small", field="body", split="test")
    with complaint("'owner/none'", "not on the Hub", "split 'train'", "no such file"):
        read_texts("owner/none")


def test_a_path_that_is_there_wins_over_a_name(hub, tmp_path, monkeypatch):
    _, asked, _ = hub
    monkeypatch.chdir(tmp_path)
    Path("imdb").write_text("w5 w6")
    with complaint("must end in", "'imdb'"):
        read_texts("imdb")
    Path("folder").mkdir()
    with complaint("cannot be loaded"):
        read_texts("folder")
    assert asked == [(str(tmp_path.resolve() / "folder"), None, ("split", "train"))]  # the folder, not a name


def test_without_the_package_or_with_one_that_runs_code_a_name_is_refused(hub, monkeypatch, tmp_path):
    hub[-1].__version__ = "3.6.0"
    with complaint("datasets 3.6.0 runs code", "4.0"):
        read_texts("imdb")
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))  # somebody's folder of that name
    for _ in range(2):
        with complaint("'imdb'", "no file", "pip install 'funcscope[datasets]'", kind=FileNotFoundError):
            read_texts("imdb")
        with complaint("is a folder", "pip install 'funcscope[datasets]'", kind=IsADirectoryError):
            read_texts(tmp_path)
        monkeypatch.setitem(sys.modules, "datasets", None)


def test_a_data_set_is_what_its_texts_are(hub, tmp_path, capsys):
    there, _, _ = hub
    model, lines = folder(tmp_path / "model"), [f"w{5 + i} w{9 + i} w{4 + i}" for i in range(3)]
    more = [*lines, *["w9 w9"] * 2 * dataset.ROWS]
    for name, texts in (("a", more), ("b", more), ("c", [*lines[::-1], *more]), ("d", [*more, "w7 w8"])):
        there[name, None, "test"] = FakeSet([{"text": text} for text in texts])
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in lines))

    def measured(name, split="test"):
        few = ["--out", str(tmp_path / "out"), "--num-samples", "2", "--metrics", "mean_loss", "--quiet"]
        assert cli.main(["analyze", str(model), "--data", name, "--dataset-split", split, *few]) == 0
        shown = capsys.readouterr().out
        loss = fs.Results.open(tmp_path / "out").models[str(model)].metrics["mean_loss"]["loss"]
        return "reused" in shown, loss

    (_, of_file), (again, _) = measured(str(tmp_path / "a.jsonl")), measured(str(tmp_path / "a.jsonl"), "train")
    assert again  # a file has no split
    assert measured("a") == (False, of_file)
    assert measured("b") == (True, of_file)  # the same texts by another name
    assert measured("d") == (True, of_file)  # a row that is never looked at
    again, other = measured("c")
    assert not again
    assert other != of_file


@pytest.mark.outsider
def test_a_folder_of_files_is_a_data_set_for_the_package_itself(tmp_path, monkeypatch):
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in corpus()[:5]))
    assert [one.text for one in read_texts(tmp_path / "mine")] == corpus()[:5]
    (tmp_path / "mine" / "train.jsonl").write_text(json.dumps({"text": "another"}))
    assert [one.text for one in read_texts(tmp_path / "mine")] == ["another"]


# --- batches ---------------------------------------------------------------------------------------------------------


def texts_of(lengths, labels=None):
    """Examples of so many words each, from different places of the corpus."""
    starts = range(0, 37 * len(lengths), 37)
    texts = [" ".join(WORDS[start : start + length]) for start, length in zip(starts, lengths, strict=True)]
    return [Example(text, None if labels is None else labels[i]) for i, text in enumerate(texts)]


def objective_of(model, data, task):
    loss = fs.objective(fs.functional(model), data.batches, TASKS[task])
    theta = loss.net.theta
    _, weights = loss.terms(theta)
    assert len(weights) == data.num_samples
    assert float(weights.sum()) == data.num_scored
    return loss(theta)


def nll(scores, targets):
    return -scores.log_softmax(-1).gather(-1, targets[:, None]).sum()


def mean_one_by_one(model, tokenizer, examples, length):
    """The oracle: each text alone, unpadded, through the untouched model."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([tokenizer(example.text)["input_ids"][:length]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                total += nll(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
            count += ids.shape[1] - 1
    return total / count


LENGTHS = st.lists(st.integers(0, 25), min_size=1, max_size=7).filter(lambda lengths: max(lengths) > 1)


IN_FLOAT32 = {"rtol": 1e-6, "atol": 0}  # where transformers computes in float32 whatever the model's dtype


@pytest.mark.slow
@given(lengths=LENGTHS, batch_size=st.integers(1, 8), length=st.integers(2, 40), make=st.sampled_from([gpt2, llama]))
def test_the_causal_objective_is_the_token_mean_over_single_texts(lengths, batch_size, length, make):
    model, examples = make().double(), texts_of(lengths)
    data = make_batches(examples, bpe(), model, task="causal", max_seq_length=length, batch_size=batch_size)
    close = exact if make is gpt2 else partial(assert_close, **IN_FLOAT32)
    close(objective_of(model, data, "causal"), mean_one_by_one(model, bpe(), examples, length))
    ids = [bpe()(example.text)["input_ids"] for example in examples]
    kept = [text for text in ids if len(text) > 1]
    assert data.num_tokens == sum(min(len(text), length) for text in kept)
    assert (data.num_samples, data.num_too_short) == (len(kept), len(ids) - len(kept))
    assert data.num_truncated == sum(len(text) > length for text in kept)
    assert [len(batch["input_ids"]) for batch in data.batches[:-1]] == [batch_size] * (len(data.batches) - 1)


@given(lengths=LENGTHS)
def test_the_models_own_loss_over_a_causal_batch_is_the_objective(lengths):
    model = gpt2().double()
    data = make_batches(texts_of(lengths), bpe(), model, task="causal", max_seq_length=40)
    with torch.no_grad():
        own = model(**data.batches[0]).loss
    assert_close(objective_of(model, data, "causal"), own.double(), **IN_FLOAT32)


def masked_one_by_one(model, data):
    total, count = 0.0, 0
    for batch in data.batches:
        for ids, labels, real in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True):
            with torch.no_grad():
                scores = model(input_ids=ids[real][None]).logits[0]
            scored = labels[real] != -100
            total, count = total + nll(scores[scored], labels[real][scored]), count + int(scored.sum())
    return total / count


@pytest.mark.slow
@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 8),
    length=st.integers(3, 40),
    fraction=st.sampled_from([0.01, 0.15, 1.0]),
)
def test_the_masked_objective_does_not_depend_on_batches_and_masks_what_it_says(lengths, batch_size, length, fraction):
    model, examples = bert().double(), texts_of(lengths)
    options = {"task": "masked", "max_seq_length": length, "mask_fraction": fraction}
    data = make_batches(examples, wordpiece(), model, batch_size=batch_size, key=fs.key(3), **options)
    one = make_batches(examples, wordpiece(), model, batch_size=1, key=fs.key(3), **options)
    exact(objective_of(model, data, "masked"), masked_one_by_one(model, one))

    kept = [example for example in examples if example.text]
    assert data.num_too_short == len(examples) - len(kept)
    for i, (batch, example) in enumerate(zip(one.batches, kept, strict=True)):
        whole = wordpiece()(example.text, truncation=True, max_length=length)["input_ids"]  # the tokenizer's own cut
        content = [place for place, token in enumerate(whole) if token not in wordpiece().all_special_ids]
        draws = fs.core.keys.uniform(fs.fold_in(fs.key(3), i), torch.zeros(len(content))).tolist()
        order = sorted(range(len(content)), key=draws.__getitem__)
        chosen = {content[j] for j in order[: max(1, round(fraction * len(content)))]}
        assert batch["input_ids"][0].tolist() == [4 if j in chosen else token for j, token in enumerate(whole)]
        assert batch["labels"][0].tolist() == [token if j in chosen else -100 for j, token in enumerate(whole)]
        assert batch["token_type_ids"].tolist() == [[0] * len(whole)]


def test_masks_are_determined_by_the_key_and_the_number_of_the_text():
    made = [
        make_batches(texts_of([20] * 6), wordpiece(), bert(), task="masked", max_seq_length=40, batch_size=6, key=key)
        for key in (fs.key(0), fs.key(0), fs.key(1))
    ]
    first, again, other = (data.batches[0]["labels"] for data in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    places = {tuple((row != -100).nonzero()[:, 0].tolist()) for row in first}
    assert len(places) > 1  # texts do not share their draws


CLASSIFIERS = [(name, make) for name, (make, task) in MODELS.items() if task == "classification"]


@pytest.mark.slow
@given(lengths=LENGTHS, batch_size=st.integers(1, 8), which=st.sampled_from(CLASSIFIERS))
def test_the_classifiers_objective_is_the_mean_over_single_texts(lengths, batch_size, which):
    name, make = which
    tokenizer = bpe() if name.startswith("gpt2") else wordpiece()
    model, labels = make().double(), [i % 3 if i % 2 else f"LABEL_{i % 3}" for i in range(len(lengths))]
    examples = texts_of(lengths, labels)
    data = make_batches(examples, tokenizer, model, task="classification", max_seq_length=30, batch_size=batch_size)
    losses = []
    for i, example in enumerate(examples):
        ids = torch.tensor([tokenizer(example.text, truncation=True, max_length=30)["input_ids"]], dtype=torch.long)
        if ids.shape[1]:
            with torch.no_grad():
                losses.append(nll(model(input_ids=ids).logits, torch.tensor([i % 3])))
    exact(objective_of(model, data, "classification"), torch.stack(losses).mean())
    assert {batch["labels"].ndim for batch in data.batches} == {1}


@given(
    lengths=LENGTHS, length=st.integers(2, 40), num=st.integers(1, 60), batch_size=st.integers(1, 4), eos=st.booleans()
)
@hypothesis.example(lengths=[9, 0, 9], length=10, num=40, batch_size=2, eos=True)
def test_packed_blocks_reassemble_the_stream(lengths, length, num, batch_size, eos):
    tokenizer, examples = bpe(eos), texts_of(lengths)
    data = make_batches(
        examples, tokenizer, gpt2(), task="causal", packing=True, max_seq_length=length, num_samples=num,
        batch_size=batch_size,
    )  # fmt: skip
    stream: list[int] = []
    for ids in (tokenizer(example.text)["input_ids"] for example in examples if example.text):
        stream += [tokenizer.eos_token_id] * (eos and bool(stream)) + ids
    blocks = [row for batch in data.batches for row in batch["input_ids"].tolist()]
    whole = min(len(stream) // length, num)
    if whole:
        assert [len(block) for block in blocks] == [length] * whole
        assert [token for block in blocks for token in block] == stream[: whole * length]
    else:
        assert blocks == [stream]
    assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in data.batches)
    assert all(bool(batch["attention_mask"].all()) for batch in data.batches)
    assert data.num_tokens == sum(map(len, blocks)) == data.num_scored + len(blocks)
    if len(stream) < num * length:
        empty, rest = sum(not example.text for example in examples), len(stream) - whole * length
        assert data.num_too_short == empty + bool(whole and rest)


def test_packing_adds_no_second_end_of_text():
    examples = [Example("one<|end|>"), Example("two"), Example("<|end|>three")]
    data = make_batches(examples, bpe(), gpt2(), task="causal", packing=True, max_seq_length=40)
    ids = data.batches[0]["input_ids"][0].tolist()
    assert ids == [token for example in examples for token in bpe()(example.text)["input_ids"]]
    assert ids.count(0) == 2


def test_truncation_and_padding_stored_with_a_tokenizer_stay_and_do_not_matter(tmp_path):
    plain = wordpiece()
    plain.save_pretrained(tmp_path)
    stored = hf.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    stored.backend_tokenizer.enable_truncation(4)
    stored.backend_tokenizer.enable_padding(length=50, pad_token="[PAD]")
    before = stored.backend_tokenizer.to_str()
    made = [
        make_batches(texts_of([3, 20]), tokenizer, bert(), task="masked", max_seq_length=40, key=fs.key(0)).batches[0]
        for tokenizer in (plain, stored)
    ]
    assert torch.equal(made[0]["input_ids"], made[1]["input_ids"])
    assert stored.backend_tokenizer.to_str() == before


def test_token_types_go_only_to_models_that_have_them():
    """GPT-2 would add the embedding of token 0 to every position for token types of 0."""
    for model, present in ((bert(), True), (gpt2(), False)):
        data = make_batches(texts_of([5]), wordpiece(), model, task="causal", max_seq_length=20)
        assert ("token_type_ids" in data.batches[0]) == present


def test_the_longest_sequence_is_that_of_the_position_table():
    config = hf.RobertaConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, vocab_size=300,
        max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    roberta = seeded(0, lambda: hf.RobertaForMaskedLM(config)).eval()
    assert [max_positions(model) for model in (gpt2(), llama(), bert(), roberta)] == [40, 40, 40, 18]
    assert roberta(input_ids=torch.full((1, 18), 7)).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 19), 7))
    with complaint("`max_seq_length` is 19", "RobertaForMaskedLM has 18 positions"):
        make_batches(texts_of([5]), wordpiece(), roberta, task="masked", max_seq_length=19, key=fs.key(0))


def test_data_say_what_is_in_them():
    examples = [*texts_of([0, 30, 2, 9]), Example("x" * 400)]
    data = make_batches(examples, bpe(), gpt2(), task="causal", max_seq_length=20, batch_size=3)
    assert data.num_too_short == 1
    assert data.num_truncated >= 2
    assert str(data) == (
        f"4 sequences in 2 batches: {data.num_tokens} tokens, {data.num_tokens - 4} scored; "
        f"1 too short, {data.num_truncated} truncated"
    )


def _big(tokenizer, token="<|big|>"):
    grown = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    grown.add_tokens([token])
    return grown


CLASSIFIER = MODELS["bert classifier"][0]
DECODER = partial(gpt2, hf.GPT2ForSequenceClassification, num_labels=3)
CLASS, MASKED = {"task": "classification"}, {"task": "masked", "key": fs.key(0)}
LABELLED = {**CLASS, "examples": [Example("some text", 1, "line 4"), Example("more", 0, "line 5")]}
# fmt: off
BATCH_MISTAKES = {
    "too long": (gpt2, bpe, {"max_seq_length": 41}, ["`max_seq_length` is 41", "GPT2LMHeadModel has 40 positions"]),
    "too short a length": (gpt2, bpe, {"max_seq_length": 1}, ["`max_seq_length`", "at least 2"]),
    "no room": (bert, wordpiece, {"max_seq_length": 2}, ["`max_seq_length` is 2", "2 special tokens"]),
    "no samples": (gpt2, bpe, {"num_samples": 0}, ["`num_samples`", "at least 1", "0"]),
    "no batches": (gpt2, bpe, {"batch_size": 0}, ["`batch_size`", "at least 1", "0"]),
    "nothing left": (gpt2, bpe, {"examples": [Example(""), Example("a")]}, ["no text is left", "2 were too short"]),
    "no texts": (gpt2, bpe, {"examples": []}, ["no text is left", "0 were too short"]),
    "no block": (gpt2, bpe, {"packing": True, "examples": [Example("a")]}, ["no text is left", "1 were too short"]),
    "packed masks": (bert, wordpiece, {**MASKED, "packing": True}, ["`packing`", "'causal'", "'masked'"]),
    "no key": (bert, wordpiece, {"task": "masked"}, ["`key` is needed", "fs.key(0)"]),
    "no mask token": (bert, partial(wordpiece, None), MASKED, ["no mask token"]),
    "fraction": (bert, wordpiece, {**MASKED, "mask_fraction": 1.5}, ["`mask_fraction`", "1.5"]),
    "no label": (CLASSIFIER, wordpiece, {**CLASS, "examples": [Example("x", None, "line 7")]}, ["line 7", "no label"]),
    "no such class": (
        CLASSIFIER, wordpiece, {**CLASS, "examples": [Example("x", 3, "line 7")]},
        ["line 7", "label 3", "0 to 2", "'LABEL_0'"],
    ),
    "no such name": (CLASSIFIER, wordpiece, {**CLASS, "examples": [Example("x", "good")]}, ["text 0", "'good'"]),
    "a negative class": (CLASSIFIER, wordpiece, {**CLASS, "examples": [Example("x", -1)]}, ["text 0", "-1"]),
    "no padding id": (DECODER, bpe, LABELLED, ["config.pad_token_id", "None", "batch_size=1"]),
    "a padding id outside": (partial(DECODER, pad_token_id=-1), bpe, LABELLED, ["config.pad_token_id", "-1", "below 300"]),
    "outside the embedding": (
        gpt2, lambda: _big(bpe()), {"examples": [Example("fine"), Example("a <|big|>", None, "row 2")]},
        ["row 2", "'<|big|>'", "the id 300", "300 rows"],
    ),
    "end outside": (gpt2, lambda: _outside("eos_token"), {"packing": True}, ["end-of-text", "300 rows"]),
    "mask outside": (bert, lambda: _outside("mask_token"), MASKED, ["mask token", "300 rows"]),
}
# fmt: on


def _outside(role):
    grown = _big(bpe())
    setattr(grown, role, "<|big|>")
    return grown


@pytest.mark.parametrize("mistake", BATCH_MISTAKES)
def test_a_mistake_about_batches_is_named_in_one_line(mistake):
    make, tokenizer, options, words = BATCH_MISTAKES[mistake]
    options = {"task": "causal", "max_seq_length": 20, "examples": [Example("some text")], **options}
    with complaint(*words):
        make_batches(options.pop("examples"), tokenizer(), make(), **options)


def test_one_text_at_a_time_needs_no_padding_id():
    data = make_batches(LABELLED["examples"], bpe(), DECODER(), task="classification", max_seq_length=20, batch_size=1)
    assert [batch["labels"].tolist() for batch in data.batches] == [[1], [0]]


def test_a_seed_is_no_key_and_a_task_must_be_one():
    make = inspect.unwrap(make_batches)
    with complaint("`key`", "fs.key(3)", kind=TypeError):
        inspect.unwrap(make)(texts_of([5]), wordpiece(), bert(), task="masked", max_seq_length=20, key=3)
    with complaint("`task`", "'poetry'"):
        make(texts_of([5]), bpe(), gpt2(), task="poetry")


def test_from_files_to_an_objective(tmp_path):
    folder = saved(tmp_path / "model", llama().to(torch.bfloat16), bpe())
    path = wrote(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in corpus()))
    model = load_model(folder, dtype="float64")
    tokenizer = load_tokenizer(folder, model)
    data = make_batches(read_texts(path), tokenizer, model, task=task_of(model), num_samples=12, max_seq_length=30)
    assert data.num_samples == 12
    loss = fs.objective(fs.functional(model), data.batches, fs.criterion_of(model))
    wanted = mean_one_by_one(model, tokenizer, [Example(text) for text in corpus()[:12]], 30)
    assert_close(loss(loss.net.theta), wanted, **IN_FLOAT32)


@pytest.mark.parametrize(("ending", "between"), [("csv", ","), ("tsv", "\t")])
def test_texts_between_commas_and_tabs(tmp_path, ending, between):
    file = tmp_path / f"a.{ending}"
    rows = [("text", "kind", "note"), ('"one, two\tthree\nfour"', "1", ""), ("ünï", "007", "x")]
    file.write_text("\n".join(between.join(row) for row in rows), encoding="utf-8-sig")
    assert [(one.text, one.label) for one in read_texts(file, label_field="kind")] == [
        ("one, two\tthree\nfour", 1),
        ("ünï", 7),
    ]
    assert [one.label for one in read_texts(file)] == [None, None]
    for bad, message in (('text\n"half', "no [CT]SV"), (f"text{between}a\nx", "as many cells"), ("text\n", "is empty")):
        file.write_text(bad)
        with pytest.raises(ValueError, match=message):
            list(read_texts(file))


def test_an_encoder_decoder_reads_pairs_of_source_and_target(tmp_path):
    model = folder(tmp_path / "t5", "t5")
    rows = [("w5 w6 w7", "w8 w9"), ("w10", "w11 w12 w13 w14"), ("w20 w21 w22 w23 w24", "w25")]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": a, "to": b}) for a, b in rows))
    loaded = load_model(model)
    assert task_of(loaded) == "seq2seq"
    made = load_tokenizer(model, loaded)
    texts = list(read_texts(tmp_path / "a.jsonl", second_field="to"))
    data = make_batches(texts, made, loaded, task="seq2seq", batch_size=2, max_seq_length=16)
    source = fs.Pretrained(
        str(model),
        fs.UnifiedConfig(dataset_name=str(tmp_path / "a.jsonl"), second_field="to", batch_size=2).tasks(),
        length=16,
    )
    subject = source.open()
    ours = float(subject.loss("data")(subject.theta))
    total = count = 0.0
    for a, b in rows:  # the model's own loss, a text at a time
        ids, labels = (torch.tensor([made(x)["input_ids"]]) for x in (a, b))
        with torch.no_grad():
            total += float(loaded(input_ids=ids, labels=labels).loss) * labels.numel()
        count += labels.numel()
    assert ours == pytest.approx(total / count, rel=1e-5)
    assert data.num_scored == count
    with pytest.raises(ValueError, match=r"no target; .*`second_field`"):
        make_batches(list(read_texts(tmp_path / "a.jsonl")), made, loaded, task="seq2seq")


@pytest.mark.slow
def test_columns_of_source_and_target_are_named_on_the_command_line(tmp_path, capsys):
    model = folder(tmp_path / "t5", "t5")
    (tmp_path / "a.csv").write_text("source,target\nw5 w6 w7,w8 w9\nw10,w11 w12 w13 w14\n")
    command = ["directional", str(model), "--data", str(tmp_path / "a.csv"), "--samples", "2", "--field", "source"]
    assert cli.main([*command, "--second-field", "target", "--out", str(tmp_path / "out")]) == 0
    assert "2 sequences in 1 batch: 4 tokens, 6 scored" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*command, "--out", str(tmp_path / "without")]) != 0
    assert "no target; the task 'seq2seq' needs a second text (`--second-field`)" in capsys.readouterr().out


def test_a_classifier_reads_pairs_of_texts(tmp_path):
    model = tmp_path / "bert"
    MODELS["bert classifier"][0]().save_pretrained(model)
    words().save_pretrained(model)
    (tmp_path / "a.csv").write_text("text,other,kind\nw5 w6,w7 w8 w9,1\nw10,w11,0\n")
    loaded = load_model(model)
    made = load_tokenizer(model, loaded)
    texts = list(read_texts(tmp_path / "a.csv", label_field="kind", second_field="other"))
    (batch,) = make_batches(texts, made, loaded, task="classification", max_seq_length=16).batches
    for row, (a, b) in enumerate([("w5 w6", "w7 w8 w9"), ("w10", "w11")]):
        ids = made(a, b)["input_ids"]
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
    assert batch["labels"].tolist() == [1, 0]


def test_threads_load_models_at_the_same_time(tmp_path):
    path = folder(tmp_path / "a")
    with ThreadPoolExecutor(8) as workers:
        models = list(workers.map(load_model, [path] * 24))
    first = models[0].state_dict()
    assert all(torch.equal(value, first[name]) for model in models for name, value in model.state_dict().items())


def test_numbers_as_labels_of_a_model_with_named_classes_are_said(tmp_path):
    model = tmp_path / "bert"
    made = MODELS["bert classifier"][0]()
    made.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    made.config.label2id = {"no": 0, "maybe": 1, "yes": 2}
    made.save_pretrained(model)
    words().save_pretrained(model)
    loaded = load_model(model)
    texts = [Example("w5 w6", 1), Example("w7", 0)]
    with pytest.warns(UserWarning, match="labels are numbers, and the model names its classes 'no', 'maybe', 'yes'"):
        data = make_batches(texts, load_tokenizer(model, loaded), loaded, task="classification", max_seq_length=16)
    assert data.batches[0]["labels"].tolist() == [1, 0]


def test_a_thread_that_loads_in_another_dtype_waits_for_those_that_compute():
    turns, seen, begun, done = Turns(), [], threading.Event(), threading.Event()

    def load():
        begun.set()
        with turns.loading(torch.float64):
            seen.append("loads")
        with turns.loading(torch.float32), turns.computing(), turns.loading(torch.float16):  # in the middle of its own
            seen.append("loads again")
        done.set()

    with turns.computing():
        threading.Thread(target=load, daemon=True).start()
        begun.wait()
        assert not done.wait(0.1)
        with turns.computing():
            seen.append("computes")
    assert done.wait(10)
    assert seen == ["computes", "loads", "loads again"]
