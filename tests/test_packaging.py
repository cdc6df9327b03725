"""The wheel and the source distribution, built from a copy of the checkout without the network."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import logitless

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {"README.md", "cuda/rows.cuh"}
NOT_COPIED = (".git", ".venv*", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs a checkout, not an installed package")


def call_hook(folder: Path, hook: str, out: Path) -> subprocess.CompletedProcess[str]:
    """A build hook of setuptools, in `folder`, as pip would call it without isolation."""
    code = f"import setuptools.build_meta as b; print(b.{hook}({str(out)!r}))"
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True)


def build(folder: Path, hook: str, out: Path) -> Path:
    done = call_hook(folder, hook, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the working tree, links as links."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return copy


def package_files(folder: Path) -> set[str]:
    """What an installed package must hold: every module, the type marker, the kernels' device code and document."""
    package = folder / "python" / "logitless"
    files = {str(p.relative_to(package)) for p in package.rglob("*.py")}
    return {f"logitless/{name}" for name in files | {"py.typed"} | {f"kernels/{name}" for name in KERNELS}}


def check_wheel(wheel: Path, expected: set[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == expected
        assert b"struct Moments" in archive.read("logitless/kernels/cuda/rows.cuh")
        (info,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        assert "logitless = logitless.__main__:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert wheel.name.endswith("-py3-none-any.whl")
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert needed == ["torch>=2.9"]
    assert metadata["License-Expression"] == "Apache-2.0"


def test_wheel_from_checkout(checkout: Path, tmp_path: Path) -> None:
    check_wheel(build(checkout, "build_wheel", tmp_path), package_files(checkout))


def test_sdist_holds_everything_and_builds_the_same_wheel(checkout: Path, tmp_path: Path) -> None:
    expected = package_files(checkout)
    sdist = build(checkout, "build_sdist", tmp_path)
    unpacked = tmp_path / "unpacked"
    with tarfile.open(sdist) as archive:
        assert not [m.name for m in archive.getmembers() if m.issym() or m.islnk()]
        archive.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    for name in (
        "kernels/cuda/rows_host.cpp",
        "CMakeLists.txt",
        "README.md",
        "CHANGELOG.md",
        "tests/run.sh",
        "tests/conftest.py",
    ):
        assert (folder / name).is_file(), name
    check_wheel(build(folder, "build_wheel", tmp_path), expected)


def test_installed_wheel_imports_and_finds_its_kernels(checkout: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    with zipfile.ZipFile(build(checkout, "build_wheel", tmp_path)) as archive:
        archive.extractall(installed)
    code = (
        "import importlib.resources as r, logitless\n"
        "print(logitless.__file__)\n"
        "print((r.files('logitless') / 'kernels' / 'cuda' / 'rows.cuh').is_file())"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed / "logitless" / "__init__.py"), "True"]


def test_a_link_that_became_a_text_file_stops_the_build_with_a_sentence(checkout: Path, tmp_path: Path) -> None:
    """What git makes of a link where core.symlinks is false."""
    link = checkout / "python" / "logitless" / "kernels"
    link.unlink()
    link.write_text("../../kernels")
    done = call_hook(checkout, "build_wheel", tmp_path)
    assert done.returncode != 0
    assert "core.symlinks" in done.stderr and "git checkout" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_kernels_are_reached_through_one_relative_link() -> None:
    link = ROOT / "python" / "logitless" / "kernels"
    if not link.is_symlink():
        pytest.skip("an unpacked source distribution holds a folder instead")
    assert os.readlink(link) == os.path.join("..", "..", "kernels")
    assert not list((ROOT / "kernels").rglob("__init__.py"))


def test_version_is_stated_once_more_and_alike() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == logitless.__version__
    assert f"## {logitless.__version__}" in (ROOT / "CHANGELOG.md").read_text()
