"""From files to batches: a local Hugging Face folder becomes a model and a tokenizer, a file of texts becomes `Data`."""

from .batches import Data, make_batches
from .pixels import ImageData, image_batches
from .pretrained import DType, Task, load_model, load_tokenizer, task_of
from .speech import SpeechData, speech_batches
from .text import Example, Unit, read_texts

__all__ = [
    "DType",
    "Data",
    "Example",
    "ImageData",
    "SpeechData",
    "Task",
    "Unit",
    "image_batches",
    "load_model",
    "load_tokenizer",
    "make_batches",
    "read_texts",
    "speech_batches",
    "task_of",
]
