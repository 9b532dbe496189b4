"""Charts of the stages that train, from their TensorBoard files: what our trainer writes there.

Tokens a second are a step's tokens (batch size x ``--seq-length``, as the files say) over its time
(``iteration-time``, of ``--log-timers-to-tensorboard``). Without it the time between two logged
steps counts, with the evaluations and checkpoints in it, and the chart says so.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from megatron_k2.html_page.chart import Chart, Line, Point
from megatron_k2.life.report_run import LifeRun
from megatron_k2.training.events import Events, event_folders, read_runs
from megatron_k2.training.report import TRAIN_TAG

ROOMS = ("stages", "tensorboard")  # folders within a run whose names say nothing
LOSS_UNIT = "nats/token"
HELDOUT = f"{TRAIN_TAG} validation"  # begins the tags of all held-out texts
DOUBLED = " vs samples"  # ends Megatron's second copy of a tag
# Names that the trainer's parts log under: model/balance.py, Megatron, optimizer/telemetry.py. They
# are written out here, because importing those files loads torch and Megatron.
BALANCE, COLD = "expert balance", "cold experts"
MAX_LOGIT, CLIPPED, BROKEN = "max_attention_logit", "k2/heads-clipped", "k2/heads-broken"
LAYER, UPDATE, RESIDUAL = "k2/max-logit/layer-", "k2/update-rms/", "k2/orthogonality-residual/"
MOST_LAYERS = 6  # of which the logits are drawn
_NUMBERED = re.compile(r"^\d+-")
NEAR = 3.0  # a threshold further above the logits than this would flatten their lines


@dataclass(frozen=True)
class Training:
    """A training: its stage, its name, which is more where a stage has several, and its files."""

    stage: str
    name: str
    events: Events

    def points(self, tag: str) -> list[Point]:
        """Return a scalar by step."""
        found = self.events.scalars.get(tag, {})
        return [(float(step), found[step]) for step in sorted(found)]

    def line(self, tag: str, name: str, dotted: bool = False) -> Line:
        """Return a scalar as a line."""
        return Line(name, self.points(tag), dotted=dotted)

    def number(self, name: str) -> float | None:
        """Return an argument that is a number; None where it is not there."""
        try:
            return float(self.events.arguments[name])
        except (KeyError, ValueError):
            return None


def trainings(run: LifeRun) -> list[Training]:
    """Return the trainings of a run, in the order of its stages; RL's own figures are elsewhere."""
    found = []
    for stage in run.passed:
        for root in stage.artifacts("tensorboard"):
            for folder in event_folders(root):
                runs = [one for one in read_runs(folder) if TRAIN_TAG in one.scalars]
                inside = [one for one in folder.relative_to(root).parts if one not in ROOMS]
                for events in runs:
                    parts = [*inside, *([_saved(events)] if len(runs) > 1 else [])]
                    found.append(Training(stage.name, " ".join(parts) or stage.name, events))
    return found


def _saved(events: Events) -> str:
    """Return the name of the folder that is saved to: of a recipe, the name of its stage."""
    return _NUMBERED.sub("", PurePath(events.arguments.get("save", "")).name)


def whole_loss(found: Sequence[Training]) -> list[Chart]:
    """Return the training loss of all stages, one after the other; none for a single stage."""
    lines, before = [], 0.0
    for one in found:
        points = one.points(TRAIN_TAG)
        first = points[0][0]
        lines.append(Line(one.name, [(before + x - first + 1, y) for x, y in points]))
        before += points[-1][0] - first + 1
    note = "Each stage has its own text: the height of two stages does not compare, the fall does."
    whole = Chart(
        "Training loss, all stages",
        "steps of all stages",
        LOSS_UNIT,
        lines,
        note=note,
        wide=True,
    )
    return [whole] if len(lines) > 1 else []


def heldout_loss(run: LifeRun) -> list[Chart]:
    """Return how losses on held-out text went from stage to stage, as their figures say.

    A figure goes on with the line of an earlier stage where it begins at the value that ended it:
    only then is it of the same text.
    """
    lines: dict[str, list[Point]] = {}
    for at, stage in enumerate(run.stages, start=1):
        for one in stage.figures:
            if one.unit == LOSS_UNIT and one.before is not None and one.after is not None:
                known = lines.get(one.name)
                goes_on = not known or known[-1][1] == one.before
                name = one.name if goes_on else f"{one.name}, {stage.name}"
                points = lines.setdefault(name, [(at - 1.0, one.before)])
                points.append((float(at), one.after))
    drawn = [Line(name, points, dotted=True) for name, points in lines.items()]
    title, x = "Loss on held-out text, after each stage", "stage, by its number above"
    return [Chart(title, x, LOSS_UNIT, drawn)] if drawn else []


