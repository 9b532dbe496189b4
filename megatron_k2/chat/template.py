"""Kimi K2's chat format: messages to segments in which control tokens and content are kept apart.

The rules are those of the ``chat_template.jinja`` of K2-Instruct, K2-Instruct-0905 and K2-Thinking
and of the released tokenizer class, which sorts the keys of tool declarations; the words are in
``templates/``, each with its sources. No white space stands between messages, with one exception:
in K2 a line feed follows the default system message.

What a message says can never become a control token. Each segment knows whose it is, so that loss
masks and ledgers need no second parser. Left out: images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from megatron_k2.chat.segments import (
    Owner,
    Segment,
    generation_prompt,
    message_segments,
    opening,
)
from megatron_k2.chat.template_files import Template, load_template
from megatron_k2.chat.tokenizer import KimiTokenizer, scalar_text

KIMI_K2 = load_template("kimi-k2")
Message = Mapping[str, Any]
Keep = Literal["released", "answer", "all"]
"""Whose reasoning stays: ``released``, of messages after the last answer without tool calls;
``answer``, the same as it was before the last message, which keeps its own, as the model said it;
``all``, everyone's."""


def segments(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    *,
    template: Template = KIMI_K2,
    keep: Keep = "released",
) -> list[Segment]:
    """Return a dialogue as control tokens and the texts between them.

    Args:
        messages: ``role`` and ``content``; an assistant's ``reasoning_content`` and ``tool_calls``
            with ``id`` and ``function`` (``arguments`` a JSON string or an object); a tool's
            ``tool_call_id``. ``name`` takes the place of the role in the text.
        tools: declarations in OpenAI's form.
        add_generation_prompt: end with the head of an assistant's message.
        template: whose words.
        keep: which messages keep their reasoning, where the template has it.

    Raises:
        ValueError: content that is neither text nor a list of texts, or a malformed tool call.
    """
    found = opening(messages, tools, template)
    last = _last_stripped(messages, keep)
    for turn, message in enumerate(messages):
        found += message_segments(message, turn, template, keeps_reasoning=turn > last)
    if add_generation_prompt:
        found += generation_prompt(len(messages), template)
    return found


def without_old_reasoning(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages without the reasoning that the release leaves out."""
    last = _last_stripped(messages, "released")
    return [
        {key: value for key, value in one.items() if turn > last or key != "reasoning_content"}
        for turn, one in enumerate(messages)
    ]


def render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    *,
    template: Template = KIMI_K2,
    keep: Keep = "released",
) -> str:
    """Return a dialogue as one string; see ``segments``."""
    parts = segments(messages, tools, add_generation_prompt, template=template, keep=keep)
    return "".join(part.text for part in parts)


def encode(tokenizer: KimiTokenizer, parts: Sequence[Segment]) -> list[int]:
    """Return the ids of segments; only control segments give special ids."""
    ids: list[int] = []
    for found, _ in encode_runs(tokenizer, parts):
        ids += found
    return ids


def encode_owned(
    tokenizer: KimiTokenizer, parts: Sequence[Segment]
) -> tuple[list[int], list[Owner]]:
    """Return ids and the owner of each: where a token reaches over two, the one it begins in."""
    ids: list[int] = []
    owners: list[Owner] = []
    for found, run in encode_runs(tokenizer, parts):
        ids += found
        if len(run) == 1:
            owners += [run[0].owner] * len(found)
        else:
            owners += _owners(tokenizer, found, run)
    return ids, owners


def loss_mask(owners: Sequence[Owner], reasoning: bool = True) -> list[int]:
    """Return 1 for the tokens that an assistant said, 0 for all others and for stripped messages.

    Args:
        owners: of each token.
        reasoning: False leaves reasoning and its marks out.
    """
    mask: list[int] = []
    for _, group in groupby(owners, id):  # tokens of a segment share one object
        members = list(group)
        wanted = members[0].is_produced and not members[0].is_stripped
        wanted = wanted and (reasoning or members[0].part != "reasoning")
        mask += [int(wanted)] * len(members)
    return mask


def encode_runs(
    tokenizer: KimiTokenizer, parts: Sequence[Segment]
) -> Iterator[tuple[list[int], list[Segment]]]:
    """Yield ids and the segments that they spell: one control token, or texts side by side.

    Texts side by side are encoded as one text, as the release does.
    """
    known = tokenizer.special_tokens
    run: list[Segment] = []
    for part in parts:
        if not part.is_control or (part.owner.part == "reasoning" and part.text not in known):
            run.append(part)
            continue
        if run:
            yield tokenizer.encode("".join(one.text for one in run)), run
            run = []
        yield [tokenizer.special_id(part.text)], [part]
    if run:
        yield tokenizer.encode("".join(one.text for one in run)), run


def _owners(
    tokenizer: KimiTokenizer, ids: Sequence[int], run: Sequence[Segment]
) -> Iterator[Owner]:
    ends, length = [], 0
    for part in run:
        length += len(scalar_text(part.text).encode())
        ends.append(length)
    at = which = 0
    for token in ids:
        while which < len(run) - 1 and at >= ends[which]:
            which += 1
        yield run[which].owner
        at += len(tokenizer.token_bytes(token))


def _last_stripped(messages: Sequence[Message], keep: Keep) -> int:
    """Return the place of the last message whose reasoning is left out, -1 if all keep theirs."""
    if keep == "all":
        return -1
    for turn in reversed(range(len(messages) - (keep == "answer"))):
        if messages[turn]["role"] == "assistant" and not messages[turn].get("tool_calls"):
            return turn
    return -1
