"""Settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Read when transformers, datasets and tokenizers are imported: no test fetches anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when torch is imported: threads that wait leave the core to the other process, of which pytest-xdist has several.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings

# An assertion in a module that tests share says as much as one in a test.
pytest.register_assert_rewrite("block_properties", "divergence_cases", "loss_cases", "pair_lists", "tail_cases")

# A loaded machine is slow, not wrong. CI tries the same examples every time; a person's runs look for new ones.
settings.register_profile(
    "logitless",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("logitless")


def pytest_make_parametrize_id(val: object) -> str | None:
    """A tensor is named by its shape: values would fill the screen, and two processes would draw other ones."""
    if isinstance(val, dict):
        return " ".join(f"{ascii(key)[1:-1]}={_brief(x)}" for key, x in val.items())
    return _brief(val) if isinstance(val, torch.Tensor) else None


def _brief(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)}"
    return type(value).__name__ if isinstance(value, tuple) else ascii(value)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test begins with one seed and PyTorch's default settings, whatever ran before it."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
