"""The guard that the integrations of single hosts share: a host that is absent, or of a release without a number."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from logitless.integrations.hosts import Switch, UnsupportedHostError, check_version

#: A host's distribution, its module here, and how a user begins; None where importing the module is the beginning.
HOSTS: dict[str, tuple[str, Callable[[ModuleType], object] | None]] = {
    "axolotl": ("axolotl", None),
    "llamafactory": ("llamafactory", lambda module: module.enable()),
    "ms-swift": ("swift", lambda module: module.enable()),
    "openrlhf": ("openrlhf", lambda module: module.enable()),
    "torchtitan": ("torchtitan", None),
    "torchtune": ("torchtune", lambda module: module.LogitlessLoss()),
    "verl": ("verl", lambda module: module.enable()),
}


def absent(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize("package", HOSTS)
def test_an_absent_host_is_named_whatever_else_is_absent(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, begin = HOSTS[package]
    if package == "axolotl":
        pytest.importorskip("pydantic")
    monkeypatch.setattr(importlib.metadata, "version", absent)
    for missing in ("packaging", "packaging.specifiers", "packaging.version"):
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"logitless.integrations.{name}", raising=False)
    with pytest.raises(UnsupportedHostError, match=f"{package}: not installed; expected >="):
        module = importlib.import_module(f"logitless.integrations.{name}")
        begin and begin(module)


def test_a_release_without_a_number_is_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("packaging")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "main-4f2a")
    with pytest.raises(UnsupportedHostError, match="host main-4f2a: logitless was tested with >=1,<2"):
        check_version("host", ">=1,<2")
    with pytest.raises(UnsupportedHostError, match="changes nothing"):
        Switch("host", ">=1,<2").on(list)
