"""One change to one upstream object: declared as data, applied explicitly, reversible.

A patch is the last hook, used only where no argument, spec submodule, subclass or registry entry
reaches. Each lives in a file of its own and exports one frozen record. ``apply`` refuses rather
than guess: when the upstream version is outside the closed range, when the source of the target
is not the source the patch was written against, or when a module we do not know of has already
imported the target by name and would keep the old object. ``README.md`` beside this file is the
ledger, generated from the records.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_k2 import compat

_ORIGINALS: dict[str, Any] = {}


class PatchError(RuntimeError):
    """A patch cannot be applied to the installed upstream."""


@dataclass(frozen=True)
class Patch:
    """A reversible replacement of one upstream attribute.

    Attributes:
        id: short unique name, used in errors and in the ledger.
        target: ``package.module:Attribute.path`` of the object to replace.
        replacement: called with the original object, returns what takes its place.
        distribution: name of the upstream distribution, for the version check.
        min_version, max_version: closed range of versions the patch was written against.
        fingerprint: first 12 hex digits of the SHA-256 of the original's source, ``builtin`` for
            an object without Python source.
        why: one sentence: what fails without it.
        upstream: upstream issue, pull request, or file and line.
        remove_when: the condition under which the patch is deleted.
        still_needed: returns whether the *unpatched* upstream still shows the problem.
        group: ``core`` (always applied by ``register``) or ``cpu`` (only on the CPU device).
        importers: modules that bind the target by name at import; they are rebound too. None
            where modules that hold the original may keep it.
    """

    id: str
    target: str
    replacement: Callable[[Any], Any]
    distribution: str
    min_version: str
    max_version: str
    fingerprint: str
    why: str
    upstream: str
    remove_when: str
    still_needed: Callable[[], bool]
    group: str = "core"
    importers: tuple[str, ...] | None = ()

    @property
    def is_applied(self) -> bool:
        """Whether this process runs with the replacement."""
        return self.id in _ORIGINALS

    def apply(self) -> None:
        """Replace the target; a second call does nothing.

        Raises:
            PatchError: version out of range, source changed, symbol missing, or the target is
                already held by name in a module outside ``importers``.
        """
        if self.is_applied:
            return
        self._check_version()
        owner, name, original = self._resolve()
        found = fingerprint(original)
        if found != self.fingerprint:
            raise PatchError(
                f"patch {self.id}: {self.target} has fingerprint {found}, the patch was written "
                f"against {self.fingerprint}; read the upstream change and update the patch"
            )
        self._check_importers(original)
        replacement = self.replacement(original)
        if inspect.isfunction(replacement) and inspect.isfunction(original):
            functools.update_wrapper(replacement, original)
        _ORIGINALS[self.id] = inspect.getattr_static(owner, name)
        setattr(owner, name, replacement)
        self._rebind(name, original, replacement)

    def revert(self) -> None:
        """Put the original back; a call without ``apply`` does nothing."""
        if not self.is_applied:
            return
        owner, name, current = self._resolve()
        original = _ORIGINALS.pop(self.id)
        setattr(owner, name, original)
        self._rebind(name, current, original)

    def original(self) -> Any:
        """Return the upstream object, whether or not the patch is applied."""
        return _ORIGINALS[self.id] if self.is_applied else self._resolve()[2]

    def _check_version(self) -> None:
        found = compat.distribution_version(self.distribution)
        if not compat.in_range(found, self.min_version, self.max_version):
            raise PatchError(
                f"patch {self.id}: written for {self.distribution} {self.min_version} to "
                f"{self.max_version}, found {found}; install a version in that range"
            )

    def _resolve(self) -> tuple[Any, str, Any]:
        """Return (owner, attribute name, current object) of the target."""
        module_name, _, path = self.target.partition(":")
        owner: Any = importlib.import_module(module_name)
        *parents, name = path.split(".")
        try:
            for parent in parents:
                owner = getattr(owner, parent)
            return owner, name, getattr(owner, name)
        except AttributeError as error:
            raise PatchError(f"patch {self.id}: {self.target} does not exist: {error}") from error

    def _holders(self, name: str, value: Any) -> list[str]:
        """Return the loaded modules, other than the target's, that bind ``value`` as ``name``."""
        module_name, _, path = self.target.partition(":")
        if "." in path:
            return []
        return [
            loaded
            for loaded, module in list(sys.modules.items())
            if loaded != module_name and getattr(module, "__dict__", {}).get(name) is value
        ]

    def _check_importers(self, original: Any) -> None:
        if self.importers is None:
            return
        name = self.target.rpartition(":")[2]
        unknown = set(self._holders(name, original)) - set(self.importers)
        if unknown:
            raise PatchError(
                f"patch {self.id}: {self.target} was already imported by name in "
                f"{', '.join(sorted(unknown))}; call megatron_k2.register() before that import"
            )

    def _rebind(self, name: str, old: Any, new: Any) -> None:
        if self.importers is None:
            return
        for module_name in self._holders(name, old):
            setattr(sys.modules[module_name], name, new)


def fingerprint(target: Any) -> str:
    """Return the first 12 hex digits of the SHA-256 of an object's source, or ``builtin``.

    Raises:
        OSError: the object is Python code whose source cannot be read.
    """
    if isinstance(target, property):
        target = target.fget
    target = getattr(target, "__func__", target)
    target = inspect.unwrap(target) if callable(target) else target
    if not (inspect.isfunction(target) or inspect.isclass(target)):
        return "builtin"
    return hashlib.sha256(inspect.getsource(target).encode()).hexdigest()[:12]
