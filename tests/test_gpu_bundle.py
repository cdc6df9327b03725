"""`benchmarks/gpu_bundle.py`: what it makes, without a download, and what a machine that has its folder gets of it."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import gpu_build, gpu_bundle, gpu_report
from benchmarks.gpu_bundle import LIBRARY, MANIFEST, SITE, WHEELS, MissingPiece
from benchmarks.gpu_kernels import FORWARD

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

    def build(seconds, headers):
        made.append("library")
        (tmp_path / "built").mkdir(exist_ok=True)
        (tmp_path / "built" / gpu_build.NAME).write_bytes(LIBRARY_BYTES)
        return {"library": gpu_build.NAME, "notes": ["-- logitless: a note"], "failure": None}

    monkeypatch.setattr(gpu_bundle, "_install", install)
    monkeypatch.setattr(gpu_build, "build", build)
    monkeypatch.setattr(gpu_build, "FOLDER", tmp_path / "built")
    monkeypatch.setenv(gpu_build.VARIABLE, "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return made


EVERYTHING = ["nvidia-cutlass", "library", "liger-kernel", "quack-kernels"]


def test_it_makes_every_piece_and_again_only_what_has_changed(without_network, tmp_path, monkeypatch, capsys):
    bundle = tmp_path / "bundle"
    gpu_bundle.prepare(bundle)
    assert without_network == EVERYTHING and "MiB of tree" in capsys.readouterr().out
    assert sorted(path.name for path in bundle.iterdir()) == [LIBRARY, MANIFEST, "peers.tar.xz", "quack.tar.xz"]
    gpu_bundle.prepare(bundle)
    assert without_network == EVERYTHING
    monkeypatch.setitem(WHEELS, "peers", ("liger-kernel==0.9.0",))
    gpu_bundle.prepare(bundle, without=["quack", "library"])
    assert without_network == [*EVERYTHING, "liger-kernel"]
    assert sorted(path.name for path in bundle.iterdir()) == [MANIFEST, "peers.tar.xz"]


def test_the_release_of_a_wheel_is_exact():
    assert all("==" in wheel for wheels in WHEELS.values() for wheel in wheels)


def test_it_says_what_is_missing_or_too_large(without_network, tmp_path, monkeypatch):
    with pytest.raises(MissingPiece, match=r"MiB are more than the 0.5 of --limit; --without takes one out"):
        gpu_bundle.prepare(tmp_path, limit=0.5)
    monkeypatch.setattr(gpu_build, "build", lambda *_: {"failure": "not built: no nvcc in PATH"})
    with pytest.raises(
        SystemExit, match=r"gpu_bundle: the CUDA library: not built: no nvcc in PATH \(--without library"
    ):
        gpu_bundle.main(["--output", str(tmp_path / "other")])


def test_it_says_which_wheels_pip_cannot_get(tmp_path, monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: first\nERROR: No matching distribution for x\n\n")

    monkeypatch.setattr(gpu_bundle.subprocess, "run", run)
    with pytest.raises(
        MissingPiece, match=r"^x==1 y==2: pip cannot download them: ERROR: No matching distribution for x$"
    ):
        gpu_bundle._install(("x==1", "y==2"), tmp_path, "3.12")


def test_an_archive_gives_back_the_files(tmp_path):
    code = bytes([0xE8, 1, 2, 0, 0]) * 1000  # what the filter for x86 code rewrites
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.so").write_bytes(code)
    gpu_bundle.pack(tmp_path / "a", tmp_path / "a.tar.xz")
    gpu_bundle._unpack_piece(tmp_path / "a.tar.xz", tmp_path / "c", tmp_path / "done")
    assert (tmp_path / "c" / "b" / "x.so").read_bytes() == code


def test_there_the_peers_can_be_imported_and_the_library_is_known(without_network, tmp_path):
    gpu_bundle.prepare(tmp_path / "bundle", python="3.13")
    there = gpu_bundle.unpack(tmp_path / "bundle", tmp_path / "there")
    import liger_kernel_of_pth
    import quack_kernels

    assert Path(quack_kernels.__file__).parent.parent == tmp_path / "there" / SITE and quack_kernels.python == "3.13"
    assert liger_kernel_of_pth.__file__.startswith(str(tmp_path / "there"))
    assert there.library.read_bytes() == LIBRARY_BYTES and os.environ[gpu_build.VARIABLE] == str(there.library)
    assert there.notes == ["carried in the bundle", "-- logitless: a note"]
    mark = tmp_path / "there" / SITE / "mark"
    mark.touch()
    (tmp_path / "bundle" / "quack.tar.xz").write_bytes(b"")  # unpacked already, and not looked at again
    assert gpu_bundle.unpack(tmp_path / "bundle", tmp_path / "there").library == there.library and mark.exists()


def test_a_library_of_other_sources_is_not_used_and_another_tree_is_marked(without_network, tmp_path):
    bundle = tmp_path / "bundle"
    gpu_bundle.prepare(bundle, without=tuple(WHEELS))
    manifest = json.loads((bundle / MANIFEST).read_text()) | {"commit": "abc"}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    assert gpu_bundle.unpack(bundle, tmp_path / "1").commit == "abc"
    manifest |= {"tree": "another", "commit": "abc", "library": {**manifest["library"], "sources": "others"}}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    there = gpu_bundle.unpack(bundle, tmp_path / "2")
    assert there.library is None and "of other sources than this tree's" in there.notes[0]
    assert there.commit == f"abc+{gpu_bundle.fingerprint(gpu_bundle.TREE)[:8]}"


def test_without_a_bundle_or_a_piece_of_it_the_report_says_so(without_network, tmp_path):
    with pytest.raises(SystemExit, match=r"gpu_report: no bundle in .*: `python -m benchmarks.gpu_bundle` makes one"):
        gpu_report.main(["--dry", "--bundle", str(tmp_path)])
    gpu_bundle.prepare(tmp_path)
    (tmp_path / LIBRARY).unlink()
    with pytest.raises(SystemExit, match=r"gpu_report: .*liblogitless_cuda.so.xz: the manifest names it"):
        gpu_report.main(["--dry", "--bundle", str(tmp_path)])


def test_the_report_takes_what_the_bundle_carries_and_goes_on_with_the_results_in_it(
    without_network, tmp_path, monkeypatch, capsys
):
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    gpu_bundle.prepare(bundle)
    del without_network[:]
    monkeypatch.setattr(gpu_bundle.tempfile, "gettempdir", lambda: str(tmp_path / "scratch"))
    command = ["--dry", "--bundle", str(bundle), "--output", str(out), "--only", FORWARD]
    gpu_report.main(command)
    results = json.loads((out / "gpu.json").read_text())
    assert results["build"]["library"] == gpu_build.NAME and without_network == []
    assert results["parts"][FORWARD]["environment"]["commit"] == gpu_bundle._commit(gpu_bundle._manifest(bundle))
    assert "its library cannot be loaded" in capsys.readouterr().out  # it is no library
    (out / "gpu.json").rename(bundle / "gpu.json")
    gpu_report.main([*command[:-1], "rows"])
    assert set(json.loads((out / "gpu.json").read_text())["parts"]) == {FORWARD, "rows"}


def test_a_library_is_packed_as_it_is(without_network, tmp_path):
    gpu_bundle.prepare(tmp_path, without=tuple(WHEELS))
    assert lzma.decompress((tmp_path / LIBRARY).read_bytes()) == LIBRARY_BYTES
