"""Writes the table of docs/chunks.md: what the size of a chunk costs on a GPU, by the page's arithmetic.

    python docs/generate_chunks.py

Nothing here was measured: two assumed speeds, and the bytes and products of a step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from logitless.backends.exact import chunks
from logitless.types import Options

PAGE = Path(__file__).with_name("chunks.md")
TABLE = re.compile(r"(?<=<!-- table: docs/generate_chunks.py -->\n).*(?=<!-- end of table -->)", re.DOTALL)

#: Assumed of an H200: products of bfloat16 and copies, per second.
FLOPS, BYTES = 770e12, 4.3e12
TOKENS = 8192
TILE = 128


class Model(NamedTuple):
    name: str
    hidden: int
    vocabulary: int


MODELS = (
    Model("SmolLM2 135M", 576, 49152),
    Model("Gemma 2 2B", 2304, 256000),
    Model("Llama 3 8B", 4096, 128256),
    Model("Qwen3 8B", 4096, 151936),
    Model("Phi-4", 5120, 100352),
    Model("Llama 3 70B", 8192, 128256),
)


def chunk_tokens(model: Model) -> int:
    """Tokens of a chunk of bfloat16 tensors on an accelerator with a trainable head, by the library's own rule."""
    hidden, weight = (torch.empty(n, model.hidden, dtype=torch.bfloat16, device="meta") for n in (1, model.vocabulary))
    most = chunks.chunk_tokens(hidden, weight, Options(), trainable=True)
    return chunks.equal_chunks(TOKENS, most, "meta")


def small_chunk_tokens(model: Model) -> int:
    """Tokens that fit 256 MiB, in steps of 16."""
    return chunks.DEFAULT_CHUNK_BYTES_ACCELERATOR // (4 * model.vocabulary) // 16 * 16


#: Bytes a logit of the row operations: read for the statistics (4), then read and written for the gradient (4 + 2).
#: If the product computes the statistics, the first read is gone.
READ_TWICE, READ_ONCE = 10, 6


def seconds(model: Model, chunk: int, row_bytes: int) -> float:
    """Time of one forward and backward of the loss: for each product the longer of its flops and its bytes."""
    logits, head = chunk * model.vocabulary, model.hidden * model.vocabulary
    flops = 2 * -(-chunk // TILE) * TILE * head / FLOPS
    rows = row_bytes * logits / BYTES
    products = max(flops, (2 * head + 4 * logits) / BYTES) + max(flops, (2 * head + 2 * logits) / BYTES)
    chunks = -(-TOKENS // chunk)
    sums = max(flops, (4 * head + 2 * logits) / BYTES)
    more_sums = max(flops, (8 * head + 2 * logits) / BYTES)
    return chunks * (products + rows) + sums + (chunks - 1) * more_sums + 6 * head / BYTES


def floor(model: Model) -> float:
    """Time of the three products alone."""
    return 3 * 2 * TOKENS * model.hidden * model.vocabulary / FLOPS


def rows() -> Iterator[str]:
    yield (
        "| model | H, V | tokens in 256 MiB | predicted time | tokens by the rule | chunk, MiB | float32 sum, MiB "
        "| predicted time | statistics by the product |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for model in MODELS:
        small, chunk = small_chunk_tokens(model), chunk_tokens(model)
        sizes_and_bytes = ((small, READ_TWICE), (chunk, READ_TWICE), (chunk, READ_ONCE))
        before, after, hopper = (seconds(model, *each) / floor(model) for each in sizes_and_bytes)
        sizes = (4 * chunk * model.vocabulary / 2**20, 4 * model.hidden * model.vocabulary / 2**20)
        yield (
            f"| {model.name} | {model.hidden}, {model.vocabulary} | {small} | {before:.2f} | {chunk} "
            f"| {sizes[0]:.0f} | {sizes[1]:.0f} | {after:.2f} | {hopper:.2f} |"
        )


def page() -> str:
    """The page with a fresh table."""
    return TABLE.sub("\n".join(rows()) + "\n", PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(page())
