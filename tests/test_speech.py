"""Recordings with their transcripts: which are taken, as what features and labels, and a study of Whisper on them."""

import importlib.util
import json
import sys
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from folders import folder as saved_text_model
from folders import texts
from problems import seeded
from scipy.io import wavfile
from test_architectures import BOTH
from torch.testing import assert_close

import funcscope as fs
from funcscope.cli import main
from funcscope.study.digest import Sums
from funcscope.study.inputs import load_model, load_tokenizer, make_batches, speech_batches
from funcscope.study.inputs.opened import OpenedModel
from funcscope.study.inputs.waveforms import read_waveform, resampled
from funcscope.study.recordings import digest_of_recordings, is_speech, recordings
from funcscope.study.texts import DataSpec

RATE = 16000
SAID = ("a b", "b c c a b", "c")
TOKENS = [
    "<|endoftext|>", "a", "b", "c", "Ġ", "Ġa", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>",
    "<|translate|>",
]  # fmt: skip
START = 6


def tone(seconds=0.5, rate=RATE, pitch=440.0):
    """A sine wave at half of the full scale."""
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


def write(file, samples, rate=RATE):
    """16 bits a sample."""
    file.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(file, rate, np.round(samples * 32767).astype(np.int16))
    return file


def spoken(path, num=3, **how):
    """A folder with NAME.wav and NAME.txt."""
    for i in range(num):
        write(path / f"{i}.wav", tone(0.3 + 0.2 * i, pitch=200.0 * (i + 1), **how), **how)
        (path / f"{i}.txt").write_text(SAID[i] + "\n")
    return path


