"""Files of sound as one channel of samples, at whatever rate."""

from __future__ import annotations

import struct
import warnings
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from scipy.io import wavfile
from scipy.signal import resample_poly

from ..quiet import first_line

_UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    RuntimeError,
    TypeError,
    LookupError,
    struct.error,
    wavfile.WavFileWarning,
)


class Waveform(NamedTuple):
    """Sound as it was recorded."""

    samples: Float[np.ndarray, " n"]
    """The mean over channels, full scale -1 ... 1, in float64."""
    rate: int
    """Samples a second."""
    num_channels: int


def read_waveform(file: Path) -> Waveform:
    """The sound in a file: `.wav` by scipy, other formats by soundfile.

    Integers are divided by their full scale, 2^15 for 16 bits. Raises ValueError for a file that is no sound, is cut short,
    has no samples, or has ones that are not finite; ImportError for another format without soundfile.
    """
    try:
        rate, values = _wav(file) if file.suffix.lower() == ".wav" else _other(file)
    except _UNREADABLE as err:
        why = "the file ends early" if isinstance(err, (struct.error, EOFError)) else first_line(err)
        raise ValueError(
            f"{file} is damaged or no sound that is read ({why}): convert it again, or take it out."
        ) from err
    samples = _scaled(values)
    if rate <= 0 or not samples.size:
        raise ValueError(f"{file} has {samples.size} samples at {rate} Hz: there must be sound in it.")
    if not np.isfinite(samples).all():
        raise ValueError(f"{file} has samples that are not finite: record or convert it again.")
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    return Waveform(samples.reshape(len(samples), channels).mean(1), int(rate), channels)


def resampled(samples: Float[np.ndarray, " n"], rate: int, new: int) -> Float[np.ndarray, " m"]:
    """The same sound at another rate: up and down by whole numbers, a low pass between (`scipy.signal.resample_poly`)."""
    if rate == new:
        return samples
    common = gcd(rate, new)
    return np.asarray(resample_poly(samples, new // common, rate // common))


def _wav(file: Path) -> tuple[int, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks with titles and the like
        warnings.filterwarnings("error", "Reached EOF", wavfile.WavFileWarning)
        return wavfile.read(file)


def _other(file: Path) -> tuple[int, Any]:
    try:
        import soundfile  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except (ImportError, OSError) as err:  # it looks for its library when it is imported
        raise ImportError(
            f"{file} needs soundfile: install it with `pip install 'funcscope[audio]'`, or save the sound as .wav."
        ) from err
    values, rate = soundfile.read(file, dtype="float64")
    return rate, values


def _scaled(values: Shaped[np.ndarray, "n *channels"]) -> Float[np.ndarray, "n *channels"]:
    if values.dtype == np.uint8:
        return (values.astype(np.float64) - 128) / 128
    if np.issubdtype(values.dtype, np.integer):
        return values / -float(np.iinfo(values.dtype).min)
    return values.astype(np.float64)
