"""The folder of a run: published stages, work under way, what was spent.

``OUT/STAGE/`` holds a finished stage: its files and ``manifest.json``, which has what they were
made with and of, and their hashes. It is there whole or not at all, and depends on nothing but
settings, inputs and answers. ``OUT/work/STAGE/`` holds the journals of a stage under way,
``OUT/answers/`` recorded answers, ``OUT/spent.json`` what finished stages cost.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.data.rephrase.parts import write_json

FORMAT = 1  # of the files; raised where an older run cannot be gone on from
MANIFEST, SPENT, DISCARDED = "manifest.json", "spent.json", "discarded"


@dataclass(frozen=True)
class Identity:
    """What a stage's files depend on.

    Attributes:
        settings: flag -> value.
        inputs: file of an earlier stage, or flag of a file from outside -> hash.
        format: of this layout.
    """

    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    format: int = FORMAT

    def differences(self, other: Identity) -> list[str]:
        """Return how another, older one differs, a phrase each."""
        found = [] if self.format == other.format else [f"format {other.format} of its files"]
        for name in sorted({*self.settings, *other.settings}):
            then, now = other.settings.get(name), self.settings.get(name)
            if then != now:
                found.append(f"{name} {json.dumps(then)}, and now it is {json.dumps(now)}")
        for name in sorted({*self.inputs, *other.inputs}):
            if self.inputs.get(name) != other.inputs.get(name):
                found.append(f"another {name}")
        return found

    @property
    def hash(self) -> str:
        """Names it in journals."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Manifest:
    """What a finished stage says of itself; ``files``: name -> sha256, bytes, lines."""

    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]
    counts: Mapping[str, int] = field(default_factory=dict)
    format: int = FORMAT

    def tables(self) -> Iterator[object]:
        """Yield what must be tables of names."""
        yield from (self.settings, self.inputs, self.files, self.counts, *self.files.values())

    @property
    def identity(self) -> Identity:
        """What its files were made with."""
        return Identity(self.settings, self.inputs, self.format)


class Layout:
    """Paths below the folder of a run, and what happens to them."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def stage(self, name: str) -> Path:
        """Return the folder of a published stage."""
        return self.out / name

    def work(self, name: str) -> Path:
        """Return the folder of a stage under way."""
        return self.out / "work" / name

    def files(self, name: str) -> Path:
        """Return where the files of a stage are written until it is published."""
        return self.work(name) / "files"

    def answers(self, stage: str, step: str, part: int) -> Path:
        """Return the recording of a part."""
        return self.out / "answers" / f"{stage}.{step}.{part:05d}.jsonl"

    def manifest(self, name: str) -> Manifest | None:
        """Return the manifest of a published stage, None where there is none.

        Raises:
            ValueError: it is damaged.
        """
        path = self.stage(name) / MANIFEST
        if not path.is_file():
            return None
        try:
            found = Manifest(**json.loads(path.read_text(encoding="utf-8")))
            if not all(isinstance(value, dict) for value in found.tables()):
                raise TypeError
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged; run with --restart-from {name} makes the stage anew"
            ) from error
        return found

    def under_way(self, name: str) -> Identity | None:
        """Return what a stage under way is made with, None where none is."""
        path = self.work(name) / "stage.json"
        try:
            return Identity(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def begin(self, name: str, identity: Identity) -> None:
        """Make the folder of a stage under way, or find it as it is."""
        if self.under_way(name) is None:
            shutil.rmtree(self.work(name), ignore_errors=True)
            write_json(self.work(name) / "stage.json", asdict(identity))
        shutil.rmtree(self.stage(name), ignore_errors=True)  # a kill left it without a manifest
        shutil.rmtree(self.files(name), ignore_errors=True)
        self.files(name).mkdir(parents=True)

    def publish(
        self, name: str, identity: Identity, counts: Mapping[str, int], spent: tuple[int, int]
    ) -> None:
        """Give a stage's files their names, all at once, and drop its journals.

        Args:
            name: of the stage, whose files lie in ``files``.
            identity: what they were made with.
            counts: of what happened.
            spent: requests and tokens.
        """
        folder = self.files(name)
        found = {
            str(path.relative_to(folder)): describe(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        counted = dict(sorted(counts.items()))
        manifest = Manifest(name, identity.settings, identity.inputs, found, counted)
        write_json(folder / MANIFEST, asdict(manifest))
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            _sync(path)
        for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            _sync(path)
        self.write_spent(name, spent)
        os.rename(folder, self.stage(name))
        _sync(self.out)
        self.clean(name)

    def clean(self, name: str) -> None:
        """Remove the journals of a published stage, which a kill may have left."""
        shutil.rmtree(self.work(name), ignore_errors=True)

    def discard(self, name: str, spent: tuple[int, int], forget_answers: bool) -> None:
        """Remove a stage, published or under way; what it cost stays counted.

        Args:
            name: of the stage.
            spent: requests and tokens of its journals, or of ``spent.json``.
            forget_answers: remove its recordings too: another model answers now.
        """
        if forget_answers:
            for path in (self.out / "answers").glob(f"{name}.*.jsonl"):
                path.unlink()
        before = self.spent().get(DISCARDED, (0, 0))
        self.write_spent(DISCARDED, (before[0] + spent[0], before[1] + spent[1]), without=name)
        shutil.rmtree(self.work(name), ignore_errors=True)
        if self.stage(name).exists():
            (self.stage(name) / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.stage(name))

    def spent(self) -> dict[str, tuple[int, int]]:
        """Return (requests, tokens) by finished stage; ``discarded``: of stages redone."""
        path = self.out / SPENT
        if not path.is_file():
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return {name: (int(one[0]), int(one[1])) for name, one in value.items()}
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"--out {self.out}: {path} is damaged; remove it") from error

    def write_spent(self, name: str, spent: tuple[int, int], without: str = "") -> None:
        """Note what a stage cost, and forget another's."""
        value = {key: one for key, one in self.spent().items() if key != without}
        write_json(self.out / SPENT, value | {name: spent})


def describe(path: Path) -> dict[str, Any]:
    """Return the hash, bytes and, of JSONL, lines of a file."""
    digest, num_lines = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            num_lines += chunk.count(b"\n")
    found = {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}
    return found | {"lines": num_lines} if path.suffix == ".jsonl" else found


def outside_hash(path: Path) -> str:
    """Return the hash of a file from outside, or of a folder's files and their names."""
    if not path.is_dir():
        return str(describe(path)["sha256"])
    files = [one for one in sorted(path.rglob("*")) if one.is_file()]
    found = [[str(one.relative_to(path)), describe(one)["sha256"]] for one in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def problems_of(layout: Layout, manifest: Manifest) -> list[str]:
    """Return what is wrong with the files of a published stage, a line each."""
    folder = layout.stage(manifest.stage)
    found = []
    for name, wanted in manifest.files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif (now := describe(path)) != dict(wanted):
            found.append(f"{path} was changed after it was published: {_change(wanted, now)}")
    known = {*manifest.files, MANIFEST}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and str(path.relative_to(folder)) not in known:
            found.append(f"{path} is none of the stage's files")
    return found


def _change(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words how a file is another one."""
    for name in ("lines", "bytes"):
        if name in now and then.get(name) != now[name]:
            return f"{then.get(name)} {name} then, {now[name]} {name} now"
    return "as long as then, with other content"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
