"""The layouts of the model card, and which tests hold them: read from the tests' own lists."""

from __future__ import annotations

from typing import Any

from tests.distributed import test_conversion, test_layouts, test_muonclip

# Row of the card -> its name in test_layouts, test_muonclip, test_conversion; "" where it is not.
ROWS: dict[str, tuple[str, str, str]] = {
    "DP2": ("DP2", "dp2", "dp2"),
    "DP2, ZeRO-1": ("DP2 ZeRO-1", "dp2", ""),
    "DP4": ("", "dp4", ""),
    "DP8": ("", "dp8", ""),
    "TP2": ("TP2 SP", "tp2", "tp2"),
    "TP2 x DP2": ("", "tp2-dp2", ""),
    "TP4": ("", "tp4", "tp4"),
    "EP2": ("EP2", "ep2", "ep2"),
    "EP4, ZeRO-1": ("EP4 ZeRO-1", "ep4", ""),
    "EP8": ("", "", "ep8"),
    "PP2": ("PP2", "pp2", ""),
    "PP2, uneven": ("", "", "pp2 uneven"),
    "PP4": ("PP4", "", ""),
    "PP4, uneven": ("PP4 uneven", "", "pp4 uneven"),
    "PP2 x VPP2": ("PP2 x VPP2", "", ""),
    "PP2 x VPP2, uneven": ("PP2 x VPP2 uneven", "", "vpp2"),
    "TP2 x EP2, ETP1": ("TP2 x EP2, ETP1", "", "tp2 ep2 etp1"),
    "TP2 x EP2 x DP2, ETP1": ("", "tp2-ep2-etp1-dp2", ""),
    "TP2 x EP2, ETP2": ("TP2 x EP2, ETP2", "tp2-ep2-etp2", "tp2 ep2 etp2"),
    "TP2 x PP2": ("TP2 x PP2", "", ""),
    "EP2 x PP2": ("EP2 x PP2", "", ""),
    "EP2 x PP2 x VPP2, ZeRO-1": ("EP2 x PP2 x VPP2 ZeRO-1", "vpp2-ep2", ""),
    "TP2 x PP2 x EP2, ZeRO-1": ("TP2 x PP2 x EP2 ZeRO-1", "tp2-pp2-ep2", "tp2 pp2 ep2"),
}
TESTS: tuple[Any, ...] = (
    test_layouts.test_layout_trains_like_one_process,
    test_muonclip.test_twenty_steps_are_those_of_one_process_bit_for_bit,
    test_conversion.test_every_layout_loads_the_released_tensors,
)


def lanes(test: Any) -> dict[str, str]:
    """Return T or E for each case of a parametrised test, by its id or value."""
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
    return {
        str(one.id or one.values[0]): "E" if any(m.name == "evidence" for m in one.marks) else "T"
        for one in mark.args[1]
    }


def rows() -> list[str]:
    """Return the table's rows."""
    known = [lanes(test) for test in TESTS]
    sizes = {case.name: case.world_size for case in test_layouts.CASES}
    for layouts in (test_muonclip.LAYOUTS, test_conversion.LAYOUTS):
        sizes |= {name: size for name, (size, _) in layouts.items()}
    found = []
    for row, names in ROWS.items():
        marks = [lane[name] if name else "" for lane, name in zip(known, names, strict=True)]
        (size,) = {sizes[name] for name in names if name}
        found.append(f"| {row} | {size} | {' | '.join(marks)} |".replace("|  |", "| |"))
    return found
