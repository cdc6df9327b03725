"""Every code block of the documents runs as it stands.

The Python blocks of a file run one after another in one namespace, as a reader would paste them into one session. They
run in a folder that holds a tiny random model, `model`, and small files, `rows.jsonl`, `prompts.jsonl`, `pairs.jsonl`,
`rewards.py` and `run.yaml`, where a reader has a real model and real data. Lines of shell blocks that call the command
line run through it in this process. A YAML block is the configuration of one training step.

The page about hosts is about packages that may not be installed. A block that imports one runs where it is. Its YAML
blocks are those of the hosts, of which every key and path of ours is looked up.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from training_fixtures import completion_rows, make_model, preference_rows, write_jsonl
from typer.testing import CliRunner

from logitless.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Sections whose blocks are files to write, not sessions; tests of their own hold them.
WALKS = re.compile(r"^(?:#+ |\*\*)A new (?:loss|backend)\b.*?(?=^## |^\*\*A new |\Z)", re.MULTILINE | re.DOTALL)
RUN_YAML = {"method": "sft", "model_name_or_path": "model", "dataset_name": "rows.jsonl", "output_dir": "run-yaml"}
#: The file that docs/on-policy.md has a reader write.
REWARDS_FILE = """
def is_right(completions, answer, **columns):
    return [float(text.strip().endswith(right)) for text, right in zip(completions, answer)]
"""
HOSTS_PAGE = ROOT / "docs" / "hosts.md"
#: What a block's imports need beside the packages that they name: what a host imports in turn.
HOSTS = {
    "axolotl": ("axolotl", "triton"),
    "lightning": ("lightning",),
    "llamafactory": ("llamafactory", "torchaudio"),
    "openrlhf": ("openrlhf", "flash_attn", "deepspeed"),
    "swift": ("swift",),
    "torchtitan": ("torchtitan",),
    "torchtune": ("torchtune", "torchao"),
    "verl": ("verl",),
}


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of code
    language: str
    code: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages."""
    text = page.read_text(encoding="utf-8")
    skipped = [match.span() for match in WALKS.finditer(text)]
    found = []
    for match in FENCE.finditer(text):
        if match[1] in languages and not any(start < match.start() < end for start, end in skipped):
            found.append(Block(page, text[: match.start(2)].count("\n") + 1, match[1], match[2]))
    return found


def hosts_of(block: Block) -> set[str]:
    """The hosts whose packages, or whose module in `logitless.integrations`, a block of Python imports."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.Import):
            named.update(part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            named.update((node.module or "").split("."), (alias.name for alias in node.names))
    return named & set(HOSTS)


def runs_here(block: Block) -> bool:
    """Whether all hosts that a block needs are installed."""
    return all(importlib.util.find_spec(package) for host in hosts_of(block) for package in HOSTS[host])


def pages_with(*languages: str) -> list[Any]:
    chosen = [page for page in PAGES if blocks(page, *languages)]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in chosen]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: a model and data."""
    folder = tmp_path_factory.mktemp("reader")
    make_model(folder / "model")
    write_jsonl(folder / "rows.jsonl", completion_rows())
    write_jsonl(folder / "prompts.jsonl", [{**row, "answer": row["completion"]} for row in completion_rows()])
    write_jsonl(folder / "pairs.jsonl", preference_rows())
    (folder / "rewards.py").write_text(REWARDS_FILE)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN_YAML))
    columns = {"prompt": "prompt", "response": "completion"}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl", "columns": columns}}))
    return folder


@pytest.fixture
def reader(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is a copy of the reader's, without outputs of another page."""
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def test_every_fence_has_a_language_that_is_run_or_says_that_it_is_not() -> None:
    """`text` is what a program printed, or what cannot run here; the sentence before the block says why."""
    for page in PAGES:
        for language in re.findall(r"^```(\w*)\n.*?^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            assert language in ("python", "bash", "yaml", "text", "diff"), (page.name, language)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in filter(runs_here, blocks(page, "python")):
        source = "\n" * (block.line - 1) + block.code  # so that a traceback names the page's own line
        exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", pages_with("bash"))
def test_calls_of_the_command_line_run(page: Path) -> None:
    lines = [line for block in blocks(page, "bash") for line in block.code.replace("\\\n", " ").splitlines()]
    calls = [words for line in lines if (words := shlex.split(line.removeprefix("python -m "), comments=True))]
    assert all(words[0] == "logitless" for words in calls), calls
    for words in calls:
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, (words, result.output)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", [page for page in pages_with("yaml") if page.values[0] != HOSTS_PAGE])
def test_yaml_blocks_train(page: Path) -> None:
    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block.code)
        of_components = ("method", "dataset_name") if "mixture" in content else ()
        same = {key: value for key, value in RUN_YAML.items() if key not in of_components}
        Path("block.yaml").write_text(yaml.safe_dump({**same, "max_steps": 1, **content}))
        result = CliRunner().invoke(app, ["train", "--config", "block.yaml"])
        assert result.exit_code == 0, (block.code, result.output)


def test_yaml_blocks_of_hosts_name_what_there_is() -> None:
    """The classes that they name are in their modules, and the keys of ours are fields of the plugin's arguments."""
    found = [yaml.safe_load(block.code) for block in blocks(HOSTS_PAGE, "yaml")]
    assert len(found) == 2
    paths = re.findall(r"logitless\.integrations\.(\w+)\.(\w+)", HOSTS_PAGE.read_text(encoding="utf-8"))
    folder = ROOT / "python" / "logitless" / "integrations"
    for module, name in paths:
        assert re.search(rf"^(?:class|def) {name}\b", (folder / f"{module}.py").read_text(), re.MULTILINE), (
            module,
            name,
        )
    keys = {key for content in found for key in content if key.startswith("logitless")}
    fields = set(re.findall(r"^    (logitless\w*): ", (folder / "axolotl.py").read_text(), re.MULTILINE))
    assert keys and keys <= fields


def test_most_hosts_have_a_block_of_python() -> None:
    assert {host for block in blocks(HOSTS_PAGE, "python") for host in hosts_of(block)} >= {
        *("lightning", "llamafactory", "swift", "torchtitan", "verl")
    }
