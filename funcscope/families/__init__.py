"""Small real models that are trained here, and the registry of families: your own as well."""

from . import induction, modular
from .family import Family, Kept, Setup, family, register

__all__ = ["Family", "Kept", "Setup", "family", "induction", "modular", "register"]
