"""Packages, package data, and the CUDA library; the metadata and every tool's settings are in pyproject.toml.

`kernels/` is a folder of the repository and, through the relative link `python/logitless/kernels`, of the package. It
holds no `__init__.py`: `kernels/triton` would then shadow the real `triton` wherever `kernels/` is on the path.

The CUDA library is built, by CMake, where nvcc is: the one of CUDA_HOME, or without that variable the one in PATH or in
/usr/local/cuda. Two variables of the environment steer it:

    LOGITLESS_CUDA                auto (the default), require (no nvcc is an error) or off
    LOGITLESS_CUDA_ARCHITECTURES  what to compile for, as CMake says it: "80-real;90a-real" (default: kernels/cuda)
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
LINK = ROOT / "python" / "logitless" / "kernels"
LIBRARY = "liblogitless_cuda.so"
#: Headers of the fused Hopper forward; the release that it was written and compiled with.
CUTLASS = "nvidia-cutlass==4.2.0.0"

if not LINK.is_dir():
    raise SystemExit(
        "logitless: python/logitless/kernels should lead to the folder kernels/ but does not. Git writes links as text "
        "files where core.symlinks is false: run 'git config core.symlinks true', then "
        "'git checkout -- python/logitless/kernels', and install again."
    )


def find_nvcc() -> str | None:
    """The nvcc to build with."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def wanted_nvcc() -> tuple[str | None, str]:
    """The nvcc to build with, or None and the reason."""
    mode = os.environ.get("LOGITLESS_CUDA", "auto")
    if mode not in ("auto", "require", "off"):
        raise SystemExit(f"logitless: LOGITLESS_CUDA: expected auto, require or off, got {mode!r}")
    if mode == "off":
        return None, "LOGITLESS_CUDA=off"
    place = "CUDA_HOME" if os.environ.get("CUDA_HOME") else "PATH or /usr/local/cuda"
    nvcc, reason = find_nvcc(), f"no nvcc in {place}"
    if nvcc is None and mode == "require":
        raise SystemExit(f"logitless: LOGITLESS_CUDA=require, but there is {reason}")
    return nvcc, reason


def build_requirements() -> list[str]:
    """What an isolated build needs beside setuptools."""
    if wanted_nvcc()[0] is None:
        return []
    return [CUTLASS] if shutil.which("cmake") else [CUTLASS, "cmake"]


def cmake_options(nvcc: str) -> list[str]:
    found = importlib.util.find_spec("cutlass_library")
    options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DLOGITLESS_CUDA=ON", "-DLOGITLESS_HOST=OFF"]
    if found is not None and found.submodule_search_locations:
        options.append(f"-DLOGITLESS_CUTLASS={found.submodule_search_locations[0]}/source/include")
    if architectures := os.environ.get("LOGITLESS_CUDA_ARCHITECTURES"):
        options.append(f"-DLOGITLESS_CUDA_ARCHITECTURES={architectures}")
    return options


class BuildCuda(Command):
    """The CUDA library, into the package: among the built files, or in an editable install among the sources."""

    description = "build the CUDA library where nvcc is"
    user_options: ClassVar[list[tuple[str, str, str]]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.build_temp: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"), ("build_temp", "build_temp"))

    def run(self) -> None:
        nvcc, reason = wanted_nvcc()
        if nvcc is None:
            print(f"logitless: CUDA kernels skipped: {reason}", file=sys.stderr)
            return
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("logitless: the CUDA kernels need cmake; install it, or set LOGITLESS_CUDA=off")
        folder = Path(str(self.build_temp)).resolve() / "cuda"
        shutil.rmtree(folder, ignore_errors=True)
        print(f"logitless: building the CUDA kernels with {nvcc}, which takes minutes", file=sys.stderr)
        try:
            subprocess.run([cmake, "-S", str(ROOT), "-B", str(folder), *cmake_options(nvcc)], check=True)
            jobs = str(os.cpu_count() or 1)
            command = [cmake, "--build", str(folder), "--target", "logitless_cuda", "--parallel", jobs]
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"logitless: the CUDA kernels did not build (exit code {error.returncode}, the output is above); "
                "LOGITLESS_CUDA=off installs without them, LOGITLESS_CUDA_ARCHITECTURES names other architectures"
            ) from None
        destination = self._destination()
        destination.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / LIBRARY, destination / LIBRARY)

    def _destination(self) -> Path:
        return LINK / "cuda" if self.editable_mode else Path(str(self.build_lib)) / "logitless" / "kernels" / "cuda"

    # What setuptools asks a part of `build` for.

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt"]

    def get_outputs(self) -> list[str]:
        return [] if wanted_nvcc()[0] is None else [str(self._destination() / LIBRARY)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_cuda", None)]


class Wheel(bdist_wheel):
    """Tagged for the platform, though for any Python, where it carries the library."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        """Whether something in it is compiled, and its place among other things compiled."""
        return wanted_nvcc()[0] is not None


setup(
    packages=find_namespace_packages(
        "python", include=["logitless", "logitless.*"], exclude=["logitless.kernels.cuda.host"]
    ),
    package_dir={"": "python"},
    package_data={"": ["py.typed", "*.cu", "*.cuh", "*.h", "*.md"]},
    include_package_data=False,
    zip_safe=False,
    setup_requires=build_requirements(),
    distclass=Package,
    cmdclass={"build": Build, "build_cuda": BuildCuda, "bdist_wheel": Wheel},
)
