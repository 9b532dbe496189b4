"""The runner on a small life of scripted stages: order, records, failures, kills, doing again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_k2.life.plan import read_life
from megatron_k2.life.runner import Run

# Counts its runs in a file, so that a stage that is done twice is seen.
SCRIPT = """
import json, pathlib, sys, time
here, value, wait = pathlib.Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
with (here / "runs").open("a") as file:
    file.write("x")
begun = here / "half"
if wait and not begun.exists():
    begun.write_text("")
    time.sleep(wait)
(here / "value.json").write_text(json.dumps({"found": {"score": value}}))
print("[scripted] done")
"""

LIFE = """
name = "tiny"
title = "three numbers"
[settings]
reached = {second}
[[stages]]
name = "first"
title = "a number"
minutes = 1
files = ["${{HERE}}/value.json"]
[[stages.commands]]
run = "python {script} ${{HERE}} 1 0"
[[stages.figures]]
name = "score"
after = {{ json = "${{HERE}}/value.json", key = "found.score" }}
least = 1
[[stages.samples]]
title = "what it wrote"
after = {{ text = "${{HERE}}/value.json" }}
[[stages]]
name = "second"
title = "a larger one"
minutes = 1
owns = ["${{OUT}}/beside*"]
artifacts = {{ episodes = "${{HERE}}/half" }}
[[stages.commands]]
run = "python {script} ${{HERE}} ${{reached}} {wait}"
[[stages.figures]]
name = "score"
unit = "points"
before = {{ json = "${{first}}/value.json", key = "found.score" }}
after = {{ json = "${{HERE}}/value.json", key = "found.score" }}
least_gain = 0.5
[[stages]]
name = "third"
title = "asks a server"
minutes = 1
[[stages.commands]]
serve = "python {server} ${{PORT}} ${{HERE}}"
run = ["python {asker} ${{SERVER}}", "python {asker} ${{SERVER}}"]
[[stages.figures]]
name = "answers"
after = {{ log = "${{HERE}}/log.txt", pattern = "answers (\\\\d+)" }}
least = 2
"""

SERVER = """
import http.server, pathlib, sys
count = [0]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        count[0] += self.path == "/ask"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(count[0]).encode())
    def log_message(self, *args): pass
(pathlib.Path(sys.argv[2]) / "server.pid").write_text(str(__import__("os").getpid()))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
ASKER = """
import sys, urllib.request
print("answers", urllib.request.urlopen(sys.argv[1] + "/ask").read().decode())
"""


def write_life(folder: Path, second: float = 2, wait: float = 0) -> Path:
    for name, text in (("script", SCRIPT), ("server", SERVER), ("asker", ASKER)):
        (folder / f"{name}.py").write_text(text)
    paths = {name: folder / f"{name}.py" for name in ("script", "server", "asker")}
    path = folder / "life.toml"
    path.write_text(LIFE.format(second=second, wait=wait, **paths))
    return path


def run(path: Path, out: Path, until: str = "", redo: str = "", seed: int = 1) -> None:
    Run(read_life(path), out, seed).execute(until, redo)


def runs(out: Path, stage: str) -> int:
    return len((out / "stages" / stage / "runs").read_text())


def test_a_life_runs_its_stages_and_keeps_their_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(write_life(tmp_path), out)
    done = json.loads((out / "stages/02-second/done.json").read_text())
    score = {"before": 1.0, "after": 2.0, "better": "higher", "unit": "points"}
    assert done["figures"] == {"score": score}
    assert done["artifacts"] == {"episodes": "stages/02-second/half"}
    first = json.loads((out / "stages/01-first/done.json").read_text())
    assert first["samples"][0]["after"] == '{"found": {"score": 1.0}}'
    assert list(first["files"]) == ["stages/01-first/value.json"]
    printed = capsys.readouterr().out
    assert "[life] second: score 1 -> 2 points" in printed and "[scripted] done" in printed
    server = int((out / "stages/03-third/server.pid").read_text())
    assert not Path(f"/proc/{server}").exists()
    run(write_life(tmp_path), out)
    assert runs(out, "01-first") == runs(out, "02-second") == 1


def test_a_figure_that_does_not_rise_ends_the_run_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError) as caught:
        run(write_life(tmp_path, second=1.25), out)
    wanted = "second: score 1 -> 1.25 points did not rise by 0.5; log "
    assert str(caught.value).startswith(wanted)
    assert str(out / "stages/02-second/log.txt") in str(caught.value)
    assert not (out / "stages/02-second/done.json").exists()
    assert not (out / "stages/03-third").exists()


def test_from_does_a_stage_and_the_later_ones_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_life(tmp_path)
    run(path, out, until="second")
    (out / "beside.txt").write_text("of the second stage")
    write_life(tmp_path, second=3)
    with pytest.raises(ValueError, match="second was begun with other setting reached"):
        run(path, out)
    run(path, out, until="second", redo="second")
    assert runs(out, "01-first") == 1
    assert not (out / "beside.txt").exists()
    assert json.loads((out / "stages/02-second/value.json").read_text()) == {"found": {"score": 3}}
    with pytest.raises(ValueError, match=r"--from tird: stages are first, second, third"):
        run(path, out, redo="tird")
    with pytest.raises(ValueError, match="--from second comes after --until first"):
        run(path, out, until="first", redo="second")
    assert (out / "stages/02-second/done.json").is_file()
    with pytest.raises(ValueError, match="other seed"):
        run(path, out, seed=2)


def test_a_killed_life_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_life(tmp_path, wait=60)
    command = [sys.executable, "-W", "ignore", "-c", _MAIN, str(path), str(out)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    half = out / "stages/02-second/half"
    deadline = time.monotonic() + 60
    while not half.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1/3" not in done.stdout and "2/3 second" in done.stdout
    assert runs(out, "01-first") == 1 and runs(out, "02-second") == 2
    assert (out / "stages/03-third/done.json").exists()


_MAIN = """
import sys
from pathlib import Path
from megatron_k2.life.plan import read_life
from megatron_k2.life.runner import Run
Run(read_life(Path(sys.argv[1])), Path(sys.argv[2]), 1).execute()
"""


def test_a_command_that_fails_names_its_stage_and_shows_its_last_lines(tmp_path: Path) -> None:
    path = write_life(tmp_path)
    path.write_text(path.read_text().replace(f"{tmp_path}/asker.py", "-c 'raise OSError(7)'"))
    with pytest.raises(RuntimeError, match=r"(?s)^third: .*OSError: 7"):
        run(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("title = ", "tittle = "), "tittle|title"),
        (("python ", "bash "), "begins with none of python, torchrun"),
        (("${first}", "${frist}"), "frist"),
        (("least = 1\n", ""), "needs before, least or most"),
        (('key = "found.score" }\nleast', 'keys = "x" }\nleast'), "no keys"),
        (("reached = 2", "first = 2"), "name of a stage"),
    ],
)
def test_a_wrong_life_is_refused_before_anything_runs(
    tmp_path: Path, change: tuple[str, str], named: str
) -> None:
    path = write_life(tmp_path)
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ValueError, match=named) as caught:
        read_life(path)
    assert str(caught.value).startswith(f"--life {path}")
