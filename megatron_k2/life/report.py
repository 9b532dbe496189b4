"""The report of a life: one static HTML file that loads nothing, for a phone too.

The stages at a glance with every figure before and after, curves, throughput, expert balance,
attention logits, samples, episodes to read, and where all of it comes from. A run that is not
complete has a report too, which says what is missing. The same run gives the same bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from megatron_k2.html_page import chart as charts
from megatron_k2.html_page.chart import Chart, Line
from megatron_k2.html_page.parts import Html, more, page, section, tag
from megatron_k2.life import report_provenance, report_rl, report_strip, report_training
from megatron_k2.life.report_episodes import Shown, episodes
from megatron_k2.life.report_rl import rl_folders
from megatron_k2.life.report_run import LifeRun, read_life
from megatron_k2.life.report_samples import samples
from megatron_k2.life.report_trajectories import synthesis_folders, trajectories
from megatron_k2.life.report_viewer import viewer

FILE = "report.html"


@dataclass(frozen=True)
class Found:
    """What the sections draw: a run, its trainings, and its RL runs as (stage, metrics)."""

    run: LifeRun
    trainings: list[report_training.Training]
    rl: list[tuple[str, report_rl.Rows]]
    shown: list[Shown]


def build(out: Path) -> Path:
    """Write ``report.html`` of a run and return its path.

    Args:
        out: folder of the run.

    Raises:
        ValueError: no run is there, or a file of it is damaged.
    """
    run = read_life(out)
    shown = [
        one
        for stage in run.passed
        for one in (
            *(one for path in synthesis_folders(stage) for one in trajectories(stage.name, path)),
            *(one for path in rl_folders(stage) for one in episodes(stage.name, path)),
        )
    ]
    rl: list[tuple[str, report_rl.Rows]] = [
        (stage.name, report_rl.read_metrics(path))
        for stage in run.passed
        for path in rl_folders(stage)
    ]
    path, partial = out / FILE, out / f"{FILE}.partial"
    partial.write_text(html(Found(run, report_training.trainings(run), rl, shown)), "utf-8")
    partial.replace(path)
    return path


def html(found: Found) -> str:
    """Return the page."""
    sections = {
        "figures": ("Before and after", [report_strip.figure_table(found.run)]),
        "curves": ("Curves", _curves(found)),
        "rl": ("Reinforcement learning", _reinforcement(found)),
        "throughput": ("Throughput", _throughput(found)),
        "balance": ("Expert balance", _balance(found)),
        "logits": ("Attention logits and clipped heads", _logits(found)),
        "samples": ("Samples before and after", samples(found.run)),
        "episodes": ("Episodes", viewer(found.shown)),
        "provenance": ("Where it comes from", _provenance(found)),
    }
    links = [tag("a", title, href=f"#{name}") for name, (title, _) in sections.items()]
    title = _title(found.run)
    return page(
        title,
        tag("header", tag("h1", title), tag("p", _subtitle(found.run), class_="soft")),
        report_strip.missing(found.run),
        report_strip.tiles(found.run, _tiles(found)),
        report_strip.timeline(found.run),
        report_strip.strip(found.run),
        tag("nav", *links, aria_label="Sections"),
        *(section(name, title, *inside) for name, (title, inside) in sections.items()),
        style=charts.style() + _part("report.css"),
        script=_part("report.js") if found.shown else "",
    )


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _title(run: LifeRun) -> str:
    return str(run.about.get("title") or "The life of a small Kimi K2")


def _subtitle(run: LifeRun) -> str:
    named = {"name": "", "code": "", "seed": "seed "}
    told = [f"{word}{run.about[key]}" for key, word in named.items() if key in run.about]
    machine = run.about.get("machine") or {}
    return " · ".join([*told, *([str(machine["processor"])] if "processor" in machine else [])])


def _tiles(found: Found) -> Iterable[tuple[str, str]]:
    rates = [y for one in found.trainings for line in _speeds(one) for _, y in line.points]
    if rates:
        yield f"{statistics.median(rates):,.0f}", "tokens/s in training, median of steps"
    steps = sum(len(one.points(report_training.TRAIN_TAG)) for one in found.trainings)
    if steps:
        yield f"{steps:,}", "training steps logged"


def _speeds(one: report_training.Training) -> Sequence[Line]:
    return [
        line
        for chart in report_training.throughput_charts(one)
        if chart.unit == "tokens/s"
        for line in chart.lines
    ]


def _curves(found: Found) -> list[Html]:
    losses = [report_training.loss_chart(one) for one in found.trainings]
    finer = [
        chart
        for one in found.trainings
        for part in (report_training.rate_charts, report_training.optimizer_charts)
        for chart in part(one)
    ]
    whole = report_training.whole_loss(found.trainings)
    hero = [tag("div", *map(charts.chart, whole), class_="charts hero")] if whole else []
    heldout = report_training.heldout_loss(found.run)
    return [
        *hero,
        *_grid([*heldout, *losses]),
        *_more("Learning rates, gradients, MuonClip", finer),
    ]


def _reinforcement(found: Found) -> list[Html]:
    parts = (report_rl.accuracy_charts, report_rl.reward_charts, report_rl.critic_charts)
    drawn = [chart for name, rows in found.rl for part in parts for chart in part(name, rows)]
    finer = [chart for name, rows in found.rl for chart in report_rl.policy_charts(name, rows)]
    return [*_grid(drawn), *_more("Lengths, entropy, divergence", finer)]


def _throughput(found: Found) -> list[Html]:
    drawn = [c for one in found.trainings for c in report_training.throughput_charts(one)]
    return _grid(
        [*drawn, *(c for name, rows in found.rl for c in report_rl.speed_charts(name, rows))]
    )


def _balance(found: Found) -> list[Html]:
    words = "Largest load of an expert over the mean load, mean of the layers; 1 is even."
    drawn = [c for one in found.trainings for c in report_training.balance_charts(one)]
    return [tag("p", words, class_="soft"), *_grid(drawn)]


def _logits(found: Found) -> list[Html]:
    drawn = [c for one in found.trainings for c in report_training.logit_charts(one)]
    return _grid(
        [*drawn, *(c for name, rows in found.rl for c in report_rl.logit_charts(name, rows))]
    )


def _provenance(found: Found) -> list[Html]:
    return [
        *report_provenance.settings(found.run),
        tag("h3", "Stages"),
        *report_provenance.stages(found.run, found.trainings),
    ]


def _more(title: str, drawn: Sequence[Chart]) -> list[Html]:
    return [more(title, *_grid(drawn))] if drawn else []


def _grid(drawn: Sequence[Chart]) -> list[Html]:
    if not drawn:
        return [tag("p", "Nothing yet.", class_="soft")]
    return [tag("div", *map(charts.chart, drawn), class_="charts")]
