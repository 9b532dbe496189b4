"""Install the real MCP servers that agentic tasks use, pinned, into a folder.

examples:
  tools/install_mcp_servers.py --folder ~/.cache/mcp-servers
  tools/install_mcp_servers.py --folder F --only sqlite memory

PyPI's go to FOLDER/pypi/NAME, each with its own dependencies, at the versions of
megatron_k2/agentic/real/locks/NAME.txt; npm's go to FOLDER/npm by `npm ci`, at those of
locks/package-lock.json, whose hashes npm checks; no install script is run. What is there, or
in this Python, at the same pins already is left alone. --write-locks resolves anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_k2.agentic.real.servers import DECLARED, Missing, Place, Server, load_servers, locate

LOCKS = DECLARED.with_name("locks")
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
_NPM = ("npm", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error")
_DONE = "installed"  # a file with the lock that was installed


def main(argv: Sequence[str] | None = None) -> int:
    """Install, then say what is where; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="to install into")
    parser.add_argument("--servers", type=Path, default=DECLARED, help="list of servers (TOML)")
    parser.add_argument("--only", nargs="*", default=[], help="names of servers; default all")
    parser.add_argument("--write-locks", action="store_true", help="resolve, and write the locks")
    options = parser.parse_args(argv)
    try:
        servers = load_servers(options.servers)
    except (ValueError, OSError) as error:
        parser.error(f"--servers: {error}")
    names = {one.name for one in servers}
    if unknown := sorted(set(options.only) - names):
        parser.error(f"--only {', '.join(unknown)}: unknown; known: {', '.join(sorted(names))}")
    wanted = [one for one in servers if not options.only or one.name in options.only]
    here = {} if options.write_locks else locate(wanted)
    for server in wanted:
        if server.registry == "pypi" and not isinstance(here.get(server.name), Place):
            install_pypi(server, options.folder / "pypi" / server.name, options.write_locks)
    npm = [one for one in wanted if one.registry == "npm"]
    if npm:
        install_npm(npm, options.folder / "npm", options.write_locks)
    failed = False
    for name, place in locate(wanted, options.folder).items():
        failed = failed or isinstance(place, Missing)
        print(f"{name}: {place.reason if isinstance(place, Missing) else 'installed'}")
    return int(failed)


def install_pypi(server: Server, folder: Path, write_lock: bool) -> None:
    """Install a server of PyPI by pip into a folder of its own.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    lock = LOCKS / f"{server.name}.txt"
    pins = list(server.packages)
    if lock.exists() and not write_lock:
        pins = [line for line in lock.read_text().splitlines() if line and line[0] != "#"]
    if _is_done(folder, pins):
        return
    shutil.rmtree(folder, ignore_errors=True)
    exact = () if write_lock or not lock.exists() else ("--no-deps",)
    _run([*_PIP, "install", "--quiet", *exact, "--target", str(folder), *pins])
    if write_lock:
        _run([*_PIP, "freeze", "--path", str(folder)], into=lock)
        pins = lock.read_text().splitlines()
    _mark_done(folder, pins)


def install_npm(servers: Sequence[Server], folder: Path, write_lock: bool) -> None:
    """Install servers of npm, all into one folder.

    Raises:
        subprocess.CalledProcessError: npm failed; it has said why.
    """
    if shutil.which("npm") is None:
        print("npm is not installed: servers of npm are left out", file=sys.stderr)
        return
    pins = [package for one in servers for package in one.packages]
    lock, ours = LOCKS / "package-lock.json", [LOCKS / "package.json", LOCKS / "package-lock.json"]
    locked = not write_lock and lock.exists() and set(pins) <= set(_locked(ours[0]))
    if locked:
        pins = [lock.read_text()]
    if _is_done(folder, pins):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if locked:
        for path in ours:
            shutil.copy(path, folder)
        _run([*_NPM, "ci"], cwd=folder)
    else:
        (folder / "package.json").write_text('{"name": "mcp-servers", "private": true}\n')
        _run(
            [*_NPM, "install", "--save-exact", "--omit-lockfile-registry-resolved", *pins],
            cwd=folder,
        )
    if write_lock:
        for path in ours:
            shutil.copy(folder / path.name, path)
        pins = [lock.read_text()]
    _mark_done(folder, pins)


def _locked(path: Path) -> list[str]:
    known = json.loads(path.read_text())["dependencies"]
    return [f"{name}@{version}" for name, version in known.items()]


def _is_done(folder: Path, pins: Sequence[str]) -> bool:
    done = folder / _DONE
    return done.exists() and done.read_text() == "\n".join(pins)


def _mark_done(folder: Path, pins: Sequence[str]) -> None:
    (folder / _DONE).write_text("\n".join(pins))


def _run(argv: Sequence[str], cwd: Path | None = None, into: Path | None = None) -> None:
    if into is None:
        subprocess.run(argv, cwd=cwd, check=True)
        return
    into.parent.mkdir(parents=True, exist_ok=True)
    into.write_bytes(subprocess.run(argv, cwd=cwd, check=True, stdout=subprocess.PIPE).stdout)
