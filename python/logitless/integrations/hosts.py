"""What the modules for single hosts share: a guard of the host's version and interface, and a switch.

A host is a trainer that somebody else maintains. Each module names the range of releases that it was tested with. It
changes nothing in another release, and nothing whose parameters are not those that it knows.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

_MISSING = object()


class UnsupportedHostError(RuntimeError):
    """A host's release, interface or option that the integration does not serve. Nothing has been changed then."""


def check_version(package: str, tested: str) -> None:
    """Raises UnsupportedHostError unless the installed release of a package is in the tested range."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedHostError(f"{package}: not installed; expected {tested}") from None
    if not in_range(found, tested):
        raise UnsupportedHostError(
            f"{package} {found}: logitless was tested with {tested}, and changes nothing in another release"
        )


def in_range(version: str, tested: str) -> bool:
    """Whether a release is in a range of releases; a version of no known form is not."""
    from packaging.specifiers import SpecifierSet  # every host brings it, torch does not
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(tested).contains(version, prereleases=True)
    except InvalidVersion:  # a build of one's own
        return False


def host_module(package: str, tested: str, name: str) -> Any:
    """A module of a host whose classes an integration derives from, once its release is known to be right.

    Raises:
        UnsupportedHostError: the host is not installed, or another release.
    """
    check_version(package, tested)
    return importlib.import_module(name)


def check_parameters(function: Callable[..., Any], *names: str) -> None:
    """Raises UnsupportedHostError unless a host's function has exactly these parameters, in this order."""
    found = tuple(inspect.signature(function).parameters)
    if found != names:
        name = f"{function.__module__}.{function.__qualname__}"
        raise UnsupportedHostError(f"{name}: expected the parameters {list(names)}, found {list(found)}")


class Change(NamedTuple):
    """One name of a host that is replaced: where it is, the parameters that it must have, and what to make of it."""

    owner: Any
    name: str
    parameters: tuple[str, ...] | None  # None for what is no function
    make: Callable[[Any], Any]


class Switch:
    """The replaced functions of a host: all of them, or none. As a context manager it puts them back at the end.

    Args:
        package, tested: the host's distribution and the range of its releases that were tested.
    """

    def __init__(self, package: str, tested: str) -> None:
        self.package, self.tested = package, tested
        self._before: list[tuple[Any, str, Any]] = []

    def on(self, changes: Callable[[], list[Change]]) -> Switch:
        """Makes the changes, which are looked up once the version is known to be right.

        Raises:
            UnsupportedHostError: another release or other parameters, or the changes have been made already.
        """
        if self._before:
            raise UnsupportedHostError(f"{self.package}: enabled already; take that back first")
        check_version(self.package, self.tested)
        found = changes()
        for change in found:
            if change.parameters is not None:
                check_parameters(getattr(change.owner, change.name), *change.parameters)
        made = [(owner, name, make(getattr(owner, name))) for owner, name, _, make in found]  # raises before any is set
        for owner, name, new in made:
            self._before.append((owner, name, vars(owner).get(name, _MISSING)))
            setattr(owner, name, new)
        return self

    def off(self) -> None:
        """Puts the host's own functions back; does nothing where they are in place."""
        for owner, name, own in reversed(self._before):
            if own is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
        self._before.clear()

    def __enter__(self) -> Switch:
        return self

    def __exit__(self, *_: object) -> None:
        self.off()
