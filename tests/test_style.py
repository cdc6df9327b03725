"""House style that a machine can check: docstrings that can be read alone, and one module for each name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: First words of a docstring that lean on something before it, which a reader of a hover does not see.
LEANING = (
    *("also", "and", "as", "but", "it", "its", "likewise", "of", "or", "such", "that", "the same", "their", "these"),
    *("they", "those"),
)

#: Top-level names that stand in several modules, because they are one interface; and whose.
INTERFACES = {
    "DTYPE_CODES": "the libraries of compiled kernels (kernels/loading.py)",
    "Library": "the libraries of compiled kernels",
    "SIGNATURES": "the libraries of compiled kernels",
    "VARIABLE": "the libraries of compiled kernels",
    "load": "the libraries of compiled kernels",
    "location": "the libraries of compiled kernels",
    "__getattr__": "Python's: a module's attributes that are imported when they are asked for",
    "divergence": "the reference, which names a function as the op that it specifies",
    "linear_divergence": "the reference",
    "linear_logprobs": "the reference",
    "info": "the command line, which names a command as the function that it calls",
    "main": "the command line: what the entry point calls, and what that imports",
    "train": "the command line",
    "enable": "the hosts",
    "disable": "the hosts",
    "TESTED": "the hosts",
    "LogitlessLoss": "the hosts: the class that a configuration names",
}

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    """Python files; kernels/ by its own path alone, not by the package's link to it."""
    link = ROOT / "python" / "logitless" / "kernels"
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if link not in path.parents]


def leaning(docstring: str) -> bool:
    words = docstring.lower().split()
    return words[0] in LEANING or " ".join(words[:2]) in LEANING


def top_level_names(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


@pytest.mark.parametrize("folder", ["python/logitless", "kernels", "benchmarks", "tests"])
def test_docstrings_can_be_read_alone(folder: str) -> None:
    wrong = []
    for path in sources(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.get_docstring(node) if isinstance(node, Definition) else None
            if text and leaning(text):
                wrong.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    assert not wrong, "docstrings that begin as if they went on:\n" + "\n".join(wrong)


@pytest.mark.parametrize("folder", ["python/logitless", "kernels", "benchmarks", "recipes", "tests"])
def test_every_module_says_what_it_is(folder: str) -> None:
    silent = [path for path in sources(folder) if not ast.get_docstring(ast.parse(path.read_text()))]
    assert [str(path.relative_to(ROOT)) for path in silent if path.stat().st_size] == []


def test_every_kernel_s_file_says_what_it_is() -> None:
    paths = [path for path in (ROOT / "kernels").rglob("*") if path.suffix in (".c", ".cpp", ".cu", ".cuh", ".h")]
    silent = [path for path in paths if not path.read_text().startswith(("// ", "/* "))]
    assert len(paths) > 20 and [str(path.relative_to(ROOT)) for path in silent] == []


def test_a_name_stands_in_one_module() -> None:
    """The library's names; the benchmarks are beside it, and nothing of it knows theirs."""
    modules: dict[str, set[Path]] = defaultdict(set)
    for path in (
        path for path in sources("python/logitless", "kernels") if "bench" not in path.relative_to(ROOT).parts
    ):
        for name in top_level_names(path):
            modules[name].add(path)
    twice = {name: paths for name, paths in modules.items() if len(paths) > 1 and name != "__all__"}
    assert set(INTERFACES) <= set(twice), "no longer in two modules, so no exception"
    wrong = {
        name: sorted(str(path.relative_to(ROOT)) for path in paths)
        for name, paths in twice.items()
        if name not in INTERFACES
    }
    assert not wrong, f"one of these modules should import the name or choose another: {wrong}"
