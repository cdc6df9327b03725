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
from cuda_build import needs_compiler

import logitless
from logitless.kernels.cpu import library as cpu_library

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = (".git", ".venv*", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.so")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs a checkout, not an installed package")


def call_hook(
    folder: Path, hook: str, out: Path | None, cuda: str = "off", **environment: str
) -> subprocess.CompletedProcess[str]:
    """A build hook of setuptools, in `folder`, as pip would call it without isolation."""
    code = f"import setuptools.build_meta as b; print(b.{hook}({'' if out is None else repr(str(out))}))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "LOGITLESS_CUDA": cuda, "LOGITLESS_CPU": "off", **environment}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


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
    """The files of an installed package: modules, the type marker, a schema, the kernels' device code and documents,
    but not the code that runs the CUDA kernels on a CPU."""
    package = folder / "python" / "logitless"
    kernels = (package / "kernels").resolve()  # which rglob does not enter by a link
    files = {str(p.relative_to(package)) for p in package.rglob("*.py")} | {"py.typed", "bench/schema.json"}
    files |= {f"kernels/{p.relative_to(kernels)}" for p in kernels.rglob("*") if p.suffix in (".py", ".md")}
    for here in (kernels, kernels / "cpu", kernels / "cuda"):
        device = (p for p in here.iterdir() if p.suffix in (".cu", ".cuh", ".h"))
        files |= {f"kernels/{p.relative_to(kernels)}" for p in device}
    assert {"kernels/rows.h", "kernels/MATH.md", "kernels/cuda/README.md"} <= files
    libraries = ("cuda/logitless.h", "cuda/library.py", "cpu/logitless_cpu.h", "cpu/library.py")
    assert {f"kernels/{name}" for name in libraries} <= files
    return {f"logitless/{name}" for name in files}


