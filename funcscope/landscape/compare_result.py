"""What `compare_directional` returns: paired differences of two models with intervals, tests and effect sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from ..core.estimate import Crossed, Estimate, p_value
from ..core.keys import Key
from ..core.result import Derived, Result, derived, internal, quantity
from ..core.statistics import Signs
from ..core.tables import Entry
from .caveats import note
from .directional_columns import scaled


class Pairs(Result):
    """What is known, over directions and the data being fixed, of a quantity that every direction has of its own."""

    correlation: Estimate = quantity("correlation of the two models' samples")
    """Pearson's r: what pairing takes out of the difference."""
    wilcoxon: float = quantity("smaller signed rank sum")
    """The smaller of the two signed rank sums."""
    p_value: float = quantity("p of the signed-rank test", name="wilcoxon_p_value")
    """Wilcoxon's, over directions alone."""
    rank_biserial: Estimate = quantity("rank-biserial correlation")
    cohen_dz: Estimate = quantity("difference over its sd")
    signs: Signs = internal()
    """How many differences are above and below 0, and the exact binomial p value."""

    @derived("sign test", name="*")
    def sign_test(self) -> dict[str, int | float]:
        return dict(zip(("n_above", "n_below", "sign_p_value"), self.signs, strict=True))


class Difference(Result):
    """One statistic of two models, and its difference, second - first, over the pairs that are finite in both.

    Where terms per sequence are known, the three are `Crossed`: with an error over sequences, too, paired in the difference.
    """

    first: Estimate = quantity("first")
    second: Estimate = quantity("second")
    difference: Estimate = quantity("difference")
    interval: tuple[float, float] = internal()
    """From the error over directions and sequences together; from that over directions where the other is not known."""
    num_lost: int = quantity("pairs left out", name="n_lost", shown=False)
    """Pairs left out because the quantity is not finite in one of the two, or in both."""
    pairs: Pairs | None = internal()
    """None for the statistics that are no means over directions."""

    @derived("ends of the interval", name="*")
    def ends(self) -> dict[str, float]:
        return dict(zip(("difference_low", "difference_high"), self.interval, strict=True))

    @derived("pairs", name="n_pairs", shown=False)
    def num_pairs(self) -> int:
        return self.difference.num

    @derived("p of Student's t test")
    def p_value(self) -> float:
        """Two-sided, of Student's t test that the difference is 0; its error is that of `interval`."""
        return p_value(self.difference)

    @property
    def has_data_error(self) -> bool:
        return isinstance(self.difference, Crossed) and bool(self.difference.stderr_data.isfinite())

    @derived("gain by pairing")
    def pairing_gain(self) -> float:
        """Variance of the difference if the two were sampled apart, over that of the paired one; inf where that is 0.

        So many times the directions would be needed without pairing; nan where both variances are 0 or undefined.
        """
        apart = self.first.stderr.square() + self.second.stderr.square()
        return float(apart / self.difference.stderr.square())

    def without_error(self) -> Difference:
        """The same without errors and tests."""
        pairs, nan = self.pairs, math.nan
        if pairs is not None:
            pairs = replace(pairs, p_value=nan, signs=pairs.signs._replace(p_value=nan))
        return replace(self, difference=scaled(self.difference, 1.0, math.nan), interval=(nan, nan), pairs=pairs)

    def entries(self, only: str | None = None) -> Iterator[Entry]:
        """With those of the pairs; the test is about means."""
        of_pairs = () if self.pairs is None else self.pairs.entries(only)
        own = (entry for entry in super().entries(only) if self.pairs is not None or entry.name != "p_value")
        return chain(own, of_pairs)


def _per_statistic(label: str, column: Callable[[Difference], Any]) -> Derived[list[Any]]:
    """A column of a comparison's table."""
    return derived(label, per="statistic")(lambda comparison: list(map(column, comparison.differences.values())))


