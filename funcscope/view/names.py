"""Names as figures and pages show them: as plain text, and as short as they can be told apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

BETWEEN = " to "
"""Between the two names of a pair."""


def plain(text: str) -> str:
    """Text that plotly shows as it is: it takes tags for markup otherwise, and what is between dollars for TeX.

    >>> plain("<b> & $x$")
    '&lt;b&gt; &amp; &#36;x&#36;'
    """
    return escape(text, quote=False).replace("$", "&#36;")


def short(name: str, most: int = 22) -> str:
    """A name for a figure: its beginning and its end.

    >>> short("llama"), short("llama-finetuned-on-everything-step-1000")
    ('llama', 'llama-fin…ng-step-1000')
    """
    if len(name) <= most:
        return name
    head = most // 2 - 2
    return f"{name[:head]}…{name[head + 1 - most :]}"


def apart(names: Sequence[str]) -> list[str]:
    """Names of models, full paths by as many of their last parts as tell them apart; those of a pair, too.

    >>> apart(["/data/a/last", "/data/b/last", "gpt2"]), apart(["/runs/a@1 to /runs/a@20"])
    (['a/last', 'b/last', 'gpt2'], ['a@1 to a@20'])
    """
    pieces = list(dict.fromkeys(piece for name in names for piece in name.split(BETWEEN)))
    split = {
        piece: piece.rstrip("/").split("/") if piece.startswith(("/", "~/", "./", "../")) else [piece]
        for piece in pieces
    }
    for num in range(1, max(map(len, split.values()), default=1) + 1):
        ends = {piece: "/".join(parts[-num:]) for piece, parts in split.items()}
        if len(set(ends.values())) == len(pieces):
            break
    return [BETWEEN.join(ends[piece] for piece in name.split(BETWEEN)) for name in names]


def labels(names: Sequence[str], most: int = 30) -> list[str]:
    """Names for an axis: without the first word where most have it in common, and shortened.

    >>> labels(["model.layers.0", "model.layers.1", "lm_head"])
    ['layers.0', 'layers.1', 'lm_head']
    """
    first = Counter(name.partition(".")[0] for name in names if "." in name and " " not in name).most_common(1)
    common = f"{first[0][0]}." if first and 2 * first[0][1] > len(names) > 1 else ""
    shorter = [short(name.removeprefix(common), most) for name in names]
    return shorter if len(set(shorter)) == len(set(names)) else [short(name, most) for name in names]