@cache
def whisper():
    sizes = {key: value for key, value in BOTH.items() if value is not ...} | {"decoder_start_token_id": START}
    more = {"num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 20, "vocab_size": 12}
    config = transformers.WhisperConfig(**sizes, **more, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    return seeded(0, lambda: transformers.WhisperForConditionalGeneration(config))


def saved(path, *, as_processor=False, **changes):
    """A folder with a small Whisper that hears one second, its tokenizer and its extractor."""
    whisper().save_pretrained(path)
    tokenizer = transformers.WhisperTokenizer(
        vocab={token: i for i, token in enumerate(TOKENS)}, merges=[("Ġ", "a")], additional_special_tokens=TOKENS[6:]
    )
    extractor = transformers.WhisperFeatureExtractor(**{"feature_size": 8, "chunk_length": 1, **changes})
    if as_processor:
        transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(path)
    else:
        tokenizer.save_pretrained(path)
        extractor.save_pretrained(path)
    return path


def batches(data, path, **options):
    model = load_model(path)
    return speech_batches(data, model, path, load_tokenizer(path, model), **{"max_seq_length": 20, **options})


# Which


def test_transcripts_are_beside_the_recordings_or_in_a_table(tmp_path):
    beside = spoken(tmp_path / "beside")
    (beside / "notes.md").write_text("none")
    assert [(one.file.name, one.text) for one in recordings(beside, 2)] == [("0.wav", "a b"), ("1.wav", "b c c a b")]
    table = tmp_path / "table"
    for i in range(3):
        write(table / "clips" / f"{i}.wav", tone())
    (table / "metadata.csv").write_text('file_name,transcription\nclips/2.wav,"c, a"\nclips/0.wav,b\n')
    assert [(one.file.name, one.text) for one in recordings(table, 9)] == [("2.wav", "c, a"), ("0.wav", "b")]
    lines = [{"file_name": "clips/1.wav", "text": "b", "sentence": "c"}]
    (file := table / "other.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [(one.text, one.where) for one in recordings(file, 9)] == [("b", f"{file}, line 1")]
    assert [one.text for one in recordings(file, 9, field="sentence")] == ["c"]
    assert all(map(is_speech, (beside, table, file, tmp_path)))
    assert not any(map(is_speech, (tmp_path / "nowhere", beside / "0.wav", texts(tmp_path / "texts.jsonl"))))


def test_a_folder_may_have_splits(tmp_path):
    spoken(tmp_path / "train", 1)
    spoken(tmp_path / "test", 2)
    assert [len([*recordings(tmp_path, 9, split=split)]) for split in ("train", "test", "dev")] == [1, 2, 0]


def test_the_sum_is_that_of_what_is_taken(tmp_path):
    def sums(path):
        return [digest_of_recordings(path, num, "text", "train", Sums(None)) for num in (1, 2)]

    one, other = spoken(tmp_path / "a", 2), spoken(tmp_path / "b", 2)
    before = sums(one)
    assert sums(other) == before
    (one / "1.txt").write_text("c")
    after = sums(one)
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)
    write(other / "0.wav", tone(pitch=1000))
    assert sums(other)[0] != before[0]


# As what


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_a_file_of_any_depth_is_the_same_sound(tmp_path, dtype):
    sound, top = tone(), {np.uint8: 127, np.int16: 2**15 - 1, np.int32: 2**31 - 1, np.float32: 1}[dtype]
    stored = np.round(sound * top) if top > 1 else sound
    wavfile.write(tmp_path / "a.wav", RATE, (stored + 128 * (dtype is np.uint8)).astype(dtype))
    made = read_waveform(tmp_path / "a.wav")
    assert (made.rate, made.num_channels) == (RATE, 1)
    assert np.abs(made.samples - sound).max() < {np.uint8: 1e-2, np.int16: 1e-4}.get(dtype, 1e-7)


def test_channels_are_averaged_and_rates_changed(tmp_path):
    left, right = tone(pitch=300), tone(pitch=500)
    write(tmp_path / "a.wav", np.stack([left, right], 1))
    made = read_waveform(tmp_path / "a.wav")
    assert made.num_channels == 2
    assert np.abs(made.samples - (left + right) / 2).max() < 1e-4
    for rate in (8000, 44100):
        new = resampled(tone(rate=rate), rate, RATE)
        assert len(new) == len(tone())
        assert np.abs(new - tone())[200:-200].max() < 2e-3


@pytest.mark.parametrize("as_processor", [False, True])
def test_the_loss_is_the_untouched_models_on_the_same_features(tmp_path, as_processor):
    """A recording at a time: features of the extractor, labels as it is fine-tuned, without the start token."""
    data, path = spoken(tmp_path / "data"), saved(tmp_path / "model", as_processor=as_processor)
    spec = DataSpec(str(data), num_samples=3, batch_size=2, compute_dtype="float64")
    opened = OpenedModel.of(spec, path)
    loss, made = opened.loss(spec)
    model = load_model(path, dtype="float64")
    tokenizer = transformers.WhisperTokenizer.from_pretrained(path)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(path)
    total = count = 0.0
    for i, said in enumerate(SAID):
        rate, stored = wavfile.read(data / f"{i}.wav")
        features = extractor(stored / 32768, sampling_rate=rate, return_tensors="pt")["input_features"].double()
        ids = tokenizer(said)["input_ids"]
        assert ids[:2] == [START, TOKENS.index("<|notimestamps|>")]
        labels = torch.tensor([ids[1:]])
        with torch.no_grad():
            total += float(model(input_features=features, labels=labels).loss) * labels.numel()
        count += labels.numel()
    assert float(loss(opened.net.theta)) == pytest.approx(total / count, rel=1e-6)
    assert loss.criterion is fs.seq2seq_lm
    assert made.num_scored == made.num_tokens == count
    assert [batch["labels"].dtype for batch in made.batches] == [torch.int64] * 2
    assert "3 recordings of 1.5 s in 2 batches" in str(made)


def test_what_is_done_to_recordings_is_counted(tmp_path):
    path, data = saved(tmp_path / "model"), spoken(tmp_path / "data")
    write(data / "1.wav", tone(1.2))
    write(data / "2.wav", np.stack([tone(rate=8000)] * 2, 1), rate=8000)
    made = batches(data, path, max_seq_length=4)
    assert (made.num_samples, made.num_truncated, made.num_scored) == (2, 1, 3 + 4)
    assert str(made) == (
        "2 recordings of 0.8 s in 1 batch: 7 tokens, 7 scored; 1 truncated; features by the model's "
        "preprocessor_config.json; 1 resampled to 16000 Hz; 1 of several channels, averaged; 1 longer than 1 s, left out"
    )
    whole, cut = (batches(data, path, max_seq_length=n).batches[0]["labels"].tolist() for n in (20, 4))
    assert cut == [[*row[:4]] for row in whole]  # the first ones, and no end where the transcript goes on
    write(data / "1.wav", tone(1.0))
    assert batches(data, path).num_samples == 3


def test_the_random_generator_is_not_touched(tmp_path):
    path, data = saved(tmp_path / "model"), spoken(tmp_path / "data", 1)
    before = torch.get_rng_state()
    batches(data, path)
    assert torch.equal(torch.get_rng_state(), before)


# A study


@pytest.mark.parametrize("command", ["directional", "curvature"])
@pytest.mark.slow
def test_commands_take_a_folder_of_recordings(tmp_path, capsys, command):
    data, path = spoken(tmp_path / "data"), saved(tmp_path / "model")
    few = {"directional": ["--samples", "3"], "curvature": ["--set", "hessian_eigenvalues.num=1"]}[command]
    out = tmp_path / "out"
    assert main([command, str(path), "--data", str(data), "--out", str(out), "--batch-size", "2", *few]) == 0
    assert "3 recordings" in (out / "report.html").read_text()
    assert "failed" not in capsys.readouterr().out


@pytest.mark.slow
def test_stored_results_are_those_of_the_recordings(tmp_path, capsys):
    data, path = spoken(tmp_path / "data"), saved(tmp_path / "model")
    command = ["analyze", str(path), "--data", str(data), "--out", str(tmp_path / "out"), "--metrics", "mean_loss"]

    def value():
        assert main(command) == 0
        return "reused" in capsys.readouterr().out

    first, again = value(), value()
    (data / "0.txt").write_text("c c c")
    assert (first, again, value()) == (False, True, False)


# Bad input


def test_recordings_and_transcripts_that_do_not_fit(tmp_path):
    path, data = saved(tmp_path / "model"), spoken(tmp_path / "data", 2)
    (data / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"1.wav has no transcript: .* into 1.txt beside it"):
        batches(data, path)
    (data / "1.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"1.wav has no transcript"):
        batches(data, path)
    for table, message in (
        ("file_name,said\n0.wav,a\n", r"line 2: no transcript in 'transcription'; .*`field`.*'file_name', 'said'"),
        ("file_name,text\n0.wav,\n", "line 2: no transcript in 'text'"),
        ("file_name,text\n0.wav,a\n9.wav,b\n", r"line 3: there is no file '9.wav' beside metadata.csv"),
        ("file_name,text\n0.wav,a\n,b\n", "line 3: no file; .*'file_name'"),
    ):
        (data / "metadata.csv").write_text(table)
        with pytest.raises(ValueError, match=message):
            batches(data, path)
    (data / "metadata.jsonl").write_text('{"file_name": "0.wav", "text": "a"}')
    with pytest.raises(ValueError, match=r"both metadata.csv and metadata.jsonl: leave one"):
        batches(data, path)
    for nothing in (tmp_path / "model", tmp_path / "nowhere", texts(tmp_path / "texts.jsonl")):
        with pytest.raises(ValueError, match=r"has no recordings|no file; every row"):
            batches(nothing, path)


def test_sound_that_is_none(tmp_path):
    path, data = saved(tmp_path / "model"), spoken(tmp_path / "data", 1)
    file = data / "0.wav"
    whole = file.read_bytes()
    for bad in (b"", b"RIFF", b"no sound", whole[:-2000], whole[:30]):
        file.write_bytes(bad)
        with pytest.raises(
            ValueError, match=r"0.wav is damaged or no sound that is read.*convert it again, or take"
        ) as said:
            batches(data, path)
        assert "unpack" not in str(said.value)
    wavfile.write(file, RATE, np.zeros(0, np.int16))
    with pytest.raises(ValueError, match=r"0.wav has 0 samples at 16000 Hz"):
        batches(data, path)
    wavfile.write(file, RATE, np.array([0.0, np.nan], np.float32))
    with pytest.raises(ValueError, match=r"0.wav has samples that are not finite"):
        batches(data, path)
    write(file, tone(1.5))
    with pytest.raises(ValueError, match=r"all recordings in .* are longer than the 1 s that the model hears"):
        batches(data, path)


def test_models_and_extractors_that_do_not_fit(tmp_path):
    data = spoken(tmp_path / "data", 1)
    for changes, message in (
        ({"feature_size": 80}, r"80 bins and 100 frames, and the model takes 8 and 100"),
        ({"chunk_length": 30}, r"8 bins and 3000 frames"),
        ({"dither": 1e-4}, r"adds noise to the sound .*set `dither` to 0.0"),
    ):
        path = saved(tmp_path / "model", **changes)
        with pytest.raises(ValueError, match=message):
            batches(data, path)
    with pytest.raises(ValueError, match=r"`max_seq_length` is 21, .* has 20 positions"):
        batches(data, path, max_seq_length=21)
    with pytest.raises(ValueError, match=r"which takes recordings and no texts: .*`speech_batches`"):
        make_batches([], load_tokenizer(path, whisper()), whisper(), task="speech")
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config.json, .*save_pretrained"):
        batches(data, path)
    (path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"the feature extractor in .* cannot be loaded"):
        batches(data, path)


@pytest.mark.skipif(importlib.util.find_spec("soundfile") is None, reason="soundfile is not installed")
def test_other_formats_are_the_same_sound(tmp_path):
    import soundfile

    soundfile.write(tmp_path / "a.flac", tone(), RATE)
    write(tmp_path / "a.wav", tone())
    one, other = (read_waveform(tmp_path / name) for name in ("a.flac", "a.wav"))
    assert_close(torch.from_numpy(one.samples), torch.from_numpy(other.samples), rtol=0, atol=1e-4)
    (tmp_path / "b.flac").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"b.flac is damaged or no sound"):
        read_waveform(tmp_path / "b.flac")


def test_without_soundfile_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "a.flac").write_bytes(b"none")
    with pytest.raises(ImportError, match=r"needs soundfile: install it with `pip install 'funcscope\[audio\]'`"):
        read_waveform(tmp_path / "a.flac")


@pytest.mark.slow
def test_a_text_model_says_what_it_takes(tmp_path, capsys):
    data, path = spoken(tmp_path / "data"), saved_text_model(tmp_path / "gpt2")
    assert main(["directional", str(path), "--data", str(data), "--out", str(tmp_path / "out")]) != 0
    said = capsys.readouterr()
    assert "Whisper" in said.out + said.err
