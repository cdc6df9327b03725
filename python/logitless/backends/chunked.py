"""PyTorch alone: GEMMs over chunks of tokens and PyTorch's row operations, on any device.

Numerics: logits, exponentials and sums are float32 (float64 for float64). A GPU multiplies half-precision operands
into float32 logits (`torch.mm(out_dtype=)`), and so does the CPU library of bfloat16 where the processor has units for
it. PyTorch has no such product on a CPU, and multiplies them in float32, converted by parts. The gradient's products
are bfloat16's where the operands are and the device is fast at it; float16, which holds no small gradient, has them in
float32 on a CPU and in tf32 on a GPU.

`chunk_dtype=torch.bfloat16` rounds a chunk's logits (2^-9 each), as materialised bfloat16 logits are; on a CPU with
bfloat16 units it makes their product several times as fast. Against float64 on 63 tokens of SmolLM2 (docs/log.md):
log-probs off by at most 0.13 nats, their mean by 0.007, gradients by 0.017 with bfloat16 logits; 1e-5, 3e-7 and 0.0017
with float32 ones, where the last is the rounding of the bfloat16 gradient itself.
"""

from __future__ import annotations

from .approximate.streamed import Streamed
from .backend import Backend
from .exact.native_rows import NativeRows
from .interface import Approximate


class Chunked(Backend):
    """The backend of PyTorch's operations; on a CPU it has the screened strategy too."""

    def __init__(self) -> None:
        super().__init__(NativeRows())
        self._tail_corrected = Streamed(self, screens=False)
        self._screened = Streamed(self, screens=True)

    def approximate(self, backward: str) -> Approximate:
        return self._screened if backward == "screened" else super().approximate(backward)


CHUNKED = Chunked()