def check_wheel(wheel: Path, expected: set[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == expected
        assert b"struct Moments" in archive.read("logitless/kernels/rows.h")
        (info,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        assert "logitless = logitless.__main__:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert wheel.name.endswith("-py3-none-any.whl")
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert needed == ["torch>=2.9"]
    assert metadata["License-Expression"] == "Apache-2.0"
    description = metadata.get_payload()
    assert description.startswith("# logitless\n") and "docs/losses.md has all" in description
    assert "](" not in description.replace("](https://", "")


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
        "kernels/cpu/avx2.cpp",
        "kernels/cpu/CMakeLists.txt",
        "kernels/cuda/host/shim.cpp",
        "kernels/cuda/sources.cmake",
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
        "print((r.files('logitless') / 'kernels' / 'rows.h').is_file())"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed / "logitless" / "__init__.py"), "True"]


def test_a_link_that_became_a_text_file_stops_the_build_with_a_sentence(checkout: Path, tmp_path: Path) -> None:
    """Git writes a link as such a file if core.symlinks is false."""
    link = checkout / "python" / "logitless" / "kernels"
    link.unlink()
    link.write_text("../../kernels")
    done = call_hook(checkout, "build_wheel", tmp_path)
    assert done.returncode != 0
    assert "core.symlinks" in done.stderr and "git checkout" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


# ---------------------------------------------------------------------------------------------------------------------
# The CUDA library in the wheel


FAKE_CMAKE = """#!/bin/sh
# Notes its arguments; "builds" the library in the folder that `cmake --build` names.
echo "$@" >> "{log}"
if [ "$1" = --build ]; then
    {build}
fi
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with an nvcc and a cmake that take no minutes; what cmake was asked for is in `asked`."""
    folder = tmp_path / "tools" / "bin"
    folder.mkdir(parents=True)
    write_tool(folder / "nvcc", "#!/bin/sh\n")
    write_tool(
        folder / "cmake",
        FAKE_CMAKE.format(log=folder / "asked", build='mkdir -p "$2" && echo library > "$2/liblogitless_cuda.so"'),
    )
    return folder


def write_tool(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def environment_of(tools: Path) -> dict[str, str]:
    return {"PATH": f"{tools}:{os.environ['PATH']}", "CUDA_HOME": str(tools.parent)}


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_wheel_carries_the_library_where_nvcc_is(checkout: Path, tmp_path: Path, tools: Path, mode: str) -> None:
    """Tagged for the platform, and for any Python 3."""
    settings = {**environment_of(tools), "LOGITLESS_CUDA_ARCHITECTURES": "86-real"}
    done = call_hook(checkout, "build_wheel", tmp_path, mode, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = tmp_path / done.stdout.split()[-1]
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (info,) = [name for name in archive.namelist() if name.endswith("/WHEEL")]
        assert "Root-Is-Purelib: false" in archive.read(info).decode()
    assert names == package_files(checkout) | {"logitless/kernels/cuda/liblogitless_cuda.so"}
    configured, built = (tools / "asked").read_text().splitlines()
    assert f"-DCMAKE_CUDA_COMPILER={tools / 'nvcc'}" in configured and "ARCHITECTURES=86-real" in configured
    assert "--target logitless_cuda" in built


def test_an_editable_install_has_the_library_beside_its_loader(checkout: Path, tmp_path: Path, tools: Path) -> None:
    done = call_hook(checkout, "build_editable", tmp_path, "auto", **environment_of(tools))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (checkout / "kernels" / "cuda" / "liblogitless_cuda.so").read_text() == "library\n"
    # A source distribution and a later wheel without nvcc take nothing of it along.
    check_wheel(build(checkout, "build_wheel", tmp_path), package_files(checkout))


def test_without_nvcc_one_line_says_that_the_library_was_skipped(checkout: Path, tmp_path: Path) -> None:
    done = call_hook(checkout, "build_wheel", tmp_path, "auto", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "CUDA" in line]
    assert said == ["logitless: CUDA kernels skipped: no nvcc in CUDA_HOME"]
    check_wheel(tmp_path / done.stdout.split()[-1], package_files(checkout))


def test_require_without_nvcc_is_an_error(checkout: Path, tmp_path: Path) -> None:
    done = call_hook(checkout, "build_wheel", tmp_path, "require", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl"))
    assert "LOGITLESS_CUDA=require, but there is no nvcc in CUDA_HOME" in done.stderr


def test_an_unknown_mode_is_an_error(checkout: Path, tmp_path: Path) -> None:
    done = call_hook(checkout, "build_wheel", tmp_path, "yes")
    assert done.returncode != 0 and "expected auto, require or off, got 'yes'" in done.stderr


def test_a_library_that_does_not_build_is_an_error_with_two_ways_out(
    checkout: Path, tmp_path: Path, tools: Path
) -> None:
    write_tool(tools / "cmake", FAKE_CMAKE.format(log=tools / "asked", build="exit 7"))
    done = call_hook(checkout, "build_wheel", tmp_path, "auto", **environment_of(tools))
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl"))
    assert "did not build (exit code 7" in done.stderr
    assert "LOGITLESS_CUDA=off" in done.stderr and "LOGITLESS_CUDA_ARCHITECTURES" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The CPU library in the wheel


@needs_compiler
def test_wheel_carries_the_cpu_library_where_a_compiler_is(checkout: Path, tmp_path: Path) -> None:
    """The installed package finds the library."""
    done = call_hook(checkout, "build_wheel", tmp_path, LOGITLESS_CPU="require")
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = tmp_path / done.stdout.split()[-1]
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    assert names == package_files(checkout) | {"logitless/kernels/cpu/liblogitless_cpu.so"}
    code = "from logitless.kernels.cpu import library; print(library.load(library.location()).set)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    environment.pop("LOGITLESS_CPU_LIBRARY", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() in ("None", *cpu_library.SETS), done.stderr


def test_require_without_a_compiler_is_an_error(checkout: Path, tmp_path: Path) -> None:
    done = call_hook(checkout, "build_wheel", tmp_path, LOGITLESS_CPU="require", CXX="no-such-compiler")
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl"))
    assert "LOGITLESS_CPU=require, but there is no C++ compiler no-such-compiler in PATH" in done.stderr


def test_without_a_compiler_one_line_says_that_the_library_was_skipped(checkout: Path, tmp_path: Path) -> None:
    done = call_hook(checkout, "build_wheel", tmp_path, LOGITLESS_CPU="auto", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "CPU kernels" in line]
    assert said == ["logitless: CPU kernels skipped: no C++ compiler no-such-compiler in PATH"]
    check_wheel(tmp_path / done.stdout.split()[-1], package_files(checkout))


def test_what_an_isolated_build_needs(checkout: Path, tmp_path: Path, tools: Path) -> None:
    """CUTLASS's headers where nvcc is, and nothing where it is not or is not wanted."""
    needs = {
        mode: call_hook(checkout, "get_requires_for_build_wheel", None, mode, **environment_of(tools)).stdout
        for mode in ("auto", "off")
    }
    assert "nvidia-cutlass==" in needs["auto"] and needs["off"].splitlines()[-1] == "[]"


def test_kernels_are_reached_through_one_relative_link() -> None:
    link = ROOT / "python" / "logitless" / "kernels"
    if not link.is_symlink():
        pytest.skip("an unpacked source distribution holds a folder instead")
    assert os.readlink(link) == os.path.join("..", "..", "kernels")
    assert not list((ROOT / "kernels").rglob("__init__.py"))


def test_version_is_stated_once_more_and_alike() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == logitless.__version__
    assert f"## {logitless.__version__}" in (ROOT / "CHANGELOG.md").read_text()
