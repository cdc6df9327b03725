"""Packages, package data, and the compiled kernels; the metadata and every tool's settings are in pyproject.toml.

`kernels/` is a folder of the repository and, through the relative link `python/logitless/kernels`, of the package. It
holds no `__init__.py`: `kernels/triton` would then shadow the real `triton` wherever `kernels/` is on the path.

Two libraries are built, by CMake: kernels/cuda where nvcc is (the one of CUDA_HOME, or without that variable the one
in PATH or in /usr/local/cuda), and kernels/cpu where a C++ compiler for x86-64 is (CXX, or c++). Steered by

    LOGITLESS_CUDA, LOGITLESS_CPU  auto (the default), require (what is missing is an error) or off
    LOGITLESS_CUDA_ARCHITECTURES   what to compile for, as CMake says it: "80-real;90a-real" (default: kernels/cuda)
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
LINK = ROOT / "python" / "logitless" / "kernels"
#: Headers of the fused Hopper forward; the release that it was written and compiled with.
CUTLASS = "nvidia-cutlass==4.2.0.0"

if not LINK.is_dir():
    raise SystemExit(
        "logitless: python/logitless/kernels should lead to the folder kernels/ but does not. Git writes links as text "
        "files where core.symlinks is false: run 'git config core.symlinks true', then "
        "'git checkout -- python/logitless/kernels', and install again."
    )


def find_nvcc() -> tuple[str | None, str]:
    """The nvcc to build with, or None and the reason."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin")), "no nvcc in CUDA_HOME"
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return found, "no nvcc in PATH or /usr/local/cuda"


def find_cxx() -> tuple[str | None, str]:
    """The C++ compiler likewise."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None, f"no x86-64 processor, but {platform.machine()}"
    name = os.environ.get("CXX", "c++")
    return shutil.which(name), f"no C++ compiler {name} in PATH"


def cuda_options(nvcc: str) -> list[str]:
    found = importlib.util.find_spec("cutlass_library")
    options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DLOGITLESS_CUDA=ON", "-DLOGITLESS_CPU=OFF"]
    if found is not None and found.submodule_search_locations:
        options.append(f"-DLOGITLESS_CUTLASS={found.submodule_search_locations[0]}/source/include")
    if architectures := os.environ.get("LOGITLESS_CUDA_ARCHITECTURES"):
        options.append(f"-DLOGITLESS_CUDA_ARCHITECTURES={architectures}")
    return options


def cpu_options(cxx: str) -> list[str]:
    return [f"-DCMAKE_CXX_COMPILER={cxx}", "-DLOGITLESS_CUDA=OFF", "-DLOGITLESS_CPU=ON"]


@dataclass(frozen=True)
class Library:
    """A library of compiled kernels, `liblogitless_<folder>.so`, in kernels/<folder> of the package."""

    folder: str
    find: Callable[[], tuple[str | None, str]]
    options: Callable[[str], list[str]]
    advice: str
    requirements: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return self.folder.upper()

    @property
    def file(self) -> str:
        return f"liblogitless_{self.folder}.so"

    def compiler(self) -> tuple[str | None, str]:
        """What to build it with, or None and the reason."""
        variable = f"LOGITLESS_{self.title}"
        mode = os.environ.get(variable, "auto")
        if mode not in ("auto", "require", "off"):
            raise SystemExit(f"logitless: {variable}: expected auto, require or off, got {mode!r}")
        if mode == "off":
            return None, f"{variable}=off"
        found, reason = self.find()
        if found is None and mode == "require":
            raise SystemExit(f"logitless: {variable}=require, but there is {reason}")
        return found, reason

    def build(self, compiler: str, folder: Path, destination: Path) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit(
                f"logitless: the {self.title} kernels need cmake; install it, or set LOGITLESS_{self.title}=off"
            )
        shutil.rmtree(folder, ignore_errors=True)
        options = [*self.options(compiler), "-DLOGITLESS_HOST=OFF"]
        target = ["--target", f"logitless_{self.folder}", "--parallel", str(os.cpu_count() or 1)]
        try:
            subprocess.run([cmake, "-S", str(ROOT), "-B", str(folder), *options], check=True)
            subprocess.run([cmake, "--build", str(folder), *target], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"logitless: the {self.title} kernels did not build (exit code {error.returncode}, the output is "
                f"above); LOGITLESS_{self.title}=off installs without them{self.advice}"
            ) from None
        destination.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / self.file, destination / self.file)


LIBRARIES = (
    Library("cuda", find_nvcc, cuda_options, ", LOGITLESS_CUDA_ARCHITECTURES names other architectures", (CUTLASS,)),
    Library("cpu", find_cxx, cpu_options, ""),
)


def wanted() -> list[tuple[Library, str]]:
    """The libraries to build, each with its compiler."""
    found = ((library, library.compiler()[0]) for library in LIBRARIES)
    return [(library, compiler) for library, compiler in found if compiler is not None]


def build_requirements() -> list[str]:
    """What an isolated build needs beside setuptools."""
    needed = [requirement for library, _ in wanted() for requirement in library.requirements]
    return needed if not wanted() or shutil.which("cmake") else [*needed, "cmake"]


class BuildKernels(Command):
    """The libraries, into the package: among the built files, or in an editable install among the sources."""

    description = "build the libraries of compiled kernels"
    user_options: ClassVar[list[tuple[str, str, str]]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.build_temp: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"), ("build_temp", "build_temp"))

    def run(self) -> None:
        for library in LIBRARIES:
            compiler, reason = library.compiler()
            if compiler is None:
                print(f"logitless: {library.title} kernels skipped: {reason}", file=sys.stderr)
                continue
            print(f"logitless: building the {library.title} kernels with {compiler}", file=sys.stderr)
            library.build(compiler, Path(str(self.build_temp)).resolve() / library.folder, self._destination(library))

    def _destination(self, library: Library) -> Path:
        kernels = LINK if self.editable_mode else Path(str(self.build_lib)) / "logitless" / "kernels"
        return kernels / library.folder

    # What setuptools asks a part of `build` for.

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt"]

    def get_outputs(self) -> list[str]:
        return [str(self._destination(library) / library.file) for library, _ in wanted()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_kernels", None)]


class Wheel(bdist_wheel):
    """Tagged for the platform, though for any Python, where it carries a library."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        """Whether something in it is compiled, and its place among other things compiled."""
        return bool(wanted())


def long_description() -> str:
    """README for a package index, which has none of the files that relative links lead to: the links' text alone."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"!?\[([^\]]*)\]\((?!https?://)[^)]*\)", r"\1", readme)


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    packages=find_namespace_packages(
        "python", include=["logitless", "logitless.*"], exclude=["logitless.kernels.cuda.host"]
    ),
    package_dir={"": "python"},
    package_data={"": ["py.typed", "*.cu", "*.cuh", "*.h", "*.json", "*.md"]},
    include_package_data=False,
    zip_safe=False,
    setup_requires=build_requirements(),
    distclass=Package,
    cmdclass={"build": Build, "build_kernels": BuildKernels, "bdist_wheel": Wheel},
)
