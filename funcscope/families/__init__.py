"""Small real models that are trained here."""

from . import modular

__all__ = ["modular"]
