"""The report in a real browser: nothing is loaded, nothing runs, a phone shows all of it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_k2.agentic.judge.agreement import agreement
from megatron_k2.agentic.output.figures import Outcome, choose, rates
from megatron_k2.agentic.output.report import WARNING, ReportData, report
from megatron_k2.agentic.output.samples import Sample
from megatron_k2.agentic.records import Agent, Judgement
from tests.unit.agentic.judge.dialogues import criterion, good, task
from tests.unit.html_page import browser

ATTACK = (
    "</pre><script>document.title='owned'</script><img src=https://example.com/x onerror=alert(1)>"
)
PHONE = 360  # CSS pixels: the narrowest of common phones


def png() -> bytes:
    """A picture of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        sum_ = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + sum_

    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"\0\1\2\3")), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def samples() -> list[Sample]:
    of = replace(task(criterion({"kind": "ended"})), origin={"form": "one"})
    agent = Agent("website_control/shop", "You help.", ())
    script = good().user(ATTACK).say("w" * 400)
    played = script.done(of)
    kept = Judgement(played.id, True, {"it": 1}, {"it": "rule"}, {"it": ATTACK})
    trace = {
        "tools": [{"name": "get_order", "server": "s" * 90, "source": "evolved", "origin": {}}],
        "prompts": ["rubric"],
    }
    dropped = replace(kept, passes=False, reasons=("wrong_tool", "missing_fact"))
    return [Sample(played, kept, of, agent, trace), Sample(played, dropped, of, agent, {})]


def outcomes(number: int = 40) -> list[Outcome]:
    return [
        Outcome(
            f"{at:016x}", f"category_with_a_long_name_{at % 17}", 1 + at % 5, "one",
            ("timeout",) if at % 3 == 0 else (), "real" if at % 8 == 0 else "simulated",
            at % 4 != 0, () if at % 4 else ("wrong_tool",), "wrong_tool" if at % 4 == 0 else "",
        )
        for at in range(number)
    ]  # fmt: skip


def data() -> ReportData:
    votes = [("yes", "no"), ("yes", "yes"), ("no", "no"), ("unclear", None)]
    return ReportData(
        title="Agentic data",
        stages={
            "tools": {"kept": 5_214, "dropped: near-duplicate of another": 12},
            "tasks": {"x": 1},
        },
        outcomes=outcomes(),
        samples=samples(),
        coverage=png(),
        categories={f"category_{at}": {"dump": at, "evolved": 3} for at in range(17)},
        agreement=agreement(votes),
        cost={"judge": {"questions": 100, "prompt tokens": 12_345}, "policy": {"questions": 7}},
        settings={"--dump": "servers.tar.gz " + "0123456789abcdef" * 4, "seed": 0},
        models=["scripted"],
    )


def test_the_page_is_the_same_each_time_and_warns_of_a_script() -> None:
    assert report(data()) == report(data())
    assert WARNING in report(data()) and WARNING not in report(replace(data(), models=["k2"]))
    assert (
        "<script" not in report(data())
        and "onerror=alert" not in report(data()).replace("&gt;", "").split("<img", 1)[0]
    )


def test_a_run_with_nothing_has_a_page_too() -> None:
    assert "Agentic" in report(ReportData("Agentic", {}, []))


def test_pass_rates_and_the_choice_of_samples() -> None:
    found = {one.name: one for one in rates(outcomes(), lambda one: [one.executed])}
    assert (found["real"].passed, found["real"].total) == (0, 5)
    assert (found["simulated"].passed, found["simulated"].total) == (30, 35)
    assert found["simulated"].low < 30 / 35 < found["simulated"].high
    places = choose(outcomes(), 5)
    assert places == sorted(set(places)) and len(places) == 5
    chosen = [outcomes()[at] for at in places]
    assert {one.passes for one in chosen} == {True, False}
    assert {one.level for one in chosen} == {1, 2, 3, 4, 5}
    assert choose(outcomes(3), 9) == [0, 1, 2]


@pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine")
def test_a_browser_of_a_phones_width_shows_all_of_it_and_loads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(report(data()), encoding="utf-8")
    found = browser.find()
    assert found is not None
    with browser.Browser(found) as page:
        page.open(path, PHONE)
        assert page.value("document.documentElement.scrollWidth") == PHONE
        assert page.value("document.title") == "Agentic data"
        anchors = "[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))"
        assert page.value(f"{anchors}.every(a => document.querySelector(a))")
        assert page.value("document.querySelectorAll('section').length") == 8
        assert page.value("document.querySelectorAll('script').length") == 0
        assert page.value("document.querySelectorAll('img').length") == 1
        assert page.value("document.querySelector('img').naturalWidth") == 1
        # A sample opens by a touch, and then the dialogue is there to be read.
        turn = "document.querySelector('#samples details .turn.assistant')"
        assert page.value(f"{turn}.checkVisibility()") is False
        page.value("document.querySelector('#samples summary').click()")
        assert page.value(f"{turn}.checkVisibility()") is True
        page.value("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.value("document.documentElement.scrollWidth") == PHONE
        small = "[...document.querySelectorAll('summary')].filter(s => s.offsetHeight < 32).length"
        assert page.value(small) == 0  # a finger can hit them
        assert page.value("document.body.innerText.includes('</pre><script>')") is True
        page.screenshot(tmp_path / "report.png")
        assert (tmp_path / "report.png").stat().st_size > 10_000
        loaded = [one for one in page.requests if not one.startswith(("data:", path.as_uri()))]
        assert (loaded, page.problems) == ([], [])
