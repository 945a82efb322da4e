"""Batches of features and labels from recordings, as one model of speech takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoFeatureExtractor, PreTrainedModel, PreTrainedTokenizerBase, WhisperFeatureExtractor

from ...core.checks import check_count
from ...core.criterion import IGNORE
from ...core.tables import counted
from ..adapter import base_of, is_adapter
from ..quiet import one_line, quiet
from ..recordings import ENDINGS, FILE, Recording, recordings
from .batches import Data, rectangle
from .text import Example
from .tokens import Tokens, check_length, embedding_rows, tokenise
from .waveforms import read_waveform, resampled

EXTRACTORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, eq=False)
class SpeechData(Data):
    """Batches of `input_features` (batch, mel bins, frames) and `labels` (batch, tokens); made by `speech_batches`."""

    seconds: float = 0.0
    """Of sound, without the silence after it."""

    def __str__(self) -> str:
        each = f"{counted(self.num_samples, 'recording')} of {self.seconds:.1f} s"
        return (
            f"{each} in {counted(len(self.batches), 'batch', 'batches')}: {counted(self.num_tokens, 'token')}, "
            f"{self.num_scored} scored; {self.num_truncated} truncated; {self.limit}"
        )


class _Heard(NamedTuple):
    features: Float[Tensor, "bins frames"] | None
    """None: too long."""
    seconds: float
    resampled: bool
    averaged: bool


def speech_batches(
    data: str | Path,
    model: PreTrainedModel,
    model_folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str = "text",
    split: str = "train",
    num_samples: int = 64,
    max_seq_length: int = 128,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
) -> SpeechData:
    """The first `num_samples` recordings of a folder or a table (`recordings`) for an encoder-decoder of speech (Whisper).

    Features are what the extractor in the model's folder makes of the sound: the mean over channels, at the extractor's rate,
    silence after it. A recording longer than the extractor's window is left out and counted, as its transcript would say what
    is not heard. Labels are all that the tokenizer makes of the transcript, without the token by which the decoder starts
    anyway, cut to the first `max_seq_length`, -100 at padding; tokens of language and task are scored where it adds them.
    What is cut has no token of its end.

    Raises FileNotFoundError where the folder has no extractor, ImportError as `read_waveform`, ValueError for an extractor of
    another model or with dither, a length that the decoder does not have, data without recordings or with none short enough,
    and whatever `recordings` and `read_waveform` refuse.
    """
    check_count("num_samples", num_samples)
    check_count("batch_size", batch_size)
    check_length("max_seq_length", max_seq_length, model, tokenizer)
    extractor = _extractor(Path(model_folder), model)
    chosen = _chosen(data, num_samples, field, split)
    said = tokenise(_examples(chosen), tokenizer, embedding_rows(model), None)
    pairs = [(_heard(each, extractor), tokens) for each, tokens in zip(chosen, said, strict=True)]
    short = [(heard, tokens) for heard, tokens in pairs if heard.features is not None]
    most = extractor.n_samples / extractor.sampling_rate
    if not short:
        raise ValueError(f"all recordings in {data} are longer than the {most:g} s that the model hears: cut them.")
    whole = [_labels(tokens, model) for _, tokens in short]
    labels = [each[:max_seq_length] for each in whole]
    limits = [
        f"features by the model's {_file(Path(model_folder)).name}",
        *_done([heard for heard, _ in short], extractor.sampling_rate),
        _count(len(pairs) - len(short), f"longer than {most:g} s, left out"),
    ]
    return SpeechData(
        _collated([heard.features.to(dtype) for heard, _ in short if heard.features is not None], labels, batch_size),
        num_samples=len(short),
        num_tokens=sum(map(len, labels)),
        num_scored=sum(map(len, labels)),
        num_too_short=0,
        num_truncated=sum(len(each) > max_seq_length for each in whole),
        limit="; ".join(filter(None, limits)),
        seconds=sum(heard.seconds for heard, _ in short),
    )


def _chosen(data: str | Path, num: int, field: str, split: str) -> list[Recording]:
    chosen = list(recordings(data, num, field=field, split=split)) if Path(data).exists() else []
    if not chosen:
        raise ValueError(
            f"{data} has no recordings: a model of speech takes a folder or a table with files that end in "
            f"{', '.join(ENDINGS)} and transcripts: NAME.txt beside NAME.wav, or a metadata.csv with the columns {FILE} and "
            f"transcription, there or in a sub-folder {split!r}."
        )
    return chosen


def _done(short: list[_Heard], rate: int) -> Iterator[str]:
    """What was done to how many of those that are heard."""
    yield _count(sum(heard.resampled for heard in short), f"resampled to {rate} Hz")
    yield _count(sum(heard.averaged for heard in short), "of several channels, averaged")


def _examples(chosen: list[Recording]) -> Iterator[Example]:
    return (Example(each.text, where=each.where) for each in chosen)


def _labels(tokens: Tokens, model: PreTrainedModel) -> list[int]:
    """The decoder's inputs are these moved right by one, behind the token that it starts with."""
    start = model.config.decoder_start_token_id
    ids = tokens.ids[1:] if tokens.ids[:1] == [start] else tokens.ids
    if not ids:
        raise ValueError(f"{tokens.where}: the tokenizer makes no token of the transcript: it is another model's.")
    return ids


