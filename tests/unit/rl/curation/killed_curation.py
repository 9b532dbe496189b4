"""A curation to kill: ``python killed_curation.py SLEEP_S FLAGS...``, its engine a script."""

import sys

from megatron_k2.rl.curation.command import curate
from tests.unit.engine.scripted_engine import ByteFormat, ScriptedEngine


def answers(prompt) -> list[int]:
    """Prefer A twice, then B twice: right in a sixth of the tasks."""
    return [*b'{"verdicts": ["A", "A", "B", "B"]}', 0]


if __name__ == "__main__":
    engine = ScriptedEngine(answers, step_s=float(sys.argv[1]))
    curate(sys.argv[2:], lambda folder, args: (engine, ByteFormat()))
