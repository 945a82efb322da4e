"""Numbers as a terminal prints them: three digits, an error with two, powers of ten where they help; latin-1 only."""

from __future__ import annotations

import math
from typing import TypeGuard

UNDEFINED = "undefined"


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; "undefined" for None and nan.

    >>> number(-11.4838), number(17405.2), number(6.173e-8), number(None)
    ('-11.5', '17,400', '6.17e-08', 'undefined')
    """
    if value is None or not math.isfinite(value):
        return UNDEFINED if value is None or math.isnan(value) else f"{value}"
    if value == 0:
        return "0"
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    if not -4 < int(power) < 6:
        return f"{mantissa}e{power}"
    return f"{float(f'{mantissa}e{power}'):,.{max(0, digits - 1 - int(power))}f}"


def with_error(value: float | None, stderr: float | None) -> str:
    """A value and its standard error, to two digits of the error; the value alone where the error is undefined.

    So it is where the error is below 1e-9 of the value, which is rounding in the computation of either.

    >>> with_error(11.4838, 0.1971), with_error(6.17889e-05, 3.0534e-06), with_error(17401.2, 2901.0)
    ('11.48 ± 0.20', '(6.18 ± 0.31)e-05', '17,400 ± 2,900')
    """
    if value is None or not math.isfinite(value) or not is_known(stderr) or stderr <= 1e-9 * abs(value):
        return number(value)
    power = math.floor(math.log10(max(abs(value), stderr)))
    power = 0 if -4 < power < 6 else power
    decimals = 1 - int(f"{stderr / 10.0**power:.1e}".split("e")[1])
    both = " ± ".join(f"{round(x / 10.0**power, decimals):,.{max(0, decimals)}f}" for x in (value, stderr))
    return both if power == 0 else f"({both})e{power:+03d}"


def error(stderr: float | None) -> str:
    """An error with two digits; nothing where it is unknown.

    >>> error(0.0123), error(float("nan")), error(None)
    ('0.012', '', '')
    """
    return number(stderr, 2) if is_known(stderr) else ""


def between(low: float | None, high: float | None, digits: int = 3) -> str:
    """An interval; nothing where it is unknown.

    >>> between(-1.0, 20.0), between(float("nan"), 1.0)
    ('-1.00 to 20.0', '')
    """
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    return f"{number(low, digits)} to {number(high, digits)}"


def is_known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
