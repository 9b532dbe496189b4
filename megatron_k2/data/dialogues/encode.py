"""One dialogue to ids and the mask of what is learned, cut to the length of a row.

The ids are those of the chat template, control tokens only where the template has them
(``megatron_k2.chat``). Learned is what assistants say, its end mark included: all of them, the last
answer only, or those without ``"weight": 0``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.chat.messages import Dialogue, read_dialogue
from megatron_k2.chat.schema import check_calls
from megatron_k2.chat.template import Owner, loss_mask
from megatron_k2.data.preprocess.kimi import named_model

Truncation = Literal["turns", "cut", "drop", "error"]
TRUNCATIONS = ("turns", "cut", "drop", "error")
TOOL_CHECKS = ("count", "drop", "off")


@dataclass(frozen=True)
class Options:
    """What becomes of a dialogue.

    Attributes:
        tokenizer: Kimi's folder or rank file.
        template: one of ``megatron_k2.chat.template_files``.
        seq_length: places of a row; a dialogue of n tokens takes n - 1, as its last is no input.
        truncation: of one that is too long: ``turns`` keeps whole turns up to the last answer that
            fits, ``cut`` as many tokens as fit, ``drop`` none, ``error`` stops.
        last_answer_only: learn no other.
        learn_reasoning: learn what stands between the marks of thought.
        tool_checks: calls that the declarations do not allow are counted, ``drop`` their dialogue,
            or are not looked for.
    """

    tokenizer: str
    template: str = "kimi-k2"
    seq_length: int = 4096
    truncation: Truncation = "turns"
    last_answer_only: bool = False
    learn_reasoning: bool = True
    tool_checks: str = "count"


@dataclass
class Encoded:
    """A dialogue for training.

    Attributes:
        ids: int32 [n].
        learned: uint8 [n], 1 where predicting this token counts.
        notes: what was counted on the way, see ``DialogueEncoder.encode``.
    """

    ids: np.ndarray
    learned: np.ndarray
    notes: Counter[str] = field(default_factory=Counter)


class DialogueEncoder:
    """Encodes dialogues by one format and one set of options."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @cached_property
    def format(self) -> KimiFormat:
        """The chat format; read when it is first needed, in each process.

        Raises:
            ValueError: the tokenizer or the template cannot be used.
        """
        with named_model(self.options.tokenizer):
            return KimiFormat.load(self.options.tokenizer, self.options.template)

    def encode(self, row: Any) -> list[Encoded] | str:
        """Return a dialogue's tokens, or why it is left out.

        One sequence, unless the format drops the reasoning of earlier turns: then every answer is
        learned after what stood before it when it was given, in sequences of their own.

        Notes count ``turns``, ``answers``, ``tool calls``, ``with tools``, ``call problems``,
        ``cut`` and ``tokens cut off``.

        Raises:
            ValueError: the row is malformed, or too long under ``error``.
        """
        if not isinstance(row, dict):
            raise ValueError(f"a JSON object is needed, not {type(row).__name__}")
        dialogue = read_dialogue(row)
        notes = Counter(_counts(dialogue))
        if self.options.tool_checks != "off" and dialogue.tools:
            notes["call problems"] = len(check_calls(dialogue.messages, dialogue.tools))
            if notes["call problems"] and self.options.tool_checks == "drop":
                return "a tool call that its declaration does not allow"
        views = self.format.training_views(dialogue.messages)
        if self.options.last_answer_only:
            views = views[-1:]
        found = [self._encode_view(dialogue, begin, end) for begin, end in views]
        whole = [one for one in found if isinstance(one, Encoded)]
        if not whole:
            return str(found[-1])
        whole[0].notes += notes
        return whole

    def _encode_view(self, dialogue: Dialogue, begin: int, end: int) -> Encoded | str:
        """Return the messages up to a turn, what is said from another turn on learned."""
        notes: Counter[str] = Counter()
        ids, owners = self.format.encode_owned(dialogue.messages[:end], dialogue.tools)
        learned = self._learned(dialogue, owners, begin)
        longest = self.options.seq_length + 1
        if len(ids) > longest:
            if self.options.truncation == "error":
                raise ValueError(
                    f"{len(ids)} tokens are more than --seq-length {longest - 1} takes; give a "
                    "--truncate, or a longer row"
                )
            kept = self._kept(owners, longest)
            notes["cut"], notes["tokens cut off"] = 1, len(ids) - kept
            if not kept:
                return "too long"
            ids, learned = ids[:kept], learned[:kept]
        learned[0] = 0  # nothing stands before it
        if not learned.any():
            return "nothing to learn from"
        return Encoded(np.array(ids, dtype=np.int32), learned, notes)

    def _kept(self, owners: Sequence[Owner], longest: int) -> int:
        """Return how many tokens of a dialogue that is too long are kept."""
        if self.options.truncation == "cut":
            return longest
        if self.options.truncation == "drop":
            return 0
        # Where one message ends, and whether it is an answer.
        ends = [at + 1 for at, (a, b) in enumerate(pairwise(owners)) if a.turn != b.turn]
        return max(
            (end for end in ends if end <= longest and owners[end - 1].is_produced), default=0
        )

    def _learned(self, dialogue: Dialogue, owners: Sequence[Owner], begin: int) -> np.ndarray:
        mask = np.array(loss_mask(owners, self.options.learn_reasoning), dtype=np.uint8)
        off = {turn for turn, one in enumerate(dialogue.messages) if one.get("weight") == 0}
        off |= set(range(begin))
        if self.options.last_answer_only:
            answers = [t for t, one in enumerate(dialogue.messages) if one["role"] == "assistant"]
            off |= set(answers[:-1])
        if off:
            mask[np.fromiter((owner.turn in off for owner in owners), bool, len(owners))] = 0
        return mask


def _counts(dialogue: Dialogue) -> dict[str, int]:
    answers = [one for one in dialogue.messages if one["role"] == "assistant"]
    return {
        "turns": len(dialogue.messages),
        "answers": len(answers),
        "tool calls": sum(len(one.get("tool_calls") or ()) for one in answers),
        "with tools": int(bool(dialogue.tools)),
    }
