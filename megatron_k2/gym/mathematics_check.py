"""Whether two mathematical answers are the same, by math-verify; imported by verifiers alone.

Each answer is one expression, read whole: math-verify's search for expressions in prose, which
takes any of many candidates, gets a text that leaves it no choice. Its own limits of time rest on
signals and are off: the pool kills.

Known limits, math-verify's: floats agree to six decimals; ``(1, 2)`` is an interval or a pair,
whichever the gold answer needs; 50 % and 50 are equal; an inequality is no answer to an interval,
as it could be the question's own.
"""

from __future__ import annotations

import logging
from typing import Any

from megatron_k2.compat import optional

optional("math_verify").require()

import sympy  # noqa: E402
from math_verify import LatexExtractionConfig, parse, verify  # noqa: E402

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off

# Only a box is looked for.
_BOX = (LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0),)


def equal(gold: str, answer: str) -> bool:
    """Return whether an answer equals the gold one; both LaTeX or plain, without a box.

    An answer that cannot be read is equal only where it is the same text as the gold one.

    Raises:
        ValueError: the gold answer is empty.
    """
    if not gold.strip():
        raise ValueError("the gold answer is empty")
    if _plain(gold) == _plain(answer):
        return True
    expected, found = _read(gold), _read(answer)
    if expected is None or found is None or _undefined(found):
        return False
    return bool(verify(expected, found, timeout_seconds=None, raise_on_error=True))


def _read(text: str) -> Any:
    """Return a sympy expression, or None where the text is none."""
    text = text.replace("\\$", "")  # money
    if "$" in text or "answer" in text.casefold():  # what makes math-verify look elsewhere
        return None
    found = parse(f"\\boxed{{{text}}}", _BOX, fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if len(found) == 1 else None


def _undefined(found: Any) -> bool:
    return bool(getattr(found, "has", lambda *_: False)(sympy.nan, sympy.zoo))


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


# The parser learns its grammar as it reads; the first reading of a form takes half a second, which
# belongs to the import and not to a call.
for _text in ("blue", "\\frac{1}{2}", "\\{1, 2\\}", "[0, 1)", "x^{2}+2x+1", "2\\sqrt{3}", "0.5"):
    equal(_text, "1")
