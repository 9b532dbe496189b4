"""Proves that a ledger and its template agree.

The whole dialogue is rendered at once, from the messages alone, and laid beside the ledger: what
the template wrote must have the same ids; what an engine wrote must have the same control tokens in
the same order and the same text between them. Its text may be cut into other tokens than the
tokenizer would: that is what engines do, and why nothing is tokenised again. An answer that left
the format says more than its message can; where the two differ, it is named instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.chat.ledger import Span, TokenLedger
from megatron_k2.chat.segments import Owner
from megatron_k2.chat.template import encode_owned, segments

AROUND = 8  # tokens shown before and after a divergence
SHOWN = 24  # characters shown before and after a divergence of texts


@dataclass(frozen=True)
class Agreement:
    """What was compared.

    Attributes:
        num_rendered: tokens with the ids of the template.
        num_engine: engine tokens with the text and the control tokens of their messages.
        num_recut: of these, tokens in answers that the tokenizer would cut otherwise.
        malformed_turns: answers outside the format that could not be compared.
    """

    num_rendered: int
    num_engine: int
    num_recut: int
    malformed_turns: tuple[int, ...]


def agreement(ledger: TokenLedger) -> Agreement:
    """Compare a ledger with its messages rendered whole.

    Args:
        ledger: an answer that is under way is left out.

    Raises:
        ValueError: they differ, and not because of a malformed answer; the message has the turn,
            the token and what stands around it on both sides.
    """
    format = ledger.format
    parts = segments(ledger.messages, ledger.tools, template=format.template, keep="all")
    turns = _by_turn(*encode_owned(format.tokenizer, parts))
    num_messages = len(ledger.messages)
    found = list(dict.fromkeys(span.turn for span in ledger.spans))
    if found != [*range(-1, num_messages), *([num_messages] if ledger.is_answering else [])]:
        raise ValueError(f"the ledger has the turns {found}, the dialogue {num_messages} messages")
    rendered = engine = recut = 0
    malformed = []
    for turn, group in groupby(ledger.spans, lambda span: span.turn):
        spans = list(group)
        if turn >= num_messages:
            break  # an answer under way
        head, rest = turns.get(turn, ([], []))
        answer = next((span for span in spans if span.writer == "engine"), None)
        if answer is None:
            _same_ids(ledger, spans[0], head + rest)
            rendered += len(head + rest)
            continue
        _same_ids(ledger, spans[0], head)
        end = format.tokenizer.special_id(format.template.end)
        for span in spans[2:]:
            _same_ids(ledger, span, [end])
        if turn < found[-1] and ledger.ids[spans[-1].end - 1] != end:
            raise ValueError(f"turn {turn} of the ledger does not end, and the dialogue goes on")
        rendered += sum(span.end - span.begin for span in spans if span is not answer)
        said = _without_end(format, ledger.ids[answer.begin : answer.end])
        meant = _without_end(format, rest)
        divergence = _different_text(format, answer, said, meant)
        if divergence is None:
            engine += answer.end - answer.begin
            recut += (answer.end - answer.begin) * (said != meant)
        elif answer.problems:
            malformed.append(turn)
        else:
            raise ValueError(divergence)
    return Agreement(rendered, engine, recut, tuple(malformed))


def _by_turn(ids: Sequence[int], owners: Sequence[Owner]) -> dict[int, tuple[list[int], list[int]]]:
    """Return the ids of each turn: of its head, and after it."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for token, owner in zip(ids, owners, strict=True):
        head, rest = found.setdefault(owner.turn, ([], []))
        (head if owner.part == "head" and owner.turn >= 0 else rest).append(token)
    return found


def _same_ids(ledger: TokenLedger, span: Span, expected: Sequence[int]) -> None:
    found = ledger.ids[span.begin : span.end]
    if found == expected:
        return
    pairs = zip_longest(found, expected)
    at = next(place for place, (a, b) in enumerate(pairs) if a != b)
    decode = ledger.format.decode
    first, last = max(0, at - AROUND), at + AROUND
    raise ValueError(
        f"ledger and template differ in turn {span.turn} ({span.role}) at token {span.begin + at}: "
        f"the ledger has {found[at : at + 1]} in {decode(found[first:last])!r}, "
        f"the template {list(expected[at : at + 1])} in {decode(expected[first:last])!r}"
    )


def _different_text(
    format: KimiFormat, span: Span, said: Sequence[int], meant: Sequence[int]
) -> str | None:
    found, lengths = _pieces(format, said)
    expected, _ = _pieces(format, meant)
    pairs = zip_longest(found, expected)
    at = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return None
    theirs, ours = ("".join(side[at:]).replace("\0", "") for side in (found, expected))
    same = (a == b for a, b in zip_longest(theirs, ours))
    off = next(place for place, equal in enumerate(same) if not equal)
    theirs, ours = (repr(one[max(0, off - SHOWN) : off + SHOWN]) for one in (theirs, ours))
    return (
        f"ledger and template differ in turn {span.turn} ({span.role}), in the text from token "
        f"{span.begin + sum(lengths[:at])}: the engine said {theirs}, its message renders as {ours}"
    )


def _pieces(format: KimiFormat, ids: Sequence[int]) -> tuple[list[str], list[int]]:
    """Return control tokens, by the name that is written, texts between them, and their lengths."""
    first = format.tokenizer.num_ranks
    written = format.template.written_names
    texts: list[str] = []
    lengths: list[int] = []
    for is_control, group in groupby(ids, lambda token: token >= first):
        members = list(group)
        for part in [[token] for token in members] if is_control else [members]:
            text = format.decode(part)
            texts.append(f"\0{written.get(text, text)}" if is_control else text)
            lengths.append(len(part))
    return texts, lengths


def _without_end(format: KimiFormat, ids: Sequence[int]) -> list[int]:
    quiet = {*format.stop_ids, format.tokenizer.pad_id}
    end = len(ids)
    while end and ids[end - 1] in quiet:
        end -= 1
    return list(ids[:end])
