"""The number that an answer comes to, read as a number.

`1,000`, `1000.0` and `$1 000` are the same; so are `1/2`, `0.5`, `\\frac{1}{2}`, `½` and `50%`, and
`2 million` and `2,000,000`. A dash after a digit or before a space is no sign. Units are not
read, nor are numbers in words; exponents of four digits and numbers of more than a hundred
characters count as none.
"""

import re
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 100
_NUMBER = re.compile(
    r"""
    (?<![\w^./])                            # not inside a word, a power, a version or a date
    (?P<sign>-?[$€£¥]?-?)
    (?:
        (?:(?P<whole>\d+)\ )?(?P<top>\d+)/(?P<bottom>\d+)(?![\w/])
      | (?P<digits>\d{1,3}(?:[,'\u00a0\u2009\u202f]\d{3})+(?!\d)|\d*(?=\.\d)|\d+)
        (?:[.,](?P<decimals>\d+))?
        (?:e(?P<exponent>[+-]?\d{1,3})(?!\w))?
    )
    (?:\s?(?P<unit>%|(?:percent|per\ cent|thousand|million|billion|trillion)\b))?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_QUANTITY = re.compile(rf"(?:\w+\ =\ )?{_NUMBER.pattern}[^\d\n]{{0,24}}", _NUMBER.flags)
_MARK = re.compile(
    r"(?:####|\\boxed\{|\banswer\b[^.\n\d]{0,40}?(?:\bis\b|[:=]))[ *_:\\(\[{]*(?:\w ?= ?)?", re.IGNORECASE
)
_FRACTION = re.compile(r"(\d?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_TYPOGRAPHY = str.maketrans(
    {"−": "-", "–": "-", "‒": "-", "﹣": "-", "－": "-", "⁄": "/"}
    | {"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"}
    | {"⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}"}
)
_POWERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


@dataclass(frozen=True)
class Number:
    value: Fraction
    percent: bool

    def same(self, other: "Number") -> bool:
        """Equal as written, or equal in value where one alone is a percentage."""
        if self.percent == other.percent or self.value == other.value:
            return self.value == other.value
        percent, plain = (self, other) if self.percent else (other, self)
        return percent.value / 100 == plain.value


def marked_number(text: str) -> Number | None:
    """The number that the text calls its answer: `#### 42`, `\\boxed{42}`, `the answer is 42`."""
    plain = _plain(text)
    found = [match for mark in _MARK.finditer(plain) if (match := _NUMBER.match(plain, mark.end()))]
    return _read(found[-1]) if found else None


def last_number(text: str) -> Number | None:
    last = deque(_NUMBER.finditer(_plain(text)), maxlen=1)
    return _read(last[0]) if last else None


def is_quantity(text: str) -> bool:
    """Whether the text is one number with its unit and nothing else: `77.0°F`, `x = 5`, `42 apples`."""
    return _QUANTITY.fullmatch(_plain(text).strip()) is not None


def _plain(text: str) -> str:
    """Typographic and LaTeX numbers as ASCII; a fraction after a digit is part of a mixed number."""
    text = text.translate(_TYPOGRAPHY).replace("{,}", ",").replace(r"\$", "$").replace(r"\%", "%")
    return _FRACTION.sub(lambda found: f"{found[1] and found[1] + ' '}{found[2]}/{found[3]}", text)


def _read(match: re.Match[str]) -> Number | None:
    if len(match[0]) > LONGEST:
        return None
    unit = (match["unit"] or "").lower()
    if match["top"]:
        if not int(match["bottom"]):
            return None
        value = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
    else:
        digits = re.sub(r"\D", "", match["digits"]) or "0"
        value = Fraction(f"{digits}.{match['decimals'] or 0}e{match['exponent'] or 0}")
    value *= _POWERS.get(unit, 1) * (-1 if "-" in match["sign"] else 1)
    return Number(value, percent=unit.startswith(("%", "per")))
