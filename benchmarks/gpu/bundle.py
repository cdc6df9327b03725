"""What a machine with a GPU lacks where it has no network: the CUDA library, built, and the peers, in one folder.

python -m benchmarks bundle                    .gpu/ with everything; what did not change is not made again
python -m benchmarks bundle --without quack    a smaller one: of a peer that is not there the report says so

That machine has PyTorch with Triton, NumPy, pytest, and what TRL and quack import beside `WHEELS`: transformers,
accelerate, pandas, pyarrow, xxhash, einops. `python -m benchmarks gpu --bundle .gpu` unpacks the folder there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import lzma
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from logitless.bench.environment import checked_out
from logitless.bench.targets import MIB, Json

from ..places import RESULTS, ROOT
from . import build

FOLDER = ROOT / ".gpu"
MANIFEST, LIBRARY = "manifest.json", f"{build.NAME}.xz"

#: The releases that are carried, by the piece that they are a part of.
WHEELS: dict[str, tuple[str, ...]] = {
    "peers": (
        *("liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"),
        *("trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19"),
    ),
    "quack": (
        *("quack-kernels==0.6.5", "apache-tvm-ffi==0.1.15.post2", "torch-c-dlpack-ext==0.1.5"),
        *(f"nvidia-cutlass-dsl{part}==4.8.1" for part in ("", "-libs-base", "-libs-core", "-libs-cu13")),
    ),
}
PYTHON = "3.12"
#: pip matches these as they stand, not as upper bounds.
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in (17, 24, 28, 34, 35)))
#: Of their files what no program opens: sources, their libraries, and a profiler. Unpacked 11 MiB, packed 2.
UNUSED = (*(f"tvm_ffi/{name}" for name in ("include", "src", "3rdparty")), "nvidia_cutlass_dsl/dsl_packages/iket")
#: MiB of the tree and the folder together, and what a later call's gpu.json may add to them.
LIMIT, LATER = 64.0, 1.0
BUILD_SECONDS = 1800.0
#: The folder's name matters: quack takes code for a library's only under a folder of this name.
SITE = "site-packages"
#: What the library is made of, and all that runs on that machine.
SOURCES = ("kernels/cuda", "kernels/rows.h", "CMakeLists.txt", "setup.py", "benchmarks/gpu/build.py")
TREE = ("python", "kernels", "benchmarks", "tests")


class MissingPiece(Exception):
    """A sentence that says what is missing and what makes it."""


# ---------------------------------------------------------------------------------------------------------------------
# Here


def prepare(folder: Path, *, without: Sequence[str] = (), python: str = PYTHON, limit: float = LIMIT) -> Json:
    """Makes or completes the folder, and returns its manifest.

    Raises:
        MissingPiece: a piece cannot be had, or all of it is larger than the limit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = _manifest(folder) if (folder / MANIFEST).exists() else {}
    manifest: Json = {"commit": checked_out(), "tree": fingerprint(TREE), "library": None, "pieces": {}}
    if "library" not in without:
        manifest["library"] = _library(folder, old.get("library"))
    for name, wheels in WHEELS.items():
        if name not in without:
            manifest["pieces"][name] = _piece(folder, name, wheels, python, old.get("pieces", {}).get(name))
    _remove_others(folder, manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _check_size(folder, limit)
    return manifest


def _remove_others(folder: Path, manifest: Json) -> None:
    """What an earlier call made and this one leaves out would travel in vain."""
    wanted = {f"{name}.tar.xz" for name in manifest["pieces"]} | ({LIBRARY} if manifest["library"] else set())
    for name in {LIBRARY, *(f"{name}.tar.xz" for name in WHEELS)} - wanted:
        (folder / name).unlink(missing_ok=True)


def _library(folder: Path, old: Json | None) -> Json:
    sources = fingerprint(SOURCES)
    if old and old["sources"] == sources and (folder / LIBRARY).exists():
        return old
    print("the CUDA library: nvcc takes a minute or more", file=sys.stderr)
    release = re.search(r"nvidia-cutlass==[\d.]+", (ROOT / "setup.py").read_text())
    assert release is not None
    with tempfile.TemporaryDirectory() as scratch:
        headers = Path(scratch) / "cutlass_library" / "source" / "include"
        _install((release.group(),), Path(scratch), PYTHON)
        result = build.build(BUILD_SECONDS, headers)
    if result["failure"]:
        raise MissingPiece(f"the CUDA library: {result['failure']} (--without library leaves it out)")
    (folder / LIBRARY).write_bytes(lzma.compress((build.FOLDER / build.NAME).read_bytes(), preset=9))
    return {"sources": sources, "notes": result["notes"]}


def _piece(folder: Path, name: str, wheels: Sequence[str], python: str, old: Json | None) -> Json:
    """Wheels, unpacked and packed again as one archive, which is far smaller."""
    piece: Json = {"wheels": list(wheels), "python": python, "unused": list(UNUSED)}
    archive = folder / f"{name}.tar.xz"
    if piece != old or not archive.exists():
        print(f"{name}: {len(wheels)} wheels", file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            _install(wheels, Path(scratch), python)
            for unused in UNUSED:
                shutil.rmtree(Path(scratch) / unused, ignore_errors=True)
            pack(Path(scratch), archive)
    return piece


def _install(wheels: Sequence[str], folder: Path, python: str) -> None:
    """The wheels' files in a folder, as pip would lay them out for the other machine, without what they depend on."""
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
        platforms = [f"--platform={platform}" for platform in PLATFORMS]
        command = [sys.executable, "-m", "pip", "download", *options, *platforms, "--dest", scratch, *wheels]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason")
            raise MissingPiece(f"{' '.join(wheels)}: pip cannot download them: {reason}")
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as files:
                files.extractall(folder)


def pack(folder: Path, archive: Path) -> None:
    """The folder's files as .tar.xz, with the filter for x86 code: a fifth smaller where libraries are most of it."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    window = min(192 * MIB, max(MIB, size))
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window}]
    with lzma.open(archive, "wb", filters=filters) as compressed, tarfile.open(fileobj=compressed, mode="w") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                tar.add(path, path.relative_to(folder), filter=_without_owner)


def _without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def _check_size(folder: Path, limit: float) -> None:
    tree, bundle = _bytes(_tracked()) / MIB, _bytes(folder.iterdir()) / MIB
    for path in sorted(folder.iterdir()):
        print(f"  {path.stat().st_size / MIB:6.2f} MiB  {path.name}")
    total = tree + bundle
    print(f"{tree:.1f} MiB of tree and {bundle:.1f} of {folder.name} travel: {total:.1f} of {limit:g} MiB")
    if total > limit - LATER:
        later = f"{LATER:g} MiB for a later call's results"
        raise MissingPiece(f"{total:.1f} MiB and {later} are more than --limit, {limit:g}; --without takes a piece out")


def _tracked() -> Iterable[Path]:
    """What a copy of the checkout holds: tracked files, and others that are not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise MissingPiece(f"{ROOT} is no Git checkout, so what travels beside the bundle is unknown") from None
    return (ROOT / name for name in listed.split("\0") if name)


def _bytes(paths: Iterable[Path]) -> int:
    return sum(path.lstat().st_size for path in paths if os.path.lexists(path))


def fingerprint(places: Sequence[str]) -> str:
    """Fingerprint of the text of the files in these places. A link's files count where they are."""
    result = hashlib.sha256()
    for path in sorted(path for place in places for path in _files(ROOT / place)):
        result.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return result.hexdigest()[:16]


def _files(place: Path) -> list[Path]:
    endings = (".py", ".cu", ".cuh", ".cpp", ".h", ".cmake", "CMakeLists.txt")  # no .txt of an installer
    within = [place] if place.is_file() else place.rglob("*")
    files = [path for path in within if path.name.endswith(endings) and path.is_file() and RESULTS not in path.parents]
    if not files:
        raise FileNotFoundError(f"{place}: expected sources there, found none")
    return files


# ---------------------------------------------------------------------------------------------------------------------
# There


class Unpacked(NamedTuple):
    commit: str
    library: Path | None  # None: not carried, or of other sources than this tree's
    notes: list[str]


def unpack(folder: Path, into: Path | None = None) -> Unpacked:
    """Unpacks what the manifest names, once, and makes it importable and the library known, to child processes too.

    Raises:
        MissingPiece: no bundle is there, or a part of it is not.
    """
    manifest = _manifest(folder)
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16]
    place = into or Path(tempfile.gettempdir()) / f"logitless-gpu-{digest}"
    for name in manifest["pieces"]:
        _unpack_piece(_part_of(folder, f"{name}.tar.xz"), place / SITE, place / f"{name}.done")
    site.addsitedir(str(place / SITE))  # reads the .pth files that the DSL of quack needs
    importlib.invalidate_caches()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when TRL is imported
    library, notes = _unpack_library(folder, manifest["library"], place)
    return Unpacked(_commit(manifest), library, notes)


def _commit(manifest: Json) -> str:
    """What the tree here is called: the bundle's commit, or that with a fingerprint where it is not the same."""
    commit, tree = manifest["commit"] or "unknown", fingerprint(TREE)
    return commit if manifest["tree"] == tree and not commit.endswith("+") else f"{commit.rstrip('+')}+{tree[:8]}"


def _manifest(folder: Path) -> Json:
    if not (folder / MANIFEST).exists():
        raise MissingPiece(f"no bundle in {folder}: `python -m benchmarks bundle` makes one")
    return json.loads((folder / MANIFEST).read_text())


def _part_of(folder: Path, name: str) -> Path:
    if not (folder / name).exists():
        raise MissingPiece(f"{folder / name}: the manifest names it, and it is not there")
    return folder / name


def _unpack_piece(archive: Path, into: Path, done: Path) -> None:
    if not done.exists():
        into.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            tar.extractall(into, filter="data")
        done.touch()


def _unpack_library(folder: Path, about: Json | None, place: Path) -> tuple[Path | None, list[str]]:
    if about is None:
        return None, ["the bundle was made without the CUDA library"]
    if about["sources"] != fingerprint(SOURCES):
        return None, ["the bundle's CUDA library is of other sources than this tree's, and was not used"]
    place.mkdir(parents=True, exist_ok=True)
    library = place / build.NAME
    library.write_bytes(lzma.decompress(_part_of(folder, LIBRARY).read_bytes()))
    os.environ[build.VARIABLE] = str(library)
    return library, ["carried in the bundle", *about["notes"]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks bundle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER", help="default .gpu, which Git ignores")
    parser.add_argument("--without", nargs="+", default=[], choices=("library", *WHEELS), help="to leave out")
    parser.add_argument("--python", default=PYTHON, help=f"of the machine with the GPU (default {PYTHON})")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"MiB that may travel, the tree too ({LIMIT:g})")
    given = parser.parse_args(arguments)
    try:
        prepare(given.output, without=given.without, python=given.python, limit=given.limit)
    except MissingPiece as reason:
        sys.exit(f"bundle: {reason}")


if __name__ == "__main__":
    main()
