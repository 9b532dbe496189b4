"""What control tokens do in an answer: ids to their meaning for a template and a tokenizer."""

from __future__ import annotations

from enum import Enum, auto

from megatron_k2.chat.template_files import Template
from megatron_k2.chat.tokenizer import KimiTokenizer


class Mark(Enum):
    """What a control token does."""

    THINK = auto()
    END_THINK = auto()
    SECTION = auto()
    END_SECTION = auto()
    CALL = auto()
    ARGUMENTS = auto()
    END_CALL = auto()
    END = auto()


def marks_of(tokenizer: KimiTokenizer, template: Template) -> dict[int, Mark]:
    """Return the marks that a tokenizer has ids for, under all names that a template reads."""
    calls = template.calls
    names = {
        Mark.SECTION: calls.section_begin,
        Mark.END_SECTION: calls.section_end,
        Mark.CALL: calls.call_begin,
        Mark.ARGUMENTS: calls.arguments_begin,
        Mark.END_CALL: calls.call_end,
        Mark.END: template.stop,
    }
    if template.reasoning:
        names[Mark.THINK], names[Mark.END_THINK] = ((name,) for name in template.reasoning)
    known = tokenizer.special_tokens
    return {known[name]: mark for mark, all_ in names.items() for name in all_ if name in known}
