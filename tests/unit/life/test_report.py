"""The report of a life, read back from logs that their own writers wrote, and in a real browser."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

import megatron_k2
from megatron_k2.life import report_training
from megatron_k2.life.report import build
from megatron_k2.life.report_run import read_life
from megatron_k2.life.report_strip import duration
from tests.unit.html_page import browser
from tests.unit.life.run_folder import ATTACK, whole_life, write_life

PHONE, DESK = 360, 1280  # CSS pixels
LIMIT_BYTES = 2_000_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run whose last stage is missing."""
    return build(whole_life(tmp_path_factory.mktemp("life") / "out"))


def test_the_report_shows_every_part_of_a_run(whole: Path) -> None:
    page = whole.read_text()
    for said in (
        "Missing: serve (not run)", "4 of 5", "1 of 2</b>figures improved",  # the strip
        "pretraining: loss", "long-context: loss",  # curves
        "Loss on held-out text, after each stage", "Training loss, all stages",
        "update RMS", "learning rate", "largest attention logit", "heads clipped",
        "expert balance", "rl: accuracy on held-out tasks", "rl: speed of rollouts",
        "python -m megatron_k2.rl --seed 7", "ab" * 32, "commit 0123", "--seq-length",  # provenance
        "2 more of pretrain", "tool · cancel_order · ok", "dropped: wrong_tool",  # texts
        "Its group: 3 answers to one prompt", "✗ not better", "within its bound",
    ):  # fmt: skip
        assert said in page, said
    assert len(page.encode()) < LIMIT_BYTES
    assert not whole.with_name("report.html.partial").exists()


def test_the_same_run_has_the_same_bytes(whole: Path) -> None:
    before = whole.read_bytes()
    assert build(whole.parent).read_bytes() == before


def test_texts_of_models_stay_text(whole: Path) -> None:
    page = whole.read_text()
    assert ATTACK not in page and page.count(html.escape(ATTACK)) >= 3
    assert page.count("<script") == 1 and "<img" not in page  # the picker's own


