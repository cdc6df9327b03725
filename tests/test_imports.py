"""Imports of the package: their cost, the modules that they load, and the layers that they keep to."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import logitless
from logitless import commands

PACKAGE = Path(logitless.__file__).parent

#: From the bottom up. A module may import from its own layer and from those below; see `APART` for what is stricter.
LAYERS = (
    ("parallel", "peers"),
    ("types",),
    ("reference", "reduce"),
    ("losses", "backends"),
    ("ops", "info"),
    ("arguments",),
    ("linear",),
    ("class_weight", "depths", "module"),
    ("aliases",),
    ("functional",),
    ("nn",),
    ("testing",),
    ("commands",),
    ("plan",),
    ("integrations",),
    ("rewards",),
    ("training",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
#: Neighbours on one level that must not know one another.
APART = {
    ("ops", "info"),
    ("info", "ops"),
    ("losses", "backends"),
    ("backends", "losses"),
    ("reference", "reduce"),
    ("reduce", "reference"),
}


def fresh(code: str) -> str:
    """The output of `code` in a new process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "kernels" not in path.relative_to(PACKAGE).parts]


def unit(path: Path) -> str:
    """The part of the package that a file belongs to: `losses` for losses/loss.py, `types` for types.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_units(path: Path) -> set[str]:
    """The parts of the package that a file imports, wherever in it; itself left out."""
    relative = path.relative_to(PACKAGE.parent).with_suffix("").parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = relative[: len(relative) - node.level] if node.level else ()
            source = base + tuple(node.module.split(".") if node.module else ())
            names = [(*source, alias.name) for alias in node.names]
        else:
            continue
        found.update(name[1] for name in names if name[0] == "logitless" and len(name) > 1)
    return found - {unit(path)}


def test_every_part_has_a_layer() -> None:
    known = {name for layer in LAYERS for name in layer} | {"__init__"}
    assert {unit(path) for path in modules()} <= known, "give the new part its place in LAYERS"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    if unit(path) == "__init__":
        return
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for other in imported_units(path) & set(level):
        assert level[other] <= level[unit(path)], f"{unit(path)} may not import {other}, which stands above it"
        assert (unit(path), other) not in APART, f"{unit(path)} and {other} must not know one another"


def test_no_files_import_one_another() -> None:
    """Directly or through others; packages' `__init__` files, which hand names on, are left out."""
    files = {path.relative_to(PACKAGE.parent).with_suffix("").parts: path for path in modules()}
    files = {name: path for name, path in files.items() if name[-1] != "__init__"}
    graph: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for name, path in files.items():
        imported: set[tuple[str, ...]] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                module = tuple(filter(None, (node.module or "").split(".")))
                source = (*name[: len(name) - node.level], *module) if node.level else module
                imported |= {source, *((*source, alias.name) for alias in node.names)}
        graph[name] = (imported & set(files)) - {name}
    assert sum(map(len, graph.values())) > len(files)
    graphlib.TopologicalSorter(graph).prepare()


#: The rooms of `backends`, from the bottom up. The backends share one floor and do not know one another.
BELOW = (("interface",), ("native",), ("exact",), ("approximate",), ("backend",))
ROOMS = (*BELOW, tuple(logitless.backends.BACKENDS), ("__init__",))


