"""Reading an output head as its module computes it: plain, adapted (LoRA), saved by PEFT, sharded (DTensor).

The loss runs inside the head's own call: `forward` of the module that holds the weight is replaced for that call. The
hooks of sharded training sit on the call, so the weight is there, and whole, when the loss reads it. A loss that read
`head.weight` alone would silently miss an adapter on the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.sharded import whole
from ..parallel import VocabularyGroup
from .families import UnsupportedModelError

HEAD_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class HeadModules(NamedTuple):
    """The module that the model calls, and the module inside it that multiplies. Mostly they are the same."""

    outer: nn.Module
    inner: nn.Module

    def call(self, hidden: Tensor, function: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        """`function(hidden)`, computed inside the head's own call.

        If a compiler traces a head without hooks, `forward` is not exchanged, because the compiler would guard on the
        exchange and compile again. If the head has hooks, its own method stays set on the instance afterwards, because
        traced code cannot delete an attribute.
        """
        if torch.compiler.is_compiling() and not any(m._forward_hooks or m._forward_pre_hooks for m in self):
            return function(hidden)
        own = self.inner.forward
        on_instance = "forward" in self.inner.__dict__
        self.inner.forward = function
        try:
            results: dict[str, Tensor] = self.outer(hidden)
            return results
        finally:
            self.inner.forward = own
            if not on_instance and not torch.compiler.is_compiling():
                del self.inner.forward


class Product(NamedTuple):
    """Operands of the head: it computes `hidden @ weight.T + bias`, with any adapter on it included."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    group: VocabularyGroup | None = None  # the processes that share the rows, of which these are some

    def cut(self, vocabulary: int | None) -> Product:
        """The product with the rows alone that the model keeps, the first `vocabulary` ones; None: all."""
        group, own = self.group, vocabulary
        if group is not None and vocabulary is not None:
            ends = [min(vocabulary, end) for end in accumulate(group.rows)]
            group = replace(group, rows=tuple(end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)))
            own = group.rows[group.rank]
        return Product(self.hidden, *kept_rows(self.weight, self.bias, own), group)


def kept_rows(weight: Tensor, bias: Tensor | None, count: int | None) -> tuple[Tensor, Tensor | None]:
    """Views of a head's first rows; None: all."""
    if count is None or count >= len(weight):
        return weight, bias
    return weight[:count], None if bias is None else bias[:count]


def find_head(model: nn.Module) -> HeadModules:
    """The model's output head. It is looked up on every call, because an adapter may have been added since."""
    outer = model.get_output_embeddings()  # type: ignore[operator]
    if outer is None:
        raise UnsupportedModelError(f"{type(model).__name__}: it has no output head (get_output_embeddings() is None)")
    return HeadModules(outer, _inner(outer))


def own_product(head: HeadModules) -> tuple[Tensor, Tensor | None]:
    """The head's own weight and bias, without any adapter."""
    linear = head.inner.base_layer if _is_adapter(head.inner) else head.inner
    return linear.weight, linear.bias  # type: ignore[return-value,union-attr]


def dense_product(head: HeadModules) -> tuple[Tensor, Tensor | None]:
    """The head's weight and bias, with the adapter that is active on it added to a copy of them."""
    layer: Any = head.inner
    weight, bias = own_product(head)
    if not _is_adapter(layer) or layer.disable_adapters or layer.merged:
        return weight, bias
    check_adapter(layer)
    for name in layer.active_adapters:
        if name in layer.lora_A:
            weight = weight + layer.get_delta_weight(name).to(weight)
            extra = layer.lora_B[name].bias
            if extra is not None:
                bias = layer.scaling[name] * extra + (0 if bias is None else bias)
    return weight, bias


def check_output_head(model: nn.Module, head: HeadModules) -> None:
    """Raises unless the head is an unquantised linear layer on the base model's output; the message says why."""
    if not any(child is head.outer for child in model.children()):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its output layer belongs to a module that does more than multiply (a Bert-like "
            "head or a language model inside), not to the model itself"
        )
    linear: Any = head.inner.base_layer if _is_adapter(head.inner) else head.inner
    if _is_adapter(head.inner):
        check_adapter(head.inner)
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        cure = "use LoRA or modules_to_save there" if _is_peft(linear) else "dequantise it if it is quantised"
        raise UnsupportedModelError(
            f"{type(model).__name__}: its output head is a {type(linear).__name__}; only a plain torch.nn.Linear is "
            f"served: {cure}"
        )
    if linear.weight.dtype not in HEAD_DTYPES or not _is_plain(linear.weight):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its output head's weight is a {type(linear.weight).__name__} of "
            f"{linear.weight.dtype}; expected a tensor of {[str(d) for d in HEAD_DTYPES]} (dequantise a quantised head)"
        )


def product(inner: nn.Module, hidden: Tensor) -> Product:
    """The head's operands as they are now. A plain head costs nothing, an adapted one a copy of the weight.

    Of a plain head whose rows are sharded over a mesh named "tp" they are this process's rows.
    """
    if _is_adapter(inner):
        return _adapted(inner, hidden)
    return _operands_of_shard(inner, hidden) if _has_shard(inner.weight) else _operands_of_whole(inner, hidden)


