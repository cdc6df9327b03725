"""Real hidden states, head and targets for the tail-corrected backward's measurements: SmolLM2 on text at hand.

In domain is what the fine-tuning trains on: docstrings of Python's standard library (every eighth is held out for
measuring). Out of domain is generated table rows of Unicode names, and the language reference's prose.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recipes import smollm2
from torch import Tensor

from logitless.bench import text as texts
from logitless.bench.problem import Inputs, Problem

from ..internals import convert_gguf

LENGTH = 512  # tokens of a sequence


def docstrings(*, held_out: bool) -> str:
    """Docstrings of the standard library's modules, classes and functions, in one shuffled order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "idlelib"}
    result = []
    for path in sorted(library.rglob("*.py")):
        if left_out & set(path.relative_to(library).parts):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        result += [text for text in map(ast.get_docstring, nodes) if text]
    random.Random(0).shuffle(result)
    return "\n\n".join(text for i, text in enumerate(result) if (i % 8 == 0) == held_out)


def tables() -> str:
    """Rows of Unicode names."""
    draw = random.Random(1)
    codes = draw.sample(range(33, 40000), 3000)
    rows = (f"{c:5d} | {unicodedata.name(chr(c), '-')} | {unicodedata.category(chr(c))}" for c in codes)
    return "\n".join(f"{row} | {draw.random():.4f}" for row in rows)


TEXTS: dict[str, Callable[[], str]] = {
    "docstrings": lambda: docstrings(held_out=True),
    "reference": texts.reference,
    "tables": tables,
}


def model_folder(work: Path) -> Path:
    """SmolLM2 as Transformers loads it, made in `work` where it is not there yet."""
    return convert_gguf(smollm2.fetch(work / "model"), work / "model")


def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def sequences(tokenizer: Any, text: str, length: int) -> Tensor:
    """`[sequences, length + 1]` ids of a text."""
    return texts.sequences(texts.tokenised(tokenizer, text), length)


def sample(folder: Path, name: str, tokens: int, cache: Path) -> Inputs:
    """The first `tokens` tokens of a text; cached, as a model's forward takes longer than what is measured."""
    text = TEXTS[name]()
    key = hashlib.sha256(f"{folder} {name} {tokens} {text}".encode()).hexdigest()[:16]
    path = cache / f"{name}-{key}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        model, tokenizer = load(folder)
        ids = sequences(tokenizer, text[: 40 * max(tokens, LENGTH)], LENGTH)[: -(-tokens // LENGTH)]
        with torch.no_grad():
            hidden = torch.cat([model.model(row[None, :-1])[0][0] for row in ids])
        weight = model.get_output_embeddings().weight.detach()
        torch.save((hidden[:tokens].clone(), weight.clone(), ids[:, 1:].reshape(-1)[:tokens]), path)
    return as_inputs(*torch.load(path))


def as_inputs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Inputs:
    """A text's hidden states, the head and the targets, as a problem that a processor can be measured on."""
    problem = Problem(len(hidden), weight.shape[1], len(weight))
    return Inputs(hidden, weight, targets, torch.zeros(len(hidden)), problem)


def drawn(inputs: Inputs, tokens: int, among: int) -> Inputs:
    """Some of the first `among` tokens, drawn with a fixed seed."""
    chosen = torch.randperm(among, generator=torch.Generator().manual_seed(0))[:tokens]
    return as_inputs(inputs.hidden[chosen], inputs.weight, inputs.targets[chosen])
