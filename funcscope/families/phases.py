"""Where a run memorised and where it generalised, from its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

MEMORISED, GENERAL = 0.99, 0.5


def phases(steps: Sequence[int], curves: Mapping[str, np.ndarray] | None) -> tuple[int, int, int]:
    """The start, a checkpoint that has memorised without generalising, and the end.

    Memorised: train accuracy above 0.99, test accuracy below 0.5; the one in the middle of these. Without one, or without
    curves, the checkpoint in the middle of the run.
    """
    middle = steps[len(steps) // 2]
    if curves is None:
        return steps[0], middle, steps[-1]
    train, test = (
        dict(zip(curves["step"].astype(int).tolist(), curves[f"{split}_accuracy"].tolist(), strict=True))
        for split in ("train", "test")
    )
    memorised = [e for e in steps if train.get(e, 0.0) > MEMORISED and test.get(e, 1.0) < GENERAL]
    return steps[0], memorised[len(memorised) // 2] if memorised else middle, steps[-1]
