"""Two tasks in language: prose and code of the standard library, a model of both, and one fine-tuned on each.

Byte-level causal language models with the architecture of Llama, saved as ordinary Hugging Face folders with the texts
beside them. The prose is what docstrings say, the code the source without them.
"""

from .model import make, tokenizer
from .texts import data, modules, read, texts_of
from .training import Point, losses, steps_of, train, windows
from .variants import BASE, KINDS, NAMES, Config

__all__ = [
    "BASE", "KINDS", "NAMES", "Config", "Point", "data", "losses", "make", "modules", "read", "steps_of", "texts_of",
    "tokenizer", "train", "windows",
]  # fmt: skip