def _heard(recording: Recording, extractor: WhisperFeatureExtractor) -> _Heard:
    sound = read_waveform(recording.file)
    samples = resampled(sound.samples, sound.rate, extractor.sampling_rate)
    features, how = None, (sound.rate != extractor.sampling_rate, sound.num_channels > 1)
    if len(samples) <= extractor.n_samples:
        made = extractor(samples.astype(np.float32), sampling_rate=extractor.sampling_rate, return_tensors="pt")
        features = made["input_features"][0]
    return _Heard(features, len(samples) / extractor.sampling_rate, *how)


def _collated(features: list[Tensor], labels: list[list[int]], size: int) -> list[dict[str, Tensor]]:
    batches = []
    for start in range(0, len(labels), size):
        here = labels[start : start + size]
        padded = rectangle(here, max(map(len, here)), IGNORE)
        batches.append({"input_features": torch.stack(features[start : start + size]), "labels": padded})
    return batches


def _count(num: int, what: str) -> str:
    return f"{num} {what}" if num else ""


def _file(folder: Path) -> Path:
    """The extractor's settings, of an adapter those of its model."""
    places = [folder, base_of(folder)] if is_adapter(folder) else [folder]
    for file in (place / name for place in places for name in EXTRACTORS):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{folder} has no {EXTRACTORS[0]}, which says how sound becomes features: save it there, "
        "`WhisperFeatureExtractor.from_pretrained(MODEL).save_pretrained(FOLDER)`."
    )


def _extractor(folder: Path, model: PreTrainedModel) -> WhisperFeatureExtractor:
    file = _file(folder)
    with quiet(), one_line(f"the feature extractor in {file.parent} cannot be loaded"):
        extractor = AutoFeatureExtractor.from_pretrained(file.parent, local_files_only=True, trust_remote_code=False)
    if not isinstance(extractor, WhisperFeatureExtractor):
        raise ValueError(f"{file} is of a {type(extractor).__name__}: the model needs a WhisperFeatureExtractor.")
    if extractor.dither:
        raise ValueError(f"{file} adds noise to the sound (`dither` {extractor.dither}): set `dither` to 0.0 there.")
    config = model.config  # the first of its two convolutions keeps the length, the second halves it
    wanted = (config.num_mel_bins, 2 * config.max_source_positions)
    made = (extractor.feature_size, extractor.nb_max_frames)
    if made != wanted:
        raise ValueError(
            f"{file} makes features of {made[0]} bins and {made[1]} frames, and the model takes {wanted[0]} and {wanted[1]}: "
            "it is another model's."
        )
    return extractor
