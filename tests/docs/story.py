"""Runs the blocks of a page word for word, in a folder that looks like the checkout.

The folder holds links to what the commands name (`tools/`, `.venv/`, ...), so that what they write
stays out of the checkout. Blocks run by `bash -e`, each from where the one before it left off.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.docs.pages import ROOT, Block, Page, read_page

LINKED = (
    ".venv", "examples", "megatron_k2", "patches", "tests", "tools", "Makefile",
    "pyproject.toml", "setup.py", "README.md",
)  # fmt: skip
TIMEOUT_S = 3600  # a block that hangs; what runs beside it decides how long one takes
NO_CACHES = shutil.ignore_patterns("__pycache__", "*.pyc")


class Story:
    """A folder in which pages are told, each once."""

    def __init__(self, folder: Path, evidence: bool) -> None:
        self.folder = folder
        self.evidence = evidence
        self.told: set[str] = set()
        self.seconds: list[tuple[str, float]] = []
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)

    def tell(self, path: Path) -> None:
        """Tell a page, after those that it goes on from, which lie beside it.

        Raises:
            AssertionError: a command failed.
        """
        page = read_page(path)
        if page.path in self.told:
            return
        for before in page.after:
            self.tell(path.parent / before)
        self._copy(page)
        for block in page.blocks:
            if block.kind == "file":
                self._write(block)
            elif block.kind == "commands" and self.is_run(block):
                self._run(block)
        self.told.add(page.path)

    def is_run(self, block: Block) -> bool:
        """Return whether this telling runs a block."""
        return not block.not_run and (self.evidence or not block.is_evidence)

    def _copy(self, page: Page) -> None:
        for name in page.copies:
            link = self.folder / name
            if link.is_symlink():
                link.unlink()
                shutil.copytree(ROOT / name, link, symlinks=True, ignore=NO_CACHES)

    def _write(self, block: Block) -> None:
        path = self.folder / block.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")

    def _run(self, block: Block) -> None:
        begun = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            # A session of its own, so that a server which the page starts with & ends with its
            # block; a file, because such a server would keep a pipe open.
            process = subprocess.Popen(
                ["bash", "-e", "-o", "pipefail", "-c", block.text], cwd=self.folder,
                env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(TIMEOUT_S)
            finally:
                end(process)
            said.seek(0)
            last = said.read()[-4000:]
        self.seconds.append((block.place, time.monotonic() - begun))
        assert process.returncode == 0, (
            f"{block.place} ended with status {process.returncode}:\n{block.text}\n{last}"
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill what a block left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
