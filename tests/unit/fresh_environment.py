"""A virtual environment outside the checkout: what is installed here, but for this package.

Every package is a link to the installed one, so that 6 GB need not be copied; the checkout's own
(editable) install is left out, and so is whatever a test hides. What a test lays there instead is
found by Python, pip and importlib.metadata as if it had been installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment and an empty folder to run in."""

    folder: Path

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.folder / "bin" / "python")

    @property
    def site(self) -> Path:
        """Its folder of packages."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"

    def run(self, *command: str, timeout_s: float = 3600) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, or a program by its path, outside the checkout."""
        program = self.folder / "bin" / command[0]
        argv = [str(program) if program.exists() else command[0], *command[1:]]
        drop = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        environ = {name: value for name, value in os.environ.items() if name not in drop}
        environ["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{environ['PATH']}"
        away = self.folder / "away"
        away.mkdir(exist_ok=True)
        return subprocess.run(
            argv, cwd=away, env=environ, capture_output=True, text=True, timeout=timeout_s
        )

    def lay(self, distribution: str, version: str, files: dict[str, str]) -> None:
        """Lay a distribution into the environment as pip would."""
        for name, text in files.items():
            path = self.site / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        info = self.site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )

    def install(self, wheel: Path) -> None:
        """Have this interpreter's pip install a wheel there, from the file alone."""
        command = ["pip", "--python", self.python, "install", "--no-deps", "--no-index"]
        options = ["--no-compile", "--quiet", "--disable-pip-version-check", str(wheel)]
        subprocess.run([sys.executable, "-m", *command, *options], check=True)


def make_environment(folder: Path, hidden: Collection[str] = ()) -> Environment:
    """Make an environment.

    Args:
        folder: to make it in.
        hidden: names of packages and of distributions, in lower case with underscores, that are
            left out.
    """
    venv.create(folder, symlinks=True, with_pip=False)
    made = Environment(folder)
    left_out = {"megatron_k2", "__pycache__", *hidden}
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        stem = path.name.partition("-")[0].removesuffix(".py").lower()
        if stem in left_out or path.name.startswith(("__editable__", "_virtualenv")):
            continue
        if not (made.site / path.name).exists():
            (made.site / path.name).symlink_to(path)
    return made
