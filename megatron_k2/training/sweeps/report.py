"""A sweep's tables: mean loss of every setting, by domain, and differences seed by seed.

All losses are in bits a byte of held-out text. Intervals are Student's t over seeds (95 %); the
difference to the first setting is taken between runs of the same seed (intervals.py). A
star marks a difference whose interval leaves out zero; with many settings some will by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_k2.training.sweeps.intervals import Interval, mean_interval, paired_difference

Results = Sequence[Mapping[str, Any]]


def by_setting(results: Results, domain: str = "all") -> dict[str, dict[int, float]]:
    """Return setting in words -> seed -> bits a byte, in the order of the results."""
    found: dict[str, dict[int, float]] = {}
    for result in results:
        setting = " ".join(f"{axis}={label}" for axis, label in result["settings"].items())
        found.setdefault(setting, {})[result["seed"]] = result["bits_per_byte"][domain]
    return found


def summarise(results: Results) -> list[dict[str, Any]]:
    """Return one row a setting, as JSON values: means, intervals, differences to the first."""
    domains = list(results[0]["bits_per_byte"])
    losses = {domain: by_setting(results, domain) for domain in domains}
    first = next(iter(losses["all"]))
    return [
        {
            "setting": setting,
            "seeds": sorted(losses["all"][setting]),
            "bits_per_byte": {
                domain: asdict(mean_interval(list(losses[domain][setting].values())))
                for domain in domains
            },
            "minus_first": {
                domain: asdict(paired_difference(losses[domain][first], losses[domain][setting]))
                for domain in domains
                if setting != first and losses["all"][first].keys() & losses["all"][setting].keys()
            },
        }
        for setting in losses["all"]
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table for people."""
    domains = [name for name in rows[0]["bits_per_byte"] if name != "all"]
    cells = [["setting", "seeds", "bits/byte (95 %)", *domains, "minus the first (paired, 95 %)"]]
    for row in rows:
        bits = {name: Interval(**value) for name, value in row["bits_per_byte"].items()}
        difference = row["minus_first"].get("all")
        paired = Interval(**difference) if difference else None
        star = " *" if paired is not None and paired.excludes_zero else ""
        cells.append(
            [
                *(row["setting"] or "(all)", str(len(row["seeds"])), str(bits["all"])),
                *(f"{bits[name].value:.4f}" for name in domains),
                f"{paired}{star}" if paired else "",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