def rooms_imported(path: Path) -> set[str]:
    """The rooms of `backends` that a file there imports when it runs; imports for the type checker are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    here = path.relative_to(PACKAGE).with_suffix("").parts
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level)
    modules = ((node, node.module or alias.name) for node in imports for alias in node.names)
    paths = ((*here[: len(here) - node.level], *module.split(".")) for node, module in modules)
    return {path[1] for path in paths if path[0] == "backends" and len(path) > 1}


@pytest.mark.parametrize("path", sorted((PACKAGE / "backends").rglob("*.py")), ids=lambda path: path.stem)
def test_rooms_of_the_backends_import_downwards(path: Path) -> None:
    floor = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    room = path.relative_to(PACKAGE / "backends").with_suffix("").parts[0]
    for other in rooms_imported(path) - {room}:
        assert floor[other] < floor[room], f"{room} may not import {other}"


def test_losses_are_found_in_an_archive(tmp_path: Path) -> None:
    """No list names the modules of the losses, and an archive has no folders to look into."""
    archive = tmp_path / "logitless.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for folder, _, names in os.walk(PACKAGE, followlinks=True):
            for path in (Path(folder, name) for name in names if name.endswith(".py")):
                file.write(path, path.relative_to(PACKAGE.parent))
    code = (
        f"import sys; sys.path.insert(0, {str(archive)!r})\n"
        "import logitless\n"
        "assert logitless.__file__.startswith(sys.path[0])\n"
        "print(*logitless.losses.names())"
    )
    assert fresh(code).split() == logitless.losses.names()


def test_a_loss_that_is_not_loaded_yet_compiles_by_its_name() -> None:
    fresh(
        "import torch, logitless\n"
        "hidden, weight, targets = torch.randn(2, 3, 4), torch.randn(7, 4), torch.randint(7, (2, 3))\n"
        "def loss(hidden): return logitless.linear_loss('gspo', hidden, weight, targets, advantages=torch.ones(2))\n"
        "found = torch.compile(loss, backend='eager', fullgraph=True)(hidden)\n"
        "torch.testing.assert_close(found, loss(hidden))"
    )


def test_import_brings_in_torch_alone() -> None:
    """No module of a third party beyond what `import torch` itself loads: no transformers, triton, numpy, typer."""
    added = json.loads(
        fresh(
            "import json, sys, torch\n"
            "before = set(sys.modules)\n"
            "import logitless\n"
            "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
            "print(json.dumps(sorted(tops - sys.stdlib_module_names)))"
        )
    )
    assert set(added) <= {"logitless", "torch"}


def test_import_works_without_the_extras() -> None:
    """The import works in a process in which importing any extra would fail."""
    fresh(
        f"import sys; sys.modules |= dict.fromkeys({EXTRAS})\n"
        "import logitless, torch\n"
        "hidden, weight = torch.randn(4, 8), torch.randn(11, 8)\n"
        "print(logitless.linear_logprobs(hidden, weight, torch.arange(4)).logprob)"
    )


EXTRAS = ("transformers", "triton", "numpy", "typer", "rich", "yaml", "peft", "datasets", "accelerate", "safetensors")


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process in which importing any extra fails."""
    code = f"import sys; sys.modules |= dict.fromkeys({EXTRAS}); from logitless.__main__ import main; main()"
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("command", [(), ("train", "--config", "a.yaml"), *((name,) for name in commands.NEEDING[1:])])
def test_command_line_names_the_package_that_it_lacks(command: tuple[str, ...]) -> None:
    done = bare(*command)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == (
        f"{' '.join(('logitless', *command[:1]))} needs typer: pip install 'logitless[train]'; info, losses and "
        "--version work without it\n"
    )


def test_commands_that_need_torch_alone_work_without_the_extras() -> None:
    shown = {name: bare(*name.split()) for name in ("info", "losses", "losses dft", "--version", "--help")}
    assert all(done.returncode == 0 and not done.stderr for done in shown.values())
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", shown["info"].stdout, re.M)
    assert [line.split()[0] for line in shown["losses"].stdout.splitlines()] == logitless.losses.names()
    assert "Dynamic fine-tuning: `-sg(p^power) logprob`" in shown["losses dft"].stdout
    assert shown["--version"].stdout == f"{commands.version()}\n"
    assert f"{commands.NEEDING[-1]} need typer" in " ".join(shown["--help"].stdout.split())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("losses", "dtf"), "error: no loss is named 'dtf' (did you mean 'dft'"),
        *((wrong, "info | losses") for wrong in (("info", "more"), ("inof",), ("--versoin",), ("--",))),
    ],
)
def test_a_wrong_command_without_the_extras_ends_with_what_there_is(
    given: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["logitless", *given])
    with pytest.raises(SystemExit) as ended:
        commands.main("typer")
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_commands_work_in_a_source_tree_that_is_not_installed() -> None:
    code = (
        "import importlib.metadata as m, sys; from logitless.__main__ import main\n"
        "def version(name): raise m.PackageNotFoundError(name)\n"
        "m.version = version; main()"
    )
    for command, expected in (
        ("--version", "logitless not installed"),
        ("info", "logitless "),
        ("losses", f"{logitless.losses.names()[0]} "),
    ):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, command], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith(expected), done.stderr


def test_import_adds_little_to_torchs() -> None:
    """Less than half, of processor time: a loaded machine takes more of it for both. The least of five."""
    clock = "time.process_time()"
    code = f"import time; a = {clock}; import torch; b = {clock}; import logitless; print(({clock} - b) / (b - a))"
    assert min(float(fresh(code)) for _ in range(5)) < 0.5
