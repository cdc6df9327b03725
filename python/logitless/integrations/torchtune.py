"""torchtune's loss component without logits: `loss: {_component_: logitless.integrations.torchtune.LogitlessLoss}`.

A recipe hands a loss the logits of its model. From this loss on, a `TransformerDecoder` in training returns hidden
states from `unembed`, its last method, and the loss is computed inside the decoder's own head. The recipe's `tokens`
accounting stays as it is: a micro-batch's loss is the mean over its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

from .. import losses
from ..linear import linear_loss
from .heads import HeadModules, Product, product
from .hidden_loss import check_host_loss
from .hosts import Change, Switch, UnsupportedHostError

#: Releases of torchtune that the tests ran. Its development has ended.
TESTED = ">=0.6.1,<0.7"
_UNEMBEDDING = Switch("torchtune", TESTED)


class LogitlessLoss(nn.Module):
    """A loss of the registry that needs nothing but tokens, for the recipes of supervised fine-tuning.

    While it lives, decoders in training mode return hidden states; one loss at a time. `close()` gives them back their
    logits. The head may be a linear layer or tied to the embedding.

    Args:
        loss: its name.
        ignore_index: the label that does not count, which the recipes read too.
        **hyper_parameters: of the loss; its own defaults otherwise.

    Raises:
        UnsupportedHostError: another release than `TESTED`, a loss that needs more, or a second one. Later, at a call:
            logits in chunks (`set_num_output_chunks`), or a head that is not plain, such as one with LoRA.
    """

    def __init__(self, loss: str = "nll", ignore_index: int = -100, **hyper_parameters: Any) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.loss = check_host_loss(losses.get(loss, **hyper_parameters), "torchtune")
        self._decoder: list[Any] = []  # the one that ran last; in a list, because it is no part of this module
        _UNEMBEDDING.on(self._changes)

    def _changes(self) -> list[Change]:
        from torchtune.modules.transformer import TransformerDecoder

        return [Change(TransformerDecoder, "unembed", ("self", "h"), self._hidden_states)]

    def _hidden_states(self, own: Callable[..., Any]) -> Callable[..., Any]:
        seen = self._decoder

        @wraps(own)
        def unembed(self: Any, h: Tensor) -> Any:
            if not self.training:
                return own(self, h)
            if self.num_output_chunks > 0:
                raise UnsupportedHostError("set_num_output_chunks: not served; LogitlessLoss takes hidden states whole")
            seen[:] = [self]
            return self.norm(h)

        return unembed

    def close(self) -> None:
        """Gives the decoders back their own `unembed`."""
        _UNEMBEDDING.off()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of hidden states `[..., H]`, which the recipe takes for logits, and labels `[...]`."""
        if not self._decoder:
            raise UnsupportedHostError(
                "logits: no TransformerDecoder has run in training mode since this loss was made"
            )
        output = self._decoder[0].output
        tied = getattr(output, "tied_module", None)  # of torchtune's TiedLinear, which is no module itself
        if tied is not None:
            return self._score(Product(logits, tied.weight, None), labels)
        if type(output) is not nn.Linear:
            raise UnsupportedHostError(f"output: expected a plain torch.nn.Linear, got {type(output).__name__}")
        head = HeadModules(output, output)
        return head.call(logits, lambda hidden: {"loss": self._score(product(output, hidden), labels)})["loss"]

    def _score(self, head: Product, labels: Tensor) -> Tensor:
        options = {"bias": head.bias, "group": head.group, "ignore_index": self.ignore_index}
        loss: Tensor = linear_loss(self.loss, head.hidden, head.weight, labels, **options)
        return loss
