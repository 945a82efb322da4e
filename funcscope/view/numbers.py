"""Numbers in the characters of print: three digits, an error with two, powers of ten where they help."""

from __future__ import annotations

import math
import re

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; "undefined" for None and nan.

    >>> number(11.4838), number(17405.2), number(6.173e-8), number(None)
    ('11.5', '17,400', '6.17 × 10⁻⁸', 'undefined')
    """
    if value is None or math.isnan(value):
        return "undefined"
    if value == 0 or math.isinf(value):
        return typeset(f"{value:g}")
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    if not -4 < int(power) < 6:
        return typeset(f"{mantissa}e{power}")
    return typeset(f"{float(f'{mantissa}e{power}'):,.{max(0, digits - 1 - int(power))}f}")


def with_error(value: float | None, stderr: float | None) -> str:
    """A value and its standard error, to two digits of the error; the value alone where the error is undefined.

    So it is where the error is below 1e-9 of the value, which is rounding in the computation of either.

    >>> with_error(11.4838, 0.1971), with_error(6.17889e-05, 3.0534e-06), with_error(17401.2, 2901.0)
    ('11.48 ± 0.20', '(6.18 ± 0.31) × 10⁻⁵', '17,400 ± 2,900')
    """
    stderr = math.nan if stderr is None else stderr
    if value is None or not math.isfinite(value + stderr) or stderr <= 1e-9 * abs(value):
        return number(value)
    power = math.floor(math.log10(max(abs(value), stderr)))
    power = 0 if -4 < power < 6 else power
    decimals = 1 - int(f"{stderr / 10.0**power:.1e}".split("e")[1])
    both = " ± ".join(f"{round(x / 10.0**power, decimals):,.{max(0, decimals)}f}" for x in (value, stderr))
    return typeset(both if power == 0 else f"({both})e{power:+03d}")


def typeset(text: str) -> str:
    """Numbers of a terminal with the signs of print: minus, powers of ten, infinity.

    >>> typeset("-1.5e-05, GPT-2, (6.18 ± 0.31)e+07, -inf to 3")
    '−1.5 × 10⁻⁵, GPT-2, (6.18 ± 0.31) × 10⁷, −∞ to 3'
    """
    text = re.sub(r"(?<=[\d)])e([+-]\d+)\b", lambda power: f" × {power_of_ten(int(power[1]))}", text)
    return re.sub(r"(?<![\w.)-])-(?=[\d∞])", "−", re.sub(r"\binf\b", "∞", text))


def setting(value: float) -> str:
    """A number that somebody has chosen: as short as it is, six digits at most.

    >>> setting(0.1), setting(0.09999999941), setting(2e-5), setting(1500.0)
    ('0.1', '0.1', '2 × 10⁻⁵', '1,500')
    """
    return re.sub(r"(\.\d*?)0+(?!\d)", r"\1", number(value, 6)).replace(". ", " ").removesuffix(".")


def power_of_ten(power: int) -> str:
    """A power of ten in plain characters.

    >>> power_of_ten(-4), power_of_ten(0)
    ('10⁻⁴', '1')
    """
    return f"10{str(power).translate(_RAISED)}" if power else "1"
