"""`benchmarks/gpu/bundle.py`: what it makes, without a download, and what a machine that has its folder gets of it."""

from __future__ import annotations

import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from benchmarks.gpu import build, bundle
from benchmarks.gpu.bundle import LIBRARY, MANIFEST, SITE, WHEELS, MissingPiece
from benchmarks.gpu.kernels import FORWARD
from benchmarks.suites import gpu

LIBRARY_BYTES = b"not a library, but as good as one here"


@pytest.fixture
def without_network(monkeypatch, tmp_path):
    """Wheels and a library of a few bytes; the list is of what was made."""
    made = []

    def install(wheels, folder, python):
        made.append(wheels[0].split("=")[0])
        package = folder / made[-1].replace("-", "_")
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"python = {python!r}\n")
        (folder / "elsewhere").mkdir()
        (folder / "elsewhere" / f"{package.name}_of_pth.py").write_text("")
        (folder / f"{package.name}.pth").write_text("elsewhere\n")

    def built(seconds, headers):
        made.append("library")
        (tmp_path / "built").mkdir(exist_ok=True)
        (tmp_path / "built" / build.NAME).write_bytes(LIBRARY_BYTES)
        return {"library": build.NAME, "notes": ["-- logitless: a note"], "failure": None}

    monkeypatch.setattr(bundle, "_install", install)
    monkeypatch.setattr(build, "build", built)
    monkeypatch.setattr(build, "FOLDER", tmp_path / "built")
    monkeypatch.setenv(build.VARIABLE, "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return made


EVERYTHING = ["nvidia-cutlass", "library", "liger-kernel", "quack-kernels"]


def test_it_makes_every_piece_and_again_only_what_has_changed(without_network, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "bundle"
    bundle.prepare(folder)
    assert without_network == EVERYTHING and "MiB of tree" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [LIBRARY, MANIFEST, "peers.tar.xz", "quack.tar.xz"]
    bundle.prepare(folder)
    assert without_network == EVERYTHING
    monkeypatch.setitem(WHEELS, "peers", ("liger-kernel==0.9.0",))
    bundle.prepare(folder, without=["quack", "library"])
    assert without_network == [*EVERYTHING, "liger-kernel"]
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "peers.tar.xz"]


def test_the_release_of_a_wheel_is_exact():
    assert all("==" in wheel for wheels in WHEELS.values() for wheel in wheels)


def test_it_says_what_is_missing_or_too_large(without_network, tmp_path, monkeypatch):
    with pytest.raises(MissingPiece, match=r"^[\d.]+ MiB and 1 MiB for a later call's .* more than --limit, 5; "):
        bundle.prepare(tmp_path, limit=5)
    monkeypatch.setattr(build, "build", lambda *_: {"failure": "not built: no nvcc in PATH"})
    with pytest.raises(SystemExit, match=r"bundle: the CUDA library: not built: no nvcc in PATH \(--without library"):
        bundle.main(["--output", str(tmp_path / "other")])


def test_it_says_which_wheels_pip_cannot_get(tmp_path, monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: first\nERROR: No matching distribution for x\n\n")

    monkeypatch.setattr(bundle.subprocess, "run", run)
    with pytest.raises(
        MissingPiece, match=r"^x==1 y==2: pip cannot download them: ERROR: No matching distribution for x$"
    ):
        bundle._install(("x==1", "y==2"), tmp_path, "3.12")


def test_an_archive_gives_back_the_files(tmp_path):
    code = bytes([0xE8, 1, 2, 0, 0]) * 1000  # what the filter for x86 code rewrites
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.so").write_bytes(code)
    bundle.pack(tmp_path / "a", tmp_path / "a.tar.xz")
    bundle._unpack_piece(tmp_path / "a.tar.xz", tmp_path / "c", tmp_path / "done")
    assert (tmp_path / "c" / "b" / "x.so").read_bytes() == code


def test_there_the_peers_can_be_imported_and_the_library_is_known(without_network, tmp_path):
    bundle.prepare(tmp_path / "bundle", python="3.13")
    there = bundle.unpack(tmp_path / "bundle", tmp_path / "there")
    import liger_kernel_of_pth
    import quack_kernels

    assert Path(quack_kernels.__file__).parent.parent == tmp_path / "there" / SITE and quack_kernels.python == "3.13"
    assert liger_kernel_of_pth.__file__.startswith(str(tmp_path / "there"))
    assert there.library.read_bytes() == LIBRARY_BYTES and os.environ[build.VARIABLE] == str(there.library)
    assert there.notes == ["carried in the bundle", "-- logitless: a note"]
    mark = tmp_path / "there" / SITE / "mark"
    mark.touch()
    (tmp_path / "bundle" / "quack.tar.xz").write_bytes(b"")  # unpacked already, and not looked at again
    assert bundle.unpack(tmp_path / "bundle", tmp_path / "there").library == there.library and mark.exists()


def test_a_library_of_other_sources_is_not_used_and_another_tree_is_marked(without_network, tmp_path):
    folder = tmp_path / "bundle"
    bundle.prepare(folder, without=tuple(WHEELS))
    manifest = json.loads((folder / MANIFEST).read_text()) | {"commit": "abc"}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert bundle.unpack(folder, tmp_path / "1").commit == "abc"
    manifest |= {"tree": "another", "commit": "abc", "library": {**manifest["library"], "sources": "others"}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    there = bundle.unpack(folder, tmp_path / "2")
    assert there.library is None and "of other sources than this tree's" in there.notes[0]
    assert there.commit == f"abc+{bundle.fingerprint(bundle.TREE)[:8]}"


def test_what_no_program_opens_does_not_travel(without_network, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "UNUSED", ("elsewhere",))
    bundle.prepare(tmp_path)
    with tarfile.open(tmp_path / "peers.tar.xz") as tar:
        assert sorted(tar.getnames()) == ["liger_kernel.pth", "liger_kernel/__init__.py"]
    made = list(without_network)
    monkeypatch.setattr(bundle, "UNUSED", ())
    bundle.prepare(tmp_path)
    assert without_network == [*made, "liger-kernel", "quack-kernels"]  # and an archive of other rules is made again


def test_what_an_installer_leaves_beside_the_sources_does_not_make_another_tree(monkeypatch, tmp_path):
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    (tmp_path / "one.py").write_text("1")
    before = bundle.fingerprint(["."])
    (tmp_path / "logitless.egg-info").mkdir()
    (tmp_path / "logitless.egg-info" / "SOURCES.txt").write_text("one.py")
    assert bundle.fingerprint(["."]) == before


def test_a_checkout_may_lie_in_a_folder_named_results(monkeypatch, tmp_path):
    root = tmp_path / "results"
    root.mkdir()
    monkeypatch.setattr(bundle, "ROOT", root)
    (root / "one.py").write_text("1")
    before = bundle.fingerprint(["."])
    (root / "one.py").write_text("2")
    assert bundle.fingerprint(["."]) != before


def test_without_a_bundle_or_a_piece_of_it_the_report_says_so(without_network, tmp_path):
    with pytest.raises(SystemExit, match=r"gpu: no bundle in .*: `python -m benchmarks bundle` makes one"):
        gpu.main(["--dry", "--bundle", str(tmp_path)])
    bundle.prepare(tmp_path)
    (tmp_path / LIBRARY).unlink()
    with pytest.raises(SystemExit, match=r"gpu: .*liblogitless_cuda.so.xz: the manifest names it"):
        gpu.main(["--dry", "--bundle", str(tmp_path)])


def test_the_report_takes_what_the_bundle_carries_and_goes_on_with_the_results_in_it(
    without_network, tmp_path, monkeypatch, capsys
):
    folder, out = tmp_path / "bundle", tmp_path / "out"
    bundle.prepare(folder)
    del without_network[:]
    monkeypatch.setattr(bundle.tempfile, "gettempdir", lambda: str(tmp_path / "scratch"))
    command = ["--dry", "--bundle", str(folder), "--output", str(out), "--only", FORWARD]
    gpu.main(command)
    results = json.loads((out / "gpu.json").read_text())
    assert results["build"]["library"] == build.NAME and without_network == []
    assert results["parts"][FORWARD]["environment"]["commit"] == bundle._commit(bundle._manifest(folder))
    assert "its library cannot be loaded" in capsys.readouterr().out  # it is no library
    (out / "gpu.json").rename(folder / "gpu.json")
    gpu.main([*command[:-1], "rows"])
    assert set(json.loads((out / "gpu.json").read_text())["parts"]) == {FORWARD, "rows"}


def test_a_library_is_packed_as_it_is(without_network, tmp_path):
    bundle.prepare(tmp_path, without=tuple(WHEELS))
    assert lzma.decompress((tmp_path / LIBRARY).read_bytes()) == LIBRARY_BYTES


def test_the_librarys_sources_are_all_of_its_sources() -> None:
    """A header outside of them could change, and a library of older text would be taken for this tree's."""
    sources = [path for place in bundle.SOURCES for path in bundle._files(bundle.ROOT / place)]
    own = [path for path in sources if path.suffix in (".cu", ".cuh", ".h", ".cpp")]
    includes = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
    named = {Path(name).name for path in own for name in includes.findall(path.read_text(encoding="utf-8"))}
    outside = named - {path.name for path in sources}
    assert "rows.h" in named
    assert not [name for name in outside if list((bundle.ROOT / "kernels").rglob(name))]
