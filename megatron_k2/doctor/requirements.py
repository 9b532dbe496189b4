"""What this package and its extras ask for, compared with what is installed.

The requirements are those of the installed distribution's own metadata, followed through what those
packages ask for in turn: what pip would see. Nothing is imported; ``probe.py`` does that.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import megatron_k2
from megatron_k2 import compat
from megatron_k2.doctor.finding import ABSENT, BROKEN, NOTE, OK, Finding, pip_install

DISTRIBUTION = "megatron-k2"
BASE, EXTRAS = "base", "extras: what each enables"
ENABLES = {
    "te": "Transformer Engine's kernels and FP8 on GPUs; building it needs CUDA 13's nvcc and "
    "--no-build-isolation",
    "muon": "Megatron's own Muon and SOAP, to compare MuonClip with",
    "data": "preprocess-data from Parquet and zstd, at speed; Ray for rephrase-data",
    "rl": "rollouts and judging on Ray",
    "checkpoint-engine": "weights to vLLM by broadcast, on GPUs",
    "serve": "serve: OpenAI's API over HTTP",
    "eval": "evaluate harness: lm-evaluation-harness",
    "gym": "mathematics, procedural tasks, a sandbox for programs, MCP servers",
    "gymnasium": "environments of Gymnasium",
    "smollm2": "GGUF files, a small real model to try things with",
    "dev": "the tests",
}
_SHOWN = ("torch", "megatron-core")  # by name; the other requirements are counted


@dataclass(frozen=True)
class Need:
    """A requirement whose marker holds here, who asks for it, and the version found."""

    wanted: Requirement
    asked_by: str
    found: str | None

    @property
    def is_met(self) -> bool:
        """Whether a version in the range is installed."""
        return self.found is not None and self.wanted.specifier.contains(
            Version(self.found).public, prereleases=True
        )

    def said(self) -> str:
        """Return what is found and what is needed."""
        found = "is not installed" if self.found is None else f"{self.found} is installed"
        needed = str(self.wanted.specifier) or "any version"
        return f"{found}, {self.asked_by} needs {needed}"


def check_base() -> list[Finding]:
    """Return what is found of this package, Python, and everything that the package needs."""
    findings = [_self(), Finding(BASE, "Python", OK, platform.python_version())]
    needs = list(_closure(_direct("")))
    for need in needs:
        name = need.wanted.name
        if need.is_met and name in _SHOWN and need.asked_by == DISTRIBUTION:
            findings.append(Finding(BASE, name, OK, f"{need.found} ({need.wanted.specifier})"))
        elif not need.is_met:
            # What others ask of a version is theirs to know: it may well work.
            other = need.found is not None and need.asked_by != DISTRIBUTION
            mend = pip_install(str(_bare(need.wanted)))
            findings.append(Finding(BASE, name, NOTE if other else BROKEN, need.said(), mend))
    names = {need.wanted.name for need in needs if need.is_met and need.wanted.name not in _SHOWN}
    findings.append(Finding(BASE, f"{len(names)} others", OK, "installed, in their ranges"))
    return findings


def check_extras() -> list[Finding]:
    """Return which extras are complete, and of the others what they lack."""
    findings = []
    for extra in compat.declared_extras(DISTRIBUTION):
        needs = [*_closure(_direct(extra))]
        lacking = [one for one in needs if one.found is None]
        outside = [one for one in needs if not one.is_met and one.asked_by == DISTRIBUTION]
        enables = ENABLES.get(extra, "")
        if not lacking and not outside:
            findings.append(Finding(EXTRAS, extra, OK, enables))
            continue
        names = ", ".join(dict.fromkeys(one.wanted.name for one in (lacking or outside)))
        what = "lacks" if lacking else "has another version of"
        mend = pip_install(f"{DISTRIBUTION}[{extra}]")
        if extra == "te":
            mend += " --no-build-isolation"
        findings.append(Finding(EXTRAS, extra, ABSENT, f"{enables}; {what} {names}", mend))
    return findings


def _self() -> Finding:
    """Return whether the installed metadata belongs to the code that runs."""
    version, folder = compat.distribution_version(DISTRIBUTION), Path(megatron_k2.__file__).parent
    is_checkout = (folder.parent / "setup.py").is_file()
    kind = "a checkout" if is_checkout else "an installed package"
    mend = (
        pip_install(DISTRIBUTION)
        if not is_checkout
        else f"{pip_install()}--editable {folder.parent}"
    )
    if version is None:
        said = f"{folder} is not installed, so that nobody knows what it needs"
        return Finding(BASE, DISTRIBUTION, BROKEN, said, mend)
    if version != megatron_k2.__version__:
        said = f"the code is {megatron_k2.__version__}, its installed metadata says {version}"
        return Finding(BASE, DISTRIBUTION, BROKEN, said, mend)
    return Finding(BASE, DISTRIBUTION, OK, f"{version}, {kind}: {folder}")


def _direct(extra: str) -> Iterator[tuple[Requirement, str]]:
    """Yield what the base, or an extra besides the base, asks for."""
    for line in compat.declared_requirements(DISTRIBUTION) or []:
        wanted = Requirement(line)
        always = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if always if not extra else not always and _holds(wanted, (extra,)):
            yield wanted, DISTRIBUTION


def _closure(start: Iterable[tuple[Requirement, str]]) -> Iterator[Need]:
    """Yield every requirement reached from the first ones, each once for each who asks."""
    waiting, seen = list(start), set()
    while waiting:
        wanted, asked_by = waiting.pop(0)
        found = compat.distribution_version(wanted.name)
        yield Need(wanted, asked_by, found)
        key = (wanted.name, *sorted(wanted.extras))
        if found is None or key in seen:
            continue
        seen.add(key)
        for line in compat.declared_requirements(wanted.name) or []:
            inner = Requirement(line)
            if _holds(inner, ("", *wanted.extras)):
                waiting.append((inner, wanted.name))


def _holds(wanted: Requirement, extras: Iterable[str]) -> bool:
    marker = wanted.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def _bare(wanted: Requirement) -> Requirement:
    """Return the requirement as pip takes it on a command line, without its marker."""
    bare = Requirement(str(wanted))
    bare.marker = None
    return bare
