"""CONTRIBUTING's example of a new loss, as it stands: one file more in a family's folder, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Adds a folder to a family's, as a file in it would be; then the checks that every loss of the registry has to pass.
SCRIPT = """
import sys
import pytest
import torch
from logitless.losses import sft

sft.__path__.append(sys.argv[1])
from logitless import losses
from logitless.types import TokenStats

loss = losses.get("poly1", epsilon=0.5)
assert type(loss) is losses.Poly1 and "poly1" in losses.names() and "Poly1" in dir(losses)
logprob = -torch.rand(7, dtype=torch.float64, requires_grad=True)
p = logprob.detach().exp()
gradient, = torch.autograd.grad(loss(TokenStats(logprob=logprob)).sum(), logprob)
torch.testing.assert_close(gradient, -(1 + 0.5 * p))
assert torch.autograd.gradcheck(lambda x: loss(TokenStats(logprob=x)), logprob)
with pytest.raises(ValueError, match="Poly1: epsilon"):
    losses.Poly1(epsilon=-2.0)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "poly1 or has_its_row", *sys.argv[2:]]))
"""


def example() -> str:
    """The code of the section on new losses."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("**A new loss**")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_example_is_a_loss_of_the_registry(tmp_path: Path) -> None:
    """Found by its name, right in value and gradient, and through `linear_loss` as from full logits."""
    (tmp_path / "poly1.py").write_text(example(), encoding="utf-8")
    suites = [str(ROOT / "tests" / name) for name in ("test_every_loss.py", "test_docs.py")]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), *suites], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= 12, run.stdout
