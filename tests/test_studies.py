"""recipes/studies: the task, and every stage of every study once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.figures import studies

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "recipes" / "studies"


def python(*arguments: str, folder: Path = STUDIES, given: str | None = None) -> str:
    """The output of a Python process, in the studies' folder, where their modules find one another."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=variables, input=given)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_answers_and_the_teachers_mistake() -> None:
    code = "import task; print(task.right([3, 1, 4, 2]), task.mistaken([3, 1, 4, 3]), task.mistaken([3, 3]))"
    assert python("-c", code).split() == ["3430", "3434", "31"]


def test_a_rejected_answer_goes_wrong_at_one_place() -> None:
    code = "import json, task; print(json.dumps(task.preferences(0, 50)))"
    for row in json.loads(python("-c", code)):
        wrong = [a != b for a, b in zip(row["chosen"], row["rejected"], strict=True)]
        first = wrong.index(True)
        assert all(wrong[first:]) and not any(wrong[:first])


def test_every_study_has_its_figures_on_the_page() -> None:
    names = python("-c", "import plans; print(*(study.name for study in plans.STUDIES))").split()
    assert tuple(names) == studies.NAMES


@pytest.mark.slow
def test_every_stage_of_every_study_runs(tmp_path: Path) -> None:
    said = python(str(STUDIES), "--short", "--seeds", "1", "--output", str(tmp_path), folder=ROOT)
    names = {line.partition(",")[0] for line in said.splitlines() if ", seed 0:" in line}
    assert names == set(studies.NAMES)
