"""Which parameters an update may move: all of them, a share of the matrices, or a share of every matrix's entries.

    Everything     what the model leaves trainable
    Halves         HFT: in each round a share of the matrices of every kind, the others frozen
    SparseEntries  SIFT: the entries of every matrix whose gradient was largest at the first step

A step asks `begin` before its gradients, `collect` when it has all of them, and `write` after the optimizer, which
moves what `held` names. What may not be moved costs no gradient (HFT), or none that outlives its matrix's turn in the
backward pass (SIFT), and neither has moments.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.parallel import World
from logitless.training.sharding import parameters_of, shape_of

#: A parameter of a numbered layer: the list of layers, the number, and the path inside the layer.
_IN_LAYER = re.compile(r"(?P<list>.*?)\.(?P<number>\d+)\.(?P<path>.+)")
_NORMS = "norms"  # the kind of a layer's vectors


class Everything:
    """Every parameter that the model leaves trainable, which the strategy's own exchange averages over processes."""

    def __init__(self, model: Any, world: World) -> None:
        self.model, self.world = model, world

    def held(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by the name of the model's parameter."""
        return {name: x for name, x in parameters_of(self.model).items() if x.requires_grad}

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What the optimizer moves, with weight decay (of matrices) and without."""
        held = list(self.held().values())
        return [x for x in held if len(shape_of(x)) >= 2], [x for x in held if len(shape_of(x)) < 2]

    def begin(self, step: int) -> bool:
        """Prepares step `step` (from 0); returns whether it begins to move others, with an optimizer of their own."""
        return False

    def collect(self) -> None:
        """Brings the gradients of a step, averaged over processes, to what the optimizer moves."""

    def write(self) -> None:
        """Brings what the optimizer has moved into the model."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold to go on with the same choice, by parameter; nothing where it follows anew."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave. Raises InputError where it fits no choice of this run."""
        if state:
            raise InputError("finetuning_type: the checkpoint holds chosen entries, as those of sift do")


class Halves(Everything):
    """Half fine-tuning: in each round a share of the matrices of every kind is trained, the rest frozen.

    Kinds are the attention, the feed-forward block and the norms of the layers: of Llama's matrices two of the four in
    attention, and one or two of the three in the feed-forward block, each in half of the layers. A bias goes with its
    matrix. Embedding, head and what else stands outside the layers are always trained. The draw is a function of seed
    and round. Matrices are counted, not their entries.

    Args:
        model: whose parameters are frozen and released.
        options: of the run, with the share, the seed and the steps of a round; by default the run is one round.
        done: steps that the run has taken, in whose last round it begins.

    Source: arXiv 2404.18466, whose text was not read: two accounts of it agree on the kinds, and on rounds that are
    fine-tunings one after the other. The new moments of a round follow from that.
    """

    def __init__(self, model: Any, world: World, options: TrainOptions, done: int) -> None:
        super().__init__(model, world)
        self.layers = _layers_of(model, options.model_name_or_path)
        self.ratio, self.seed, self.steps = options.updated_share(), options.seed, options.hft_round_steps
        self.round = self._round(max(done - 1, 0))
        self._freeze()

    def begin(self, step: int) -> bool:
        if self._round(step) == self.round:
            return False
        self.round = self._round(step)
        self._freeze()
        return True

    def collect(self) -> None:
        if self.world.size > 1 and not self.world.strategy.shards:
            for parameter in self.held().values():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                _average_over(parameter.grad, self.world)

    def _round(self, step: int) -> int:
        return step // self.steps if self.steps else 0

    def _freeze(self) -> None:
        """Releases what this round trains, and freezes the rest with its gradients."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.round)
        parameters = dict(self.model.named_parameters())
        for layers in self.layers.values():
            draws = _drawn([len(units) for units in layers], self.ratio, generator)
            for units, trained in zip(layers, draws, strict=True):
                for number, names in enumerate(units):
                    for name in names:
                        parameters[name].requires_grad_(number in trained)
                        parameters[name].grad = None


class SparseEntries(Everything):
    """Sparse increments: of every matrix in the layers, only the entries of the largest first gradients are moved.

    The gradient is that of the whole first step, averaged over its micro-batches and processes; the same step moves
    the entries that it chose. The optimizer has a vector of the chosen entries for each matrix, so that moments, weight
    decay and clipping are about these alone. Whatever is no matrix of a layer is frozen. Each matrix's gradient is
    reduced to its chosen entries as soon as the backward pass has made it. In the first step it is added up in the
    host's memory. Among equal entries, such as those of an expert that no token of that step was sent to, `topk` picks.

    Args:
        model: on the device where it stays, not sharded.
        options: of the run, with the share of a matrix's entries that is chosen; at least one entry is.

    Source: arXiv 2312.11875. Its authors' code (song-wx/SIFT) chooses by the gradient of the first micro-batch, which
    it does not take a step with.
    """

    def __init__(self, model: Any, world: World, options: TrainOptions) -> None:
        super().__init__(model, world)
        units = _all_units(_layers_of(model, options.model_name_or_path))
        parameters = dict(model.named_parameters())
        self.weights = {name: parameters[name] for (name, *_) in units if parameters[name].dim() >= 2}
        model.requires_grad_(False)
        self.values: dict[str, nn.Parameter] = {}  # the chosen entries, in the order of their places
        self.chosen: dict[str, Tensor] = {}  # their places in the flat matrix
        self._first: dict[str, Tensor] = {}  # whole gradients of the first step
        for name, weight in self.weights.items():
            count = math.ceil(options.updated_share() * weight.numel())
            self.values[name] = nn.Parameter(weight.detach().new_zeros(count))
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(partial(self._take, name))

    def held(self) -> dict[str, nn.Parameter]:
        return self.values

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return list(self.values.values()), []  # entries of matrices, all of them

    @torch.no_grad()
    def collect(self) -> None:
        for name, values in self.values.items():
            if name not in self.chosen:
                self._choose(name)
            elif self.world.size > 1:
                values.grad = torch.zeros_like(values) if values.grad is None else values.grad
                _average_over(values.grad, self.world)

    @torch.no_grad()
    def write(self) -> None:
        for name, places in self.chosen.items():
            self.weights[name].put_(places.long(), self.values[name])

    def state(self) -> dict[str, Tensor]:
        return {name: places.cpu() for name, places in self.chosen.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if {name: len(places) for name, places in state.items()} != {name: len(x) for name, x in self.values.items()}:
            raise InputError("finetuning_type: the checkpoint's chosen entries are not as many as this run has chosen")
        for name, places in state.items():
            self._keep(name, places.to(self.weights[name].device))

    def _take(self, name: str, weight: Tensor) -> None:
        """Takes a matrix's gradient away, all of it in the first step, and the chosen entries of it afterwards."""
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        if name in self.chosen:
            own, values = gradient.take(self.chosen[name].long()), self.values[name]
            values.grad = own if values.grad is None else values.grad.add_(own)
        else:
            own = gradient.cpu()
            self._first[name] = own if name not in self._first else self._first[name].add_(own)

    def _choose(self, name: str) -> None:
        weight, values = self.weights[name], self.values[name]
        gradient = self._first.pop(name).to(weight.device) if name in self._first else torch.zeros_like(weight)
        if self.world.size > 1:
            _average_over(gradient, self.world)
        places = gradient.abs().flatten().topk(len(values), sorted=False).indices.sort().values
        if self.world.size > 1:
            dist.broadcast(places, 0)
        self._keep(name, places.to(torch.int32 if weight.numel() < 2**31 else torch.int64))
        values.grad = gradient.take(places)

    @torch.no_grad()
    def _keep(self, name: str, places: Tensor) -> None:
        self.chosen[name] = places
        self.values[name].copy_(self.weights[name].take(places.long()))


def make_subset(model: Any, options: TrainOptions, world: World, done: int) -> Everything:
    """What the options' updates may move of a model, with the rest frozen.

    Args:
        model: before it is sharded.
        done: steps that the run has taken.

    Raises:
        InputError: the model has no layers to choose in.
    """
    if options.finetuning_type == "hft":
        return Halves(model, world, options, done)
    if options.finetuning_type == "sift":
        return SparseEntries(model, world, options)
    return Everything(model, world)


def require_subset(options: TrainOptions, world: World) -> None:
    """Raises InputError where processes that hold a part of every weight cannot move what the options ask for."""
    if not world.strategy.shards:
        return
    name = world.strategy.name
    if options.finetuning_type == "sift":
        raise InputError(f"finetuning_type: sift chooses entries of whole matrices, of which {name} leaves a process a "
                         "part; expected full or hft, or a copy of the model in each process (torchrun)")  # fmt: skip
    if options.hft_round_steps is not None:
        raise InputError(f"hft_round_steps: {name} cannot freeze other weights during a run; expected none, and a run "
                         "for each round")  # fmt: skip


def _average_over(tensor: Tensor, world: World) -> None:
    dist.all_reduce(tensor)
    tensor.div_(world.size)


Layers = dict[tuple[str, str], list[list[list[str]]]]  # by kind: for each layer its units, each the names of one


def _layers_of(model: Any, name: str) -> Layers:
    """The matrices and vectors of a model's numbered layers by their kind, each with its bias.

    Raises:
        InputError: the model of this name has no numbered layers.
    """
    ends = {id(x) for end in (model.get_input_embeddings(), model.get_output_embeddings()) for x in end.parameters()}
    shapes = {key: shape_of(x) for key, x in model.named_parameters() if id(x) not in ends}
    found: dict[tuple[str, str], dict[str, dict[str, list[str]]]] = defaultdict(lambda: defaultdict(dict))
    for key in sorted(shapes, key=lambda key: _carrier(key, shapes) != key):  # those that a bias goes with come first
        if (match := _IN_LAYER.fullmatch(key)) is None:
            continue
        owner = _carrier(key, shapes)
        kind = _kind(match["path"], len(shapes[owner]))
        found[match["list"], kind][match["number"]].setdefault(owner, []).append(key)
    if not any(len(shapes[owner]) >= 2 for kinds in found.values() for units in kinds.values() for owner in units):
        raise InputError(f"finetuning_type: {name} has no numbered layers, of whose matrices hft and sift choose some")
    return {kind: [list(units.values()) for units in layers.values()] for kind, layers in found.items()}


def _carrier(name: str, known: Iterable[str]) -> str:
    """The parameter that a bias is added to the product of; any other parameter is its own."""
    parent, _, last = name.rpartition(".")
    weight = f"{parent}.weight" if last == "bias" else name.removesuffix("_bias")
    return weight if weight in known else name


def _kind(path: str, dimensions: int) -> str:
    """The part of a layer that a parameter is in, such as self_attn or mlp; vectors of all parts are one kind."""
    block, *inner = path.split(".")
    if dimensions < 2:
        return _NORMS
    return block if len(inner) > 1 else ""


def _all_units(layers: Layers) -> list[list[str]]:
    return [names for kind in layers.values() for units in kind for names in units]


def _drawn(sizes: list[int], ratio: float, generator: torch.Generator) -> list[set[int]]:
    """Numbers below each size, drawn at random: a share of them in each layer, and exactly that in the sum.

    Where a layer's share is no whole number, it has the next lower or the next higher one, and lots decide which.
    """
    shares = [round(ratio * size, 6) for size in sizes]
    counts = [math.floor(share) for share in shares]
    between = [number for number, share in enumerate(shares) if share != counts[number]]
    missing = round(sum(shares)) - sum(counts)
    for lot in torch.randperm(len(between), generator=generator).tolist()[:missing]:
        counts[between[lot]] += 1
    draws = [torch.randperm(size, generator=generator).tolist() for size in sizes]
    return [set(draw[:count]) for draw, count in zip(draws, counts, strict=True)]
