"""Values of a configuration's fields: of which kind, and from where they are read."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

PREFIX = "FUNCSCOPE_"
"""Of environment variables that are fields."""


def stored_values(path: str | Path | None) -> dict[str, Any]:
    """Fields of the environment (`FUNCSCOPE_SEED=7`), then of a `.json` or `.toml` file: what is later counts."""
    named = (name for name in os.environ if name.startswith(PREFIX))
    values = {name.removeprefix(PREFIX).lower(): parsed(os.environ[name]) for name in named}
    if path is not None:
        text = Path(path).read_text(encoding="utf-8")
        values |= tomllib.loads(text) if Path(path).suffix == ".toml" else json.loads(text)
    return values


def check_kind(name: str, value: Any, default: Any) -> None:
    """A value is of the kind that the default is of."""
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false, got {value!r}.")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    whole = isinstance(default, int) and not isinstance(default, bool)
    if (isinstance(default, float) and not number) or (whole and not (number and value == int(value))):
        raise ValueError(f"`{name}` must be a {'whole ' if whole else ''}number, got {value!r}.")
    if isinstance(default, str) and not isinstance(value, str):
        raise ValueError(f"`{name}` must be text, got {value!r}.")


def parsed(text: str) -> Any:
    """A value of the command line or the environment: what JSON says, or the text itself.

    >>> parsed("0.5"), parsed("true"), parsed("filter"), parsed("1,2")
    (0.5, True, 'filter', (1, 2))
    """
    try:
        return json.loads(text)
    except ValueError:
        return tuple(map(parsed, text.split(","))) if "," in text else text