def test_speeds_are_those_of_each_part_of_a_recipe(whole: Path) -> None:
    found = report_training.trainings(read_life(whole.parent))
    assert [one.name for one in found] == ["pretraining", "long-context"]
    for one, length in zip(found, (256, 2048), strict=True):
        speed = report_training.throughput_charts(one)[0]
        assert speed.unit == "tokens/s" and "Evaluations" in speed.note
        assert {round(rate) for _, rate in speed.lines[0].points} == {4 * length // 2}


def test_figures_have_the_names_that_the_trainer_logs() -> None:
    package = Path(megatron_k2.__file__).parent
    names = {"model/balance.py": ("BALANCE", "COLD")}
    names["optimizer/telemetry.py"] = ("CLIPPED", "BROKEN", "LAYER", "UPDATE", "RESIDUAL")
    for path, constants in names.items():
        source = (package / path).read_text()  # importing them loads torch and Megatron
        for name in constants:
            assert f'"{getattr(report_training, name)}' in source, name


def test_a_threshold_is_drawn_where_logits_come_near(whole: Path) -> None:
    first, last = report_training.trainings(read_life(whole.parent))
    assert report_training.logit_charts(first)[0].levels == []  # 20 against 100
    assert report_training.logit_charts(last)[0].levels == [("threshold of QK-Clip", 100.0)]
    clipped = report_training.logit_charts(last)[1].lines
    assert [line.name for line in clipped] == ["clipped"] and clipped[0].points[0][1] == 25.0


def test_a_life_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    out = write_life(tmp_path / "out")
    (out / "stages" / "01-corpus").mkdir()
    page = build(out).read_text()
    assert "Missing: corpus (begun), pretrain (not run)" in page and "0 of 5" in page
    assert "<script" not in page and "No episodes yet." in page


def test_what_is_no_run_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no life\.json there"):
        build(tmp_path)
    out = write_life(tmp_path / "out", corpus={})
    (out / "stages/01-corpus/done.json").write_text('{"name": ')
    with pytest.raises(ValueError, match=r"01-corpus/done\.json: damaged"):
        build(out)


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    samples = [{"title": "long", "before": "b" * 50_000, "after": "a" * 50_000}] * 20
    files = {f"part-{at}": "cd" * 32 for at in range(5_000)}
    record: dict[str, Any] = {"samples": samples, "files": files}
    page = build(write_life(tmp_path / "out", corpus=record)).read_text()
    assert len(page.encode()) < LIMIT_BYTES and "4,940 more in done.json" in page


def test_times_are_said_as_people_say_them() -> None:
    said = [duration(one) for one in (0.25, 59, 75.5, 1230, 7500)]
    assert said == ["0.2 s", "59 s", "1 min 16 s", "20 min", "2 h 05 min"]


@pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine")
def test_a_browser_shows_all_of_it_and_its_picker_picks(whole: Path, tmp_path: Path) -> None:
    found = browser.find()
    assert found is not None
    with browser.Browser(found) as page:
        for width in (DESK, PHONE):
            page.open(whole, width)
            assert page.value("document.documentElement.scrollWidth") == width
        assert page.value("document.title") == "A small life"
        anchors = "[...document.querySelectorAll('a')].map(a => a.getAttribute('href').slice(1))"
        assert page.value(f"{anchors}.every(name => document.getElementById(name))")
        _pick(page)
        page.value("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.value("document.documentElement.scrollWidth") == PHONE
        touched = "[...document.querySelectorAll('summary, button, select')]"
        assert page.value(f"{touched}.filter(one => one.tabIndex < 0).length") == 0
        assert page.value("document.body.innerText.includes('</pre><script>')")
        page.screenshot(tmp_path / "report.png")
        _without_scripts(page, whole)
        loaded = [one for one in page.requests if not one.startswith(whole.as_uri())]
        assert (loaded, page.problems) == ([], [])


def _pick(page: browser.Browser) -> None:
    """One episode at a time: by filters, by buttons, by a link of the chart, by the keyboard."""
    shown = "[...document.querySelectorAll('.episodes > article')].filter(a => !a.hidden)"
    assert page.value(f"{shown}.length") == 1 and page.value(f"{shown}[0].firstChild.open")
    pick = "(name, value) => { const one = document.querySelector(`[data-pick=${name}]`);"
    pick += " one.value = value; one.dispatchEvent(new Event('change', { bubbles: true })); }"
    page.value(f"({pick})('verdict', 'kept')")
    assert page.value(f"{shown}[0].dataset.verdict") == "kept"
    assert page.value("document.querySelector('.picker output').textContent") == "1 of 1"
    page.value(f"({pick})('verdict', 'all')")
    page.value("document.querySelector('[data-step=\"1\"]').focus()")
    first = page.value(f"{shown}[0].innerText")
    for kind in ("keyDown", "keyUp"):
        page.do("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r")
    assert page.value(f"{shown}.length") == 1 and page.value(f"{shown}[0].innerText") != first
    page.value("location.hash = document.querySelector('.map a').getAttribute('href')")
    linked = "document.getElementById(location.hash.slice(1)).checkVisibility()"
    page.value("new Promise(done => setTimeout(done, 50))")
    assert page.value(linked) and page.value(f"{shown}.length") == 1


def _without_scripts(page: browser.Browser, path: Path) -> None:
    """Every episode is there and opens; the picker, which would do nothing, is not."""
    page.do("Emulation.setScriptExecutionDisabled", value=True)
    page.open(path, PHONE)
    assert page.value("document.querySelector('.picker').checkVisibility()") is False
    hidden = "[...document.querySelectorAll('.episodes > article')].filter(a => a.hidden).length"
    assert page.value(hidden) == 0
    page.do(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(23, 25, 28)"


def test_the_runner_and_the_report_agree_on_the_record() -> None:
    """What ``figures.Measured.as_record`` writes is what the page reads."""
    from megatron_k2.life.figures import Measured
    from megatron_k2.life.plan import Figure
    from megatron_k2.life.report_run import StageRun

    measured = Measured(Figure("held_out", {}, unit="nats/token", better="lower"), 6.0, 3.0)
    done = json.loads(json.dumps({"figures": {"held_out": measured.as_record()}}))
    (read,) = StageRun("a", "", "passed", Path("a"), done).figures
    assert (read.name, read.before, read.after, read.improved) == ("held out", 6.0, 3.0, True)