def _has_shard(weight: Any) -> bool:
    """Whether the rows are shared out along the one dimension of a tensor-parallel mesh."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None or mesh.mesh_dim_names != ("tp",):
        return False
    return bool(weight.placements[0].is_shard(0))


def _operands_of_shard(inner: Any, hidden: Any) -> Product:
    """This process's rows, and the hidden states as all processes of the mesh have them."""
    mesh, rows = inner.weight.device_mesh, _rows_of_ranks(inner.weight)
    sharded = hasattr(hidden, "device_mesh")
    if sharded:  # over the tokens, say: gathered here, and the ranks' gradients scattered
        from torch.distributed.tensor import Partial, Replicate

        hidden = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    weight = inner.weight.to_local()
    bias = None if inner.bias is None else inner.bias.to_local()
    group = VocabularyGroup(mesh, rows, reduces_hidden=not sharded)
    return Product(_fit(hidden, weight), weight, bias, group)


def _rows_of_ranks(weight: Any) -> tuple[int, ...]:
    """How many rows each rank has: as many as the first but for the last ones, as `torch.chunk` has it."""
    total, ranks = weight.shape[0], weight.device_mesh.size()
    step = -(-total // ranks)
    return tuple(max(0, min(step, total - rank * step)) for rank in range(ranks))


def _operands_of_whole(inner: Any, hidden: Tensor) -> Product:
    """The whole head, gathered where it is sharded."""
    weight = whole("weight", inner.weight)
    if weight.is_meta and not hidden.is_meta:
        raise UnsupportedModelError(
            "the output head's weight is offloaded (meta device): keep the head on its device, or evaluate with "
            "skip_logits=False"
        )
    bias = None if inner.bias is None else whole("bias", inner.bias)
    return Product(_fit(hidden, weight), weight, bias)


def _fit(hidden: Tensor, weight: Tensor) -> Tensor:
    """Hidden states on the head's device, and in its dtype, as in Mamba's forward. Under autocast the ops cast."""
    if torch.is_autocast_enabled(hidden.device.type):
        return hidden.to(weight.device)
    return hidden.to(weight.device, weight.dtype)


def _adapted(layer: Any, hidden: Tensor) -> Product:
    """LoRA, `h W' + s (drop(h) A') B'`, as one product `[h, s drop(h) A'] @ [W, B]'` of H + r columns.

    It has any number of adapters, their dropout and their biases, as in PEFT.
    """
    check_adapter(layer)
    if _has_trained_rows(layer):
        return _with_trained_rows(layer, hidden)
    base = _operands_of_whole(layer.base_layer, hidden)
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    if layer.disable_adapters or layer.merged:
        return product(layer.base_layer, hidden)
    hiddens, weights, bias = [base.hidden], [base.weight], base.bias
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        down, up, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        low = down(layer.lora_dropout[name](hidden.to(down.weight.dtype))) * scale
        hiddens.append(low.to(base.hidden))
        weights.append(whole("weight", up.weight).to(base.weight))
        if up.bias is not None:
            extra = scale * whole("bias", up.bias).to(base.weight)
            bias = extra if bias is None else bias + extra
    return Product(torch.cat(hiddens, -1), torch.cat(weights, -1), bias)


def _with_trained_rows(layer: Any, hidden: Tensor) -> Product:
    """PEFT's `trainable_token_indices` of a tied head: the rows of some tokens are the adapter's. It adds no bias."""
    base = _operands_of_whole(layer.base_layer, hidden)
    active = [] if layer.disable_adapters else list(layer.active_adapters)
    if layer.merged and not active:
        layer.unmerge()
    if layer.merged or not active:
        return product(layer.base_layer, hidden)
    weight, rows = base.weight, [row for name in active for row in layer.token_indices[name]]
    if len(set(rows)) < len(rows):
        raise UnsupportedModelError("the output head's active adapters train the same token: PEFT does not define it")
    for name in active:
        index = torch.tensor(layer.token_indices[name], device=weight.device)
        weight = weight.index_copy(0, index, whole("weight", layer.trainable_tokens_delta[name]).to(weight))
    return Product(base.hidden, weight, None)


def _inner(module: Any) -> nn.Module:
    """The module inside PEFT's wrappers: for `modules_to_save` one of its copies, for trained tokens their layer."""
    if _is_peft(module) and hasattr(module, "token_adapter"):
        module = module.token_adapter
    if _is_peft(module) and hasattr(module, "modules_to_save"):
        active = [] if module.disable_adapters else list(module.active_adapters)
        copies = module.modules_to_save
        return _inner(copies[active[0]] if active and active[0] in copies else module.original_module)
    inner: nn.Module = module
    return inner


def _is_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def _is_adapter(module: nn.Module) -> bool:
    return _is_peft(module) and hasattr(module, "base_layer")


def _has_trained_rows(layer: nn.Module) -> bool:
    return type(layer).__name__ == "TrainableTokensLayer"


def check_adapter(layer: Any) -> None:
    """Raises unless the adapter has a form that `_adapted` computes: plain LoRA on a linear layer, or trained rows."""
    if _has_trained_rows(layer):
        return
    plain = type(layer).__name__ == "Linear" and hasattr(layer, "lora_A")
    variants = [name for name in layer.active_adapters if name in getattr(layer, "lora_variant", {})]
    if not plain or variants:
        kind = type(layer).__name__ if not plain else type(layer.lora_variant[variants[0]]).__name__
        raise UnsupportedModelError(
            f"the output head carries a PEFT adapter of kind {kind}; only plain LoRA on a linear layer, "
            "modules_to_save and trainable_token_indices are served there: leave the head out of target_modules, or "
            "train it whole"
        )


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "device_mesh")
