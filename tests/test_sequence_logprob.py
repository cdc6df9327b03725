"""`sequence_logprob`: sums and averages of rows and of flat sequences, and its errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitless.losses import sequence_logprob


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6), seed=st.integers(0, 2**16), average=st.booleans())
def test_padded_and_flat_agree(lengths: list[int], seed: int, average: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [-torch.rand(length, generator=generator, dtype=torch.float64) for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence([*rows, torch.zeros(1)], batch_first=True)[:-1].requires_grad_()
    mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    flat = torch.cat(rows).requires_grad_()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = torch.stack([row.mean() if average and len(row) else row.sum() for row in rows])
    one = sequence_logprob(padded, mask=mask, average=average)
    two = sequence_logprob(flat, sequence=sequence, num_sequences=len(lengths), average=average)
    torch.testing.assert_close(one, expected)
    torch.testing.assert_close(two, expected)
    upstream = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(one, padded, upstream)[0][mask], torch.autograd.grad(two, flat, upstream)[0]
    )


def test_sequence_logprob_details() -> None:
    order = torch.tensor([2, 0, 2, 0])
    values = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    assert sequence_logprob(values, sequence=order).tolist() == [-6, 0, -4]
    assert sequence_logprob(values, sequence=order, num_sequences=4, average=True).tolist() == [-3, 0, -2, 0]
    keep = torch.tensor([True, False, True, True])
    assert sequence_logprob(values, sequence=order, mask=keep, average=True).tolist() == [-4, 0, -2]
    assert sequence_logprob(values[:0], sequence=order[:0]).shape == (0,)
    assert sequence_logprob(values[:0], sequence=order[:0], num_sequences=2).tolist() == [0, 0]
    assert sequence_logprob(torch.zeros(2, 0), average=True).tolist() == [0, 0]
    assert sequence_logprob(values[None], average=True).tolist() == [-2.5]
    masked = torch.tensor([[-math.inf, -1.0]], requires_grad=True)
    total = sequence_logprob(masked, mask=torch.tensor([[False, True]]))
    total.sum().backward()
    assert total.item() == -1.0 and masked.grad is not None and masked.grad.tolist() == [[0, 1]]


def test_sequence_logprob_sums_in_float32() -> None:
    ones = torch.full((1, 1000), -1.0, dtype=torch.bfloat16)
    total = sequence_logprob(ones)
    assert total.dtype == torch.float32 and total.item() == -1000
    assert sequence_logprob(ones.flatten(), sequence=torch.zeros(1000, dtype=torch.int64)).item() == -1000
    assert sequence_logprob(ones.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"logprob": torch.zeros(3)}, ValueError, "needs `sequence`"),
        ({"logprob": torch.zeros(1, 3), "sequence": torch.zeros(3, dtype=torch.int64)}, ValueError, "when `sequence`"),
        ({"logprob": torch.zeros(3), "sequence": torch.zeros(3)}, ValueError, "sequence must be int64"),
        ({"logprob": torch.zeros(3), "sequence": torch.zeros(2, dtype=torch.int64)}, ValueError, "sequence must be"),
        ({"logprob": torch.zeros(1, 3), "mask": torch.ones(1, 3)}, ValueError, "mask must be bool"),
        ({"logprob": torch.zeros(1, 3), "num_sequences": 1}, ValueError, "num_sequences"),
        ({"logprob": torch.zeros(1, 3, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"logprob": torch.zeros(1), "sequence": torch.tensor([4]), "num_sequences": 2}, IndexError, "range"),
    ],
)
def test_sequence_logprob_errors(arguments: dict[str, Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sequence_logprob(**arguments)
