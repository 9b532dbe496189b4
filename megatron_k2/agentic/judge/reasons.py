"""Why a trajectory is not kept: the closed list of kinds that ``Judgement.reasons`` may name.

A kind says what went wrong in the dialogue, not which check found it, so that planted faults,
rules and judges can be counted against each other.
"""

from __future__ import annotations

REASONS: dict[str, str] = {
    "wrong_tool": "a call that was needed was made to another tool",
    "wrong_argument": "the right tool was called with other arguments",
    "skipped_step": "a call or a question that was needed was not made",
    "wrong_order": "calls in another order than is needed",
    "unwanted_call": "a call that must not be made, or more calls than allowed",
    "unwanted_change": "the world was changed where it had to stay",
    "goal_not_reached": "the world is not as the task wants it at the end",
    "missing_fact": "the last answer does not say what it must",
    "unwanted_words": "the answer says what it must not, or holds the control text of calls",
    "not_asked": "the agent acted without asking the user first",
    "not_recovered": "a call lost to a fault was not made again",
    "invented_result": "the last answer has numbers or ids that no result and no user said",
    "false_claim": "the last answer reports as done what was refused, failed or never tried",
    "invalid_call": "a call against its declaration that was left so",
    "unanswered_call": "a call without a result",
    "premature_end": "no last answer to the user",
    "unfinished": "cut off by the limit of turns, by the context, or by a failure",
    "wasteful": "more calls or turns than allowed",
    "sandbox_failed": "objective evidence of the real execution speaks against it",
    "judged_unmet": "the judges found a criterion unmet",
    "undecided": "neither rules nor judges could decide a mandatory criterion",
    "unjudged": "no judgement could be had",
}

OF_FAULT: dict[str, frozenset[str]] = {
    "wrong_tool": frozenset({"wrong_tool", "skipped_step", "unwanted_call", "goal_not_reached"}),
    "wrong_argument": frozenset({"wrong_argument", "goal_not_reached", "unwanted_change"}),
    "invented_result": frozenset({"invented_result", "missing_fact", "false_claim"}),
    "skipped_step": frozenset({"skipped_step", "wrong_order", "goal_not_reached", "false_claim"}),
    "premature_end": frozenset({"premature_end", "unfinished", "skipped_step", "goal_not_reached"}),
    "policy_violation": frozenset({"not_asked", "unwanted_call", "unwanted_change", "wrong_order"}),
}
"""Which reasons name a planted fault rightly (``measure.py``)."""
