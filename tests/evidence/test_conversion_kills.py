"""Heavy proof: conversions killed at fifty random moments, both ways, end in the same bytes.

The real command line on 100 MB of FP8, with its own units of 32 MB; every other round with small
ones, so that hundreds of journal lines are cut. All processes, the first only or one worker dies.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_k2.checkpoint import intact
from tests.unit.checkpoint.hf_models import make_folder
from tests.unit.checkpoint.kills import REAL, SMALL_UNITS, Conversion, all_bytes

KILLS = 50
ROUNDS = 10


@pytest.mark.evidence
def test_fifty_kills_change_no_byte(tmp_path: Path) -> None:
    source = make_folder(
        tmp_path / "hf", fp8=True, num_shards=5, hidden_size=1024, moe_intermediate_size=512,
        n_routed_experts=16, num_hidden_layers=5, num_nextn_predict_layers=1,
    )  # fmt: skip
    clock = random.Random(50)
    release, exported = tmp_path / "whole", tmp_path / "whole-hf"
    seconds = {
        "to-megatron": Conversion(REAL, "to-megatron", source, release).run(),
        "to-hf": Conversion(REAL, "to-hf", release, exported).run(),
    }
    expected = {"to-megatron": all_bytes(release), "to-hf": all_bytes(exported)}
    originals = all_bytes(source)
    del (copies := dict(expected["to-hf"]))[intact.MANIFEST]
    assert copies == originals
    kinds: list[str] = []
    for number in range(ROUNDS):
        direction = ("to-megatron", "to-hf")[number % 2]
        begun = source if direction == "to-megatron" else release
        program = SMALL_UNITS if number % 4 < 2 else REAL
        killed = Conversion(program, direction, begun, tmp_path / f"killed-{number}")
        killed.survive(KILLS // ROUNDS, seconds[direction], clock)
        assert all_bytes(killed.folder) == expected[direction]
        kinds += killed.kills
    assert len(kinds) == KILLS
    print({kind: kinds.count(kind) for kind in sorted(set(kinds))}, seconds)
