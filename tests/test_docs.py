"""Pages that scripts write: fresh, and docs/losses.md complete, every published name to be found in it."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from logitless import losses

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = load("generate_losses")
PAGE: str = GENERATE.page()


def test_the_committed_page_is_fresh() -> None:
    committed = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    assert committed == PAGE, "run python docs/generate_losses.py"


def test_the_table_of_chunks_is_fresh() -> None:
    chunks = load("generate_chunks")
    assert chunks.PAGE.read_text(encoding="utf-8") == chunks.page(), "run python docs/generate_chunks.py"


def test_the_tables_of_names_are_fresh() -> None:
    names = load("generate_names")
    assert names.PAGE.read_text(encoding="utf-8") == names.page(), "run python docs/generate_names.py"


@pytest.mark.parametrize("name", losses.names())
def test_every_docstring_says_what_the_page_needs(name: str) -> None:
    cls = type(losses.get(name))
    found = GENERATE.sections(cls.__doc__)
    assert {"", "Detached", "When to use", "Left open", "Source"} <= set(found)
    assert all(text.strip() for text in found.values())
    bases = [base for base in cls.__mro__ if base.__doc__ and base.__module__.startswith("logitless")]
    documented = "\n".join(GENERATE.sections(base.__doc__).get("Args", "") for base in bases)
    for field in dataclasses.fields(cls):
        assert re.search(rf"^    (\w+, )*{field.name}(, \w+)*: ", documented, re.MULTILINE), field.name


def test_every_loss_has_its_row_and_section() -> None:
    for name in losses.names():
        assert f"\n### {name}\n" in PAGE
        assert f"\n| [`{name}`](#{name}) | `{type(losses.get(name)).__name__}` |" in PAGE


PUBLISHED = """
    label smoothing, z-loss, CFT, SFT(Q), SA-DFT, DEFT, Cayley, "beyond log-likelihood", CHORD-mu, sft_is, LUFFY, ASFT,
    sft+kl, iw-SFT, PSFT, IDFT, MinorSFT, EAFT, SED-SFT, GEM, ProFiT, PoFT, DFT2, IFT, Focal, Unlikelihood, focal loss,
    total_variation, pearson_chi2, neyman_chi2, squared_hellinger, reverse_kl, forward_kl, js, alpha, online DPO, SPIN,
    SPPO, TPO, TPO-L, TR-DPO, Nash-MD, REBEL, A*-PO, XPO, MPO, pref_bco_weight, Bradley-Terry, process reward model,
    symmetric_kl, GKD, SDFT, on-policy distillation, MiniLLM, ULD, verl, NeMo-RL
"""


@pytest.mark.parametrize("name", [name.strip().strip('"') for name in PUBLISHED.split(",")])
def test_published_names_are_found(name: str) -> None:
    assert name.lower() in PAGE.lower()


def test_parts_of_a_docstring() -> None:
    """Formula first, labels, lists; a paragraph without a label belongs to the one before."""
    found = GENERATE.sections(
        """A loss: `x`.

        More: this colon is no label.

        Detached: all
        of it.

        Args:
            one, two: numbers
                of a kind.

        And others.

        Source: arXiv 1234.56789 and 9876.54321. Unverified source: recalled.
        """
    )
    assert list(found) == ["", "Detached", "Args", "Source"]
    assert found[""] == "A loss: `x`.\n\nMore: this colon is no label."
    assert found["Detached"] == "all\nof it."

    @dataclasses.dataclass
    class Some:
        one: int = 3
        two: str = "b"

    listed = GENERATE.parameters(Some, found["Args"])
    assert listed == "- `one = 3`, `two = 'b'`: numbers\n  of a kind.\n\nAnd others."
    links = GENERATE.source(found["Source"])
    assert links.count("https://arxiv.org/abs/") == 2 and links.endswith("unverified source")
    with pytest.raises(ValueError, match="Source: stands twice"):
        GENERATE.sections("One.\n\nSource: a.\n\nSource: b.")