def loss_chart(one: Training) -> Chart:
    """Return training loss with held-out losses."""
    heldout = [
        one.line(tag, _heldout_name(tag), dotted=True)
        for tag in one.events.scalars
        if tag.startswith(HELDOUT) and not tag.endswith(DOUBLED)
    ]
    lines = [one.line(TRAIN_TAG, "training"), *heldout]
    return Chart(f"{one.name}: loss", "step", LOSS_UNIT, lines)


def rate_charts(one: Training) -> list[Chart]:
    """Return the learning rate and the gradient's norm."""
    rate = one.line("learning-rate", "learning rate")
    return [
        Chart(f"{one.name}: learning rate", "step", "", [rate], floor=0.0),
        Chart(f"{one.name}: norm of the gradient", "step", "", [one.line("grad-norm", "norm")]),
    ]


def _heldout_name(tag: str) -> str:
    name = tag.removeprefix(HELDOUT).lstrip("- ")
    return "held-out" if name in ("", "heldout") else f"held-out {name}"


def throughput_charts(one: Training) -> list[Chart]:
    """Return tokens a second and seconds a step."""
    times, note = one.points("iteration-time"), ""
    if not times:
        times, note = _between(one), "Evaluations and checkpoints between steps are in it."
    length, batches = one.number("seq_length"), dict(one.points("batch-size"))
    charts = []
    if length:
        rates = [
            (step, batches[step] * length / seconds)
            for step, seconds in times
            if seconds > 0 and step in batches
        ]
        line = Line("tokens", rates)
        charts = [Chart(f"{one.name}: speed", "step", "tokens/s", [line], floor=0.0, note=note)]
    time = Chart(f"{one.name}: time of a step", "step", "s", [Line("step", times)], floor=0.0)
    return [chart for chart in (*charts, time) if chart.lines[0].points]


def _between(one: Training) -> list[Point]:
    """Return seconds a step from the moments at which steps were logged."""
    moments = sorted(one.events.moments.items())
    return [
        (float(step), (later - before) / (step - first))
        for (first, before), (step, later) in itertools.pairwise(moments)
        if later > before
    ]


def balance_charts(one: Training) -> list[Chart]:
    """Return the load of the experts: largest over mean, and those without a token."""
    ratio = one.line(BALANCE, "largest load / mean load")
    cold = one.line(COLD, "experts without a token")
    charts = [
        Chart(f"{one.name}: expert balance", "step", "ratio", [ratio], [("even", 1.0)]),
        Chart(f"{one.name}: cold experts", "step", "experts, all layers", [cold], floor=0.0),
    ]
    return [chart for chart in charts if chart.lines[0].points]


def logit_charts(one: Training) -> list[Chart]:
    """Return the largest attention logits of the hottest layers, and the share of clipped heads."""
    layers = _by_suffix(one, LAYER, "layer ")
    hottest = sorted(layers, key=lambda line: -max(y for _, y in line.points))[:MOST_LAYERS]
    shown = [line for line in layers if line in hottest] or [one.line(MAX_LOGIT, "all layers")]
    largest = max((y for line in shown for _, y in line.points), default=0.0)
    threshold = one.number("qk_clip_threshold")
    levels, note = [], ""
    if threshold is not None:
        near = largest * NEAR >= threshold
        levels = [("threshold of QK-Clip", threshold)] if near else []
        note = "" if near else f"QK-Clip's threshold, {threshold:g}, is far above."
    if len(layers) > len(shown):
        note = f"The {len(shown)} hottest of {len(layers)} layers. {note}"
    charts = [
        Chart(f"{one.name}: largest attention logit", "step", "", shown, levels, 0.0, note),
        Chart(f"{one.name}: heads clipped", "step", "% of heads", _clipped(one), floor=0.0),
    ]
    return [chart for chart in charts if any(line.points for line in chart.lines)]


def _clipped(one: Training) -> list[Line]:
    names = {CLIPPED: "clipped", BROKEN: "not finite"}
    return [
        Line(name, [(x, 100 * y) for x, y in one.points(tag)])
        for tag, name in names.items()
        if tag == CLIPPED or any(y for _, y in one.points(tag))
    ]


def optimizer_charts(one: Training) -> list[Chart]:
    """Return MuonClip's updates: their root mean square, and how far they are from orthogonal."""
    charts = [
        Chart(f"{one.name}: update RMS", "step", "RMS", _by_suffix(one, UPDATE), floor=0.0),
        Chart(
            f"{one.name}: distance from orthogonal", "step", "RMS", _by_suffix(one, RESIDUAL),
            floor=0.0,
        ),
    ]  # fmt: skip
    return [chart for chart in charts if chart.lines]


def _by_suffix(one: Training, prefix: str, word: str = "") -> list[Line]:
    tags: Mapping[str, object] = one.events.scalars
    return [
        one.line(tag, word + tag.removeprefix(prefix).lstrip("0"))
        for tag in sorted(tags)
        if tag.startswith(prefix)
    ]
