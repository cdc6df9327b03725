"""Exact gradients on few tokens, and how far off each approximation rule is.

Both rules are: single entries, with their tail in blocks of 256 (the CPU's), and whole blocks of 128 or 64 entries (a
GPU's).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless.bench.problem import Inputs
from logitless.bench.targets import Json

from ..internals import TAIL_BLOCK, TAIL_SHARE

TOLERANCES = tuple(2.0**-k for k in range(7, 16))


class Exact:
    """Gradients of the mean NLL on few tokens, and how far off they are by either rule. Probabilities are `[V, N]`."""

    def __init__(self, sample: Inputs) -> None:
        self.sample = sample
        p = sample.weight @ sample.hidden.T
        self.p = p.sub_(p.logsumexp(0)).exp_()
        self.tokens = torch.arange(len(sample.targets))
        self.total = self._products(self.p)
        hits = torch.zeros_like(self.total[1]).index_add_(0, sample.targets, sample.hidden)
        self.exact = self.total[0] - sample.weight[sample.targets], self.total[1] - hits
        self.loss = float(-self.p[sample.targets, self.tokens].log().mean())

    def _products(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Products of `[V, N]` with the head, `[N, H]`, and with the hidden states, `[V, H]`."""
        return matrix.T @ self.sample.weight, matrix @ self.sample.hidden

    def _relative(self, d_hidden: Tensor, d_weight: Tensor) -> list[float]:
        """Relative size of errors of the two gradients."""
        return [float(x.norm() / y.norm()) for x, y in zip((d_hidden, d_weight), self.exact, strict=True)]

    def of_bfloat16(self) -> list[float]:
        """Errors of an exact backward whose operands and results are bfloat16."""
        matrix = self.p.clone()
        matrix[self.sample.targets, self.tokens] -= 1
        matrix, hidden, weight = (x.bfloat16().float() for x in (matrix, self.sample.hidden, self.sample.weight))
        result = (x.bfloat16().float() for x in (matrix.T @ weight, matrix @ hidden))
        return self._relative(*(x - y for x, y in zip(result, self.exact, strict=True)))

    def split(self, tolerance: float) -> tuple[Tensor, Tensor]:
        """Mask of the single entries that are kept, and the probabilities of the others."""
        keep = self.p >= tolerance / TAIL_SHARE
        keep[self.sample.targets, self.tokens] = True
        return keep, torch.where(keep, 0, self.p)

    def dropped(self, rest: Tensor) -> list[float]:
        """Errors where nothing is put in the others' place."""
        return self._relative(*self._products(rest))

    def entries(self, orders: dict[str, Tensor], tolerance: float, block: int) -> dict[str, Json]:
        """Single entries are kept, the same ones in every order; the blocks of what is left differ."""
        keep, rest = self.split(tolerance)
        dropped = self._products(rest)
        result = {}
        for name, order in orders.items():
            starts = torch.arange(0, len(order), block)
            sums = F.embedding_bag(order, rest, starts, mode="sum")
            means = F.embedding_bag(order, self.sample.weight, starts, mode="mean")
            size = starts.diff(append=torch.tensor([len(order)]))
            share = (sums @ self.sample.hidden / size[:, None]).repeat_interleave(size, 0)
            errors = dropped[0] - sums.T @ means, dropped[1].index_select(0, order).sub_(share)
            result[name] = {"kept": float(keep.float().mean()), "errors": self._relative(*errors)}
        return result

    def blocks(self, order: Tensor, tolerances: tuple[float, ...], block: int) -> list[Json]:
        """Whole blocks of an order are kept by their mass, and the target's."""
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        weight, p = (_in_blocks(x.index_select(0, order), block) for x in (self.sample.weight, self.p))
        mass, means, result = p.sum(1), weight.mean(1), []
        for tolerance in tolerances:
            keep = mass >= tolerance
            keep[places[self.sample.targets] // block, self.tokens] = True
            left = torch.where(keep, 0, mass)
            d_hidden = self.total[0] - left.T @ means
            d_weight = _in_blocks(self.total[1].index_select(0, order), block)
            d_weight.sub_((left @ self.sample.hidden / block)[:, None])
            for b in range(len(keep)):
                tokens = keep[b].nonzero()[:, 0]
                near = p[b].index_select(1, tokens)
                d_hidden.index_add_(0, tokens, near.T @ weight[b], alpha=-1)
                d_weight[b].addmm_(near, self.sample.hidden[tokens], alpha=-1)
            errors = self._relative(d_hidden, d_weight.flatten(0, 1)[: len(order)])
            result.append({"tolerance": tolerance, "kept": float(keep.float().mean()), "errors": errors})
        return result


def _in_blocks(rows: Tensor, block: int) -> Tensor:
    """`[V, K]` to `[blocks, block, K]`."""
    return F.pad(rows, (0, 0, 0, -len(rows) % block)).view(-1, block, rows.shape[1])


def curves(sample: Inputs) -> Json:
    """Both rules in the native order, corrected and not, at every tolerance."""
    exact, native = Exact(sample), torch.arange(len(sample.weight))
    points = []
    for tolerance, blocks in zip(TOLERANCES, exact.blocks(native, TOLERANCES, 64), strict=True):
        entries = exact.entries({"native": native}, tolerance, TAIL_BLOCK)["native"]
        _, rest = exact.split(tolerance)
        points.append(
            {
                "tolerance": tolerance,
                "kept": entries["kept"],
                "tail_mass": float(rest.sum(0).mean()),
                "corrected": entries["errors"],
                "dropped": exact.dropped(rest),
                "blocks_kept": blocks["kept"],
                "blocks_corrected": blocks["errors"],
            }
        )
    return {"loss": exact.loss, "tokens": len(sample.targets), "bfloat16": exact.of_bfloat16(), "points": points}
