"""What is looked at before the first step, so that a run that cannot work ends by name, before time is spent.

    ids          every token that is read has a row of the embedding, every target one of the head
    positions    no row is longer than the positions that the model has a table of
    weights      they are finite, and AdamW can move those that are trained in their precision
    teachers     they have the tokens of the rows

The rows' part is kept as small as its question: the largest id and the greatest length, and where they stand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from logitless.integrations.scoring import plain_head
from logitless.training.columns import TARGET_IDS
from logitless.training.config import TrainOptions
from logitless.training.data import Row
from logitless.training.errors import InputError
from logitless.training.examples import Example, TokenizedData
from logitless.training.sharding import gathered_weights, shape_of

#: Tables of positions by the last part of their names; rotary and ALiBi models have none.
_TABLES = re.compile(r"wpe|(embed_)?positions?(_embed(dings?)?)?|pos_(emb|embed|embedding|encoding)")
#: A picture's or a sound's positions are not the text's.
_NOT_TEXT = re.compile(r"vis(ion|ual)|audio|image|speech|video")
#: Configuration entries that bound a row where the model has no table of positions to look at.
_BOUNDS = {"mpt": "max_seq_len"}


class Extreme(NamedTuple):
    """The largest value of its kind among the rows, and where it stands first; -1 where there is none."""

    value: int = -1
    origin: str = ""


class Reach(NamedTuple):
    """What the rows of a data set ask of a model at most."""

    read: Extreme = Extreme()  # an id that is read
    target: Extreme = Extreme()  # an id that is predicted
    listed: Extreme = Extreme()  # an id in a list of `target_ids`
    length: Extreme = Extreme()  # tokens of a row


def reach_of(data: TokenizedData, rows: Sequence[Row]) -> Reach:
    """The reach of tokenised rows; `rows` are those that were tokenised, dropped ones included."""
    found = Reach()
    for number, item in zip(data.kept, data.items, strict=True):
        for example in item:
            asked = _extremes(example)
            if any(now > most.value for now, most in zip(asked, found, strict=True)):
                origin = rows[number].origin
                found = Reach(*(max(most, Extreme(now, origin), key=lambda each: each.value)
                                for now, most in zip(asked, found, strict=True)))  # fmt: skip
    return found


def _extremes(example: Example) -> tuple[int, int, int, int]:
    listed = example.inputs.get(TARGET_IDS)
    most = -1 if listed is None or not listed.numel() else int(listed.max())
    return int(example.input_ids.max()), int(example.labels.max()), most, len(example.input_ids)


def embedding_rows(model: Any) -> int:
    """Rows of a model's input embedding."""
    return shape_of(model.get_input_embeddings().weight)[0]


def head_rows(model: Any) -> int:
    """Rows of a model's output head, those that it makes logits of."""
    with gathered_weights(list(model.get_output_embeddings().parameters())):
        return len(plain_head(model).weight)


def padding_token(tokenizer: Any, *models: Any) -> int:
    """The id to pad with, 0 unless the tokenizer has one that is a row of every model's embedding: nothing reads it."""
    own = tokenizer.pad_token_id
    return 0 if own is None or own >= min(map(embedding_rows, models)) else int(own)


def check_vocabulary(model: Any, tokenizer: Any, reach: Reach, name: str) -> None:
    """Raises InputError where a row has an id beyond the model's embedding, or predicts one beyond its head.

    Args:
        tokenizer: the one that made the ids.
        name: the model's, for the message.
    """
    for kind, part, rows in (
        ("read", "embedding", embedding_rows(model)),
        ("target", "output head", head_rows(model)),
        ("listed", "output head", head_rows(model)),
    ):
        number, origin = getattr(reach, kind)
        if number < rows:
            continue
        if kind == "listed":
            raise InputError(f"{origin}: {TARGET_IDS} lists the id {number}, but the {part} of {name} has {rows} rows; "
                             "expected ids that are tokens of the model")  # fmt: skip
        raise InputError(
            f"{origin}: the token {tokenizer.convert_ids_to_tokens(number)!r} has the id {number}, but the {part} of "
            f"{name} has {rows} rows. Use the tokenizer that belongs to the model, or resize the model "
            f"(resize_token_embeddings({len(tokenizer)})) and save it"
        )


def check_tokenizers(
    ours: Any, theirs: Any, data: Sequence[TokenizedData], name: str, *, whole: bool, role: str = "teacher"
) -> None:
    """Raises InputError where a teacher, or another model of a role, reads other tokens than the rows were made of.

    Every id of the rows must be the same token to both tokenizers. Added tokens that no row uses may differ.

    Args:
        ours: the tokenizer of the rows.
        theirs: the teacher's.
        data: the rows.
        name: the teacher's, for the message.
        whole: whether the teacher's distributions are compared, so that the ids that no row has mean something too.
        role: what the other model is, for the message; "teacher" by default.
    """
    known, taught = tokens_by_id(ours.get_vocab()), tokens_by_id(theirs.get_vocab())
    used = _used_ids([example for each in data for item in each.items for example in item])
    if whole:
        added = {*ours.get_added_vocab().values(), *theirs.get_added_vocab().values()}
        used |= (known.keys() & taught.keys()) - added
    for number in sorted(used):
        if known.get(number) != taught.get(number):
            there = f"{taught[number]!r} to" if number in taught else "no token of"
            raise InputError(
                f"{name}: the {role} has another tokenizer: the id {number} is {known.get(number)!r} to the data's "
                f"tokenizer and {there} the {role}'s; expected a {role} with the same tokens"
            )


