"""Declared MCP servers, and where they are installed.

``servers.toml`` declares those that tasks here use; a run may declare its own in the same form. A
server of PyPI is looked for in the install folder (``FOLDER/pypi/NAME``), then beside this
interpreter's packages; one of npm in ``FOLDER/npm``. ``tools/install_mcp_servers.py`` fills the
folder.
What is missing is named with its reason, never left out.
"""

from __future__ import annotations

import shutil
import sysconfig
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from megatron_k2.agentic.records import content_id
from megatron_k2.compat import distribution_version

_HERE = Path(__file__).parent
DECLARED = _HERE / "servers.toml"
INSTALL = "megatron-k2 install-mcp-servers --folder FOLDER"


@dataclass(frozen=True)
class Server:
    """A server as it is declared.

    Attributes:
        name: unique; its tools' ``server``.
        argv: that starts it on stdin and stdout; ``python`` is the sandbox's interpreter.
        category: of its tools.
        registry: where its packages are from; ``own``: it is ours; ``system``: it is there already.
        packages: pinned, in the registry's form.
        environ: besides PATH, HOME and TMPDIR.
        writes: whether it changes files.
        clock: a module whose ``datetime`` stands still at ``moment``; "" for none.
    """

    name: str
    argv: tuple[str, ...]
    category: str
    registry: Literal["pypi", "npm", "own", "system"]
    packages: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    writes: bool = False
    clock: str = ""
    moment: str = ""

    @cached_property
    def package(self) -> tuple[str, str]:
        """Name and version of what it is mainly made of."""
        if not self.packages:
            return self.name, ""
        name, _, pinned = self.packages[0].rpartition("==" if self.registry == "pypi" else "@")
        return name, pinned


@dataclass(frozen=True)
class Place:
    """An installed server: how to start it in a sandbox that may read ``readable``."""

    server: Server
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    readable: tuple[str, ...]


@dataclass(frozen=True)
class Missing:
    """A server that is not installed here, and why."""

    server: Server
    reason: str


Places = Mapping[str, Place | Missing]


def load_servers(path: Path = DECLARED) -> tuple[Server, ...]:
    """Read a list of servers.

    Raises:
        ValueError: it has unknown fields, a name twice, or a package without a version.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        moment = str(table.get("moment", ""))
        servers = tuple(_server(one, moment) for one in table.get("server", ()))
    except (tomllib.TOMLDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    names = [one.name for one in servers]
    if len(set(names)) < len(names) or not all(map(_is_name, names)):
        raise ValueError(f"{path}: names must differ and be of letters, digits, _ and -: {names}")
    return servers


def locate(servers: Iterable[Server], folder: Path | None = None) -> dict[str, Place | Missing]:
    """Find where servers are installed; by name.

    Args:
        servers: declared ones.
        folder: that ``tools/install_mcp_servers.py`` filled; None: only what Python has.
    """
    return {one.name: _locate(one, folder.resolve() if folder else None) for one in servers}


def readable(places: Places) -> tuple[str, ...]:
    """Return the paths that a sandbox of these servers has to be able to read."""
    found = {path for one in places.values() if isinstance(one, Place) for path in one.readable}
    return tuple(sorted(found))


def _server(table: Mapping[str, Any], moment: str) -> Server:
    known = {one.name for one in fields(Server)}
    if unknown := sorted(set(table) - known):
        raise ValueError(f"unknown fields {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    made = Server(**{**table, "argv": tuple(table["argv"]), "moment": moment})
    made = replace(made, packages=tuple(table.get("packages", ())))
    if made.registry in ("pypi", "npm") and not all(made.package):
        raise ValueError(f"server {made.name}: packages must be pinned: {made.packages}")
    if made.clock and not moment:
        raise ValueError(f"server {made.name}: a clock needs a moment")
    return made


def _is_name(name: str) -> bool:
    return name.isascii() and bool(name) and name.replace("_", "").replace("-", "").isalnum()


def _locate(server: Server, folder: Path | None) -> Place | Missing:
    if server.registry == "npm":
        return _locate_npm(server, folder)
    if server.registry == "pypi":
        return _locate_pypi(server, folder)
    own = [str(_HERE / "code_server.py")] if server.registry == "own" else []
    return _place(server, {"{own}": str(_HERE)}, {}, own)


def _locate_npm(server: Server, folder: Path | None) -> Place | Missing:
    name, pinned = server.package
    if shutil.which("node") is None:
        return Missing(server, "node is not installed")
    packages = (folder / "npm").resolve() if folder else None
    if packages is None or not (packages / "node_modules" / name / "package.json").exists():
        return Missing(server, f"{name}@{pinned} is in no folder: {INSTALL}")
    return _place(server, {"{folder}": str(packages)}, {}, [str(packages)])


def _locate_pypi(server: Server, folder: Path | None) -> Place | Missing:
    name, pinned = server.package
    own = folder / "pypi" / server.name if folder else None
    if own and own.is_dir():
        return _place(server, {"{folder}": str(own)}, {"PYTHONPATH": str(own)}, [str(own)])
    found = distribution_version(name)
    if found is None:
        return Missing(server, f"{name}=={pinned} is not installed: {INSTALL}")
    if found != pinned or any(not _has(one) for one in server.packages[1:]):
        wanted = ", ".join(server.packages)
        return Missing(server, f"{name} {found} beside other packages; {wanted}: {INSTALL}")
    here = sysconfig.get_path("purelib")
    return _place(server, {}, {"PYTHONPATH": here}, [here])


def _has(pinned: str) -> bool:
    name, _, wanted = pinned.partition("==")
    return distribution_version(name) == wanted


def _place(
    server: Server, values: Mapping[str, str], environ: Mapping[str, str], paths: Iterable[str]
) -> Place:
    argv = list(server.argv)
    if server.clock:
        assert argv[:2] == ["python", "-m"], server.argv
        source = (_HERE / "clock.py").read_text(encoding="utf-8")
        argv = ["python", "-c", source, server.moment, server.clock, *argv[2:]]
    for mark, value in values.items():
        argv = [one.replace(mark, value) for one in argv]
    return Place(server, tuple(argv), {**environ, **server.environ}, tuple(paths))


def pin_id(servers: Iterable[Server]) -> str:
    """Return the hash of what servers are pinned to, for a run's settings."""
    return content_id([[one.name, list(one.argv), list(one.packages)] for one in servers])