class Comparison(Result):
    """Two models along the same directions; made by `compare_directional`, whose docstring says what the numbers mean.

    `differences` has one entry per statistic, by its documented name; the columns `first` to `rank_biserial` are theirs, nan
    where a statistic has no such test.
    """

    names: tuple[str, str] = internal()
    level: float
    differences: dict[str, Difference] = internal()
    baseline_losses: tuple[float, float] = internal()
    num_directions: int = quantity("directions", name="n_directions", shown=False)
    normalize: str
    distribution: str
    span: float
    key: Key
    num_sequences: int = quantity("sequences", name="n_sequences", shown=False, default=0)
    relative_step: float = math.nan
    """The larger of the two."""
    truncation: Estimate | None = quantity(
        "what the step adds to the difference of mean curvatures",
        name="curvature_mean_truncation",
        default=None,
        shown=False,
    )
    """What the step does to the difference of the mean curvatures; None for exact ones."""
    step_notes: tuple[str | None, str | None] = internal(default=(None, None))
    """What each result says of its step and its curvatures."""

    first = _per_statistic("first model", lambda each: each.first)
    second = _per_statistic("second model", lambda each: each.second)
    difference = _per_statistic("second - first, with its whole error", lambda each: each.difference)
    over_directions = _per_statistic("its error over directions", lambda each: float(each.difference.stderr))
    low = _per_statistic("lower end of its interval", lambda each: each.interval[0])
    high = _per_statistic("upper end of its interval", lambda each: each.interval[1])
    p_value = _per_statistic("p of Student's t test", lambda each: each.p_value if each.pairs else math.nan)
    rank_biserial = _per_statistic(
        "rank-biserial correlation", lambda each: float(each.pairs.rank_biserial.value) if each.pairs else math.nan
    )

    @derived("p values", name="n_tests", shown=False)
    def num_tests(self) -> int:
        """How many p values there are, none of them corrected for the others."""
        return sum(difference.pairs is not None for difference in self.differences.values())

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"statistic": list(self.differences)}

    def asdict(self) -> dict[str, Any]:
        """A flat dictionary: `delta_mean_first`, `..._second`, `..._difference`, each with `_stderr`, and so on.

        Plain numbers and strings; statistics that one of the two results does not have are absent.
        """
        values = {name: value for name, value in super().asdict().items() if not isinstance(value, list)}
        for which, name, loss in zip(("first", "second"), self.names, self.baseline_losses, strict=True):
            values |= {f"name_{which}": name, f"baseline_loss_{which}": loss}
        for statistic, difference in self.differences.items():
            values |= {f"{statistic}_{name}": value for name, value in difference.asdict().items()}
        return values

    @property
    def head(self) -> str:
        first, second = self.names
        return (
            f"{second} - {first}, paired over {self.num_directions} {self.normalize}-normalised {self.distribution} "
            f"directions at span {self.span:g}, {self.key!r}; {100 * self.level:g} % intervals"
        )

    @property
    def notes(self) -> list[str]:
        every = self.differences.items()
        listed = {
            "signed-rank test (Wilcoxon), over directions on these data alone": [
                f"{name} {each.pairs.p_value:.2g}" for name, each in every if each.pairs
            ],
            "no error over directions, and with it no interval and no p": [
                name for name, each in every if each.difference.stderr.isnan()
            ],
            "no error over sequences is known, interval and p are about these data alone": [
                name for name, each in every if not each.has_data_error
            ],
            "not told from 0 by their intervals; signs over directions": self._signs(),
            "pairs lost to non-finite values": [f"{name} {each.num_lost}" for name, each in every if each.num_lost],
        }
        return [
            "p and interval: Student's t, from the errors over directions and over sequences together; not corrected for "
            f"{self.num_tests} quantities tested.",
            *(f"{what}: {', '.join(names)}" for what, names in listed.items() if names),
            *(f"{name}: {text}" for name, text in zip(self.names, self.step_notes, strict=True) if text),
            *filter(None, [note("large step", relative=self.relative_step)]),
        ]

    def _signs(self) -> list[str]:
        """How many differences are on either side, of quantities whose interval holds 0."""
        return [
            "{} {} up, {} down (p = {:.2g})".format(name, *each.pairs.signs)
            for name, each in self.differences.items()
            if each.pairs is not None and each.interval[0] <= 0 <= each.interval[1] and each.pairs.signs.p_value < 1
        ]