def _used_ids(examples: Sequence[Example]) -> set[int]:
    used = torch.zeros(1 + max(int(example.input_ids.max()) for example in examples), dtype=torch.bool)
    for example in examples:
        used[example.input_ids.long()] = True
    return set(used.nonzero()[:, 0].tolist())


def tokens_by_id(vocabulary: dict[str, int]) -> dict[int, str]:
    """A tokenizer's tokens by their ids."""
    return {number: token for token, number in vocabulary.items()}


def learned_positions(model: Any) -> int | None:
    """How many positions the model has a table of; None where it can compute any (rotary embeddings, ALiBi)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    tables: list[int] = []
    for name, module in inner.named_modules():
        if isinstance(module, nn.Embedding) and _is_table(name):
            before = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            tables.append(module.num_embeddings - int(before))
    tables += [len(table) for name, table in inner.named_buffers() if table.dim() == 2 and _is_table(name)]
    bound = getattr(inner.config, _BOUNDS.get(inner.config.model_type, ""), None)
    return min([*tables, *([bound] if bound else [])], default=None)


def _is_table(name: str) -> bool:
    return bool(_TABLES.fullmatch(name.rpartition(".")[2])) and not _NOT_TEXT.search(name)


def check_positions(model: Any, reach: Reach, name: str) -> list[str]:
    """A note for the log where a row is longer than what the model was trained with.

    Raises:
        InputError: a row is longer than the model's table of positions, which has nothing for the rest.
    """
    length, origin = reach.length
    most = learned_positions(model)
    if most is not None and length > most:
        raise InputError(
            f"{origin}: the row has {length} tokens, but {name} has learned {most} positions; expected a max_length "
            f"of at most {most}"
        )
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    trained = getattr(config, "max_position_embeddings", None)
    if most is None and isinstance(trained, int) and length > trained:
        return [f"{origin}: {length} tokens, more than the {trained} positions that the model was made for "
                "(max_position_embeddings)"]  # fmt: skip
    return []


def check_finite(model: nn.Module, name: str) -> None:
    """Raises InputError where a model of this name has a weight that is NaN or infinite."""
    for weight, parameter in model.named_parameters():
        if parameter.numel() and not all(bound.isfinite() for bound in torch.aminmax(parameter.detach())):
            raise InputError(
                f"{name}: the weight {weight} has values that are not finite (NaN, infinite); the checkpoint is "
                "damaged, or was saved after its training had failed"
            )


def check_weights(model: nn.Module, options: TrainOptions, rate: float) -> list[str]:
    """Notes for the log where the weights' precision loses part of what is trained.

    Args:
        rate: the highest learning rate of the run. AdamW moves a weight by about as much at a step.

    Raises:
        InputError: weights, or an `adam_epsilon`, that AdamW cannot work with in their precision.
    """
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    for dtype in {parameter.dtype for parameter in trained}:
        if dtype == torch.float16:
            raise InputError(
                f"dtype: the trained weights are float16 (dtype={options.dtype}), in which AdamW's squared gradients "
                "and its adam_epsilon are 0; use --dtype float32 (with --bf16 where the device has it), --dtype "
                "bfloat16, or --use_peft, whose adapter is float32"
            )
        if not torch.tensor(options.adam_epsilon, dtype=dtype):
            raise InputError(f"adam_epsilon: {options.adam_epsilon} is 0 in {str(dtype)[6:]}, the precision of the "
                             "trained weights, and AdamW would divide by 0 where a gradient is 0")  # fmt: skip
    return [*_underflow(model), *_rounding(trained, rate)]


def _underflow(model: nn.Module) -> list[str]:
    """A note where gradients of an adapter pass through float16 activations."""
    if all(parameter.dtype != torch.float16 for parameter in model.parameters()):
        return []
    return [
        "dtype float16: gradients of activations below 6e-08 become 0, and the more tokens a step has the smaller they "
        "are; bfloat16 and float32 keep them"
    ]


def _rounding(trained: Sequence[torch.Tensor], rate: float) -> list[str]:
    """A note on the bfloat16 weights of which half a unit of the last place is above an update, if they are many."""
    halves = [parameter for parameter in trained if parameter.dtype == torch.bfloat16]
    total = sum(parameter.numel() for parameter in halves)
    above = rate / (torch.finfo(torch.bfloat16).eps / 4)
    lost = sum(int((parameter.abs() > above).sum()) for parameter in halves)
    if not rate or 2 * lost < total or not total:
        return []
    return [
        f"dtype bfloat16: {100 * lost / total:.0f}% of the trained weights are above {above:.2g}, where an update of "
        f"learning_rate={rate:g} is rounded away; --dtype float32 keeps it (with --bf16 the computation stays bfloat16)"
    ]
