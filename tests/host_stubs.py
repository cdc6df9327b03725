"""Hosts that may not be installed: whether they are, and a stub of a host's published interface in their place."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest


def installed(package: str, *modules: str) -> bool:
    """Whether the real host is here."""
    return importlib.util.find_spec(package) is not None and all(importlib.util.find_spec(m) for m in modules)


@contextmanager
def stubbed(package: str, version: str, modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Puts a stub of a host's published interface where its package would be imported from."""
    own_version: Callable[[str], str] = importlib.metadata.version
    before = {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in {m.partition(".")[0] for m in modules}
    }
    for name in before:
        del sys.modules[name]
    made: list[str] = []
    for name, content in modules.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in sys.modules:
                module = ModuleType(path)
                module.__path__ = []
                sys.modules[path] = module
                made.append(path)
                if i > 1:
                    setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)
        vars(sys.modules[name]).update(content)
    importlib.metadata.version = lambda name: version if name == package else own_version(name)
    try:
        yield
    finally:
        importlib.metadata.version = own_version
        for name in made:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@contextmanager
def real_or_stub(kind: str, package: str, version: str, stub: dict[str, dict[str, Any]], *needs: str) -> Iterator[None]:
    """The "real" host, or the "stub" of a release of it; skips the test where the packages of the real one are absent.

    Args:
        needs: the packages to look for.
    """
    if kind == "stub":
        with stubbed(package, version, stub):
            yield
        return
    if not installed(*needs):
        pytest.skip(f"{package} is not installed")
    yield
