"""Sharded heads in the ops: DTensors of FSDP2, HSDP and tensor parallelism, FSDP1's pieces, ZeRO-3's parameters.

Processes talk over gloo. Each computes its results, and the test compares them with one process that has everything.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from processes import in_processes
from torch import Tensor, nn

import logitless
from logitless import Head
from logitless.ops.sharded import whole

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

H, V = 6, 11  # no number of processes divides V

# ---------------------------------------------------------------------------------------------------------------------
# Processes


def results_of(world: int, folder: Path, worker: Callable[..., dict[str, Any]], *args: Any) -> list[dict[str, Any]]:
    """The results of `worker(rank, world, *args)` in each of `world` processes."""
    return in_processes(world, folder, _with_rank, worker, args)


def _with_rank(worker: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> dict[str, Any]:
    return worker(dist.get_rank(), dist.get_world_size(), *args)


# ---------------------------------------------------------------------------------------------------------------------
# Every op, on every layout


def batch() -> dict[str, Tensor]:
    """Eight sequences of five tokens in float64, from the same seed in every process."""
    g = torch.Generator().manual_seed(1)
    targets = torch.randint(V, (8, 5), generator=g)
    targets[torch.rand(8, 5, generator=g) < 0.3] = -100
    return {
        "hidden": torch.randn(8, 5, H, dtype=torch.float64, generator=g),
        "targets": targets,
        "ref_hidden": torch.randn(8, 5, H, dtype=torch.float64, generator=g),
        "upstream": torch.randn(8, 5, dtype=torch.float64, generator=g),
    }


def head() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(V, H, dtype=torch.float64, generator=g), torch.randn(V, dtype=torch.float64, generator=g)


def share(x: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """The sequences of one process: of the chosen half and of the rejected half alike, so that pairs stay together."""
    return {name: torch.cat([half.chunk(world)[rank] for half in value.chunk(2)]) for name, value in x.items()}


def _smoothed(x: dict[str, Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    kind = {"label_smoothing": 0.1, "z_loss": 0.01, "class_weight": torch.linspace(0.5, 2, V), "shift": True}
    return logitless.linear_cross_entropy(x["hidden"], weight, x["targets"], bias=bias, reduction="sum", **kind)  # type: ignore[arg-type]


def _top_k(x: dict[str, Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    ids = logitless.linear_top_k(x["hidden"], weight, 3, bias=bias).ids
    stats = logitless.linear_logprobs(x["hidden"], weight, ids, bias=bias, outputs=("logprob", "tail"))
    assert stats.logprob is not None and stats.tail is not None
    return (stats.logprob.sum(-1) * x["upstream"]).sum() + stats.tail.sum()


#: The sum of something over the tokens (pairs) of a batch, by op.
SUMS: dict[str, Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]] = {
    "logprobs": lambda x, w, b: sum(  # type: ignore[misc, return-value]
        (stat * x["upstream"]).sum()
        for stat in logitless.linear_logprobs(x["hidden"], w, x["targets"], bias=b, outputs=("logprob", "entropy"))
        if stat is not None
    ),
    "token_loss": lambda x, w, b: logitless.linear_token_loss(
        x["hidden"], w, x["targets"], lambda s, u: u * s.logprob.exp(), bias=b, token_inputs=[x["upstream"]],
        reduction="sum",
    ),
    "cross_entropy": _smoothed,
    "divergence": lambda x, w, b: logitless.linear_divergence(
        x["hidden"], Head(w, b), x["ref_hidden"], w, kind="js", mask=x["targets"] >= 0, reduction="sum"
    ),
    "top_k": _top_k,
    "dft": lambda x, w, b: logitless.nn.LinearLoss("dft", reduction="sum")(x["hidden"], w, x["targets"], bias=b),
    "depths": lambda x, w, b: logitless.linear_depth_loss(
        "nll", [x["hidden"], 2 * x["hidden"]], w, [x["targets"], x["targets"]], bias=b, depth_weight=(1.0, 0.5),
        normalizer=1,
    ).loss,
    "dpo": lambda x, w, b: logitless.linear_dpo(
        x["hidden"], w, x["targets"], bias=b, ref_hidden=x["ref_hidden"], reduction="sum"
    ).loss,
    "self_distillation": lambda x, w, b: logitless.linear_loss(
        "gkd", x["hidden"], w, x["targets"], bias=b, ref_hidden=x["ref_hidden"], ref_head=Head(w, b), reduction="sum"
    ),
    "reference": lambda x, w, b: logitless.linear_loss(
        "dft", x["hidden"], w, x["targets"], bias=b, backend="reference", reduction="sum"
    ),
    "tail_corrected": lambda x, w, b: -logitless.linear_logprobs(
        x["hidden"], w, x["targets"], bias=b, backward="tail_corrected", tail_tolerance=1e-9
    ).logprob.sum(),  # type: ignore[union-attr]
}  # fmt: skip


def expected(name: str) -> dict[str, Tensor]:
    """The sum over all tokens and its gradients, in one process with a plain head."""
    x, (weight, bias) = batch(), head()
    tensors = x["hidden"], weight, bias
    for tensor in tensors:
        tensor.requires_grad_()
    total = SUMS[name](x, weight, bias)
    total.backward()
    return {"sum": total.detach(), **{k: t.grad for k, t in zip(("hidden", "weight", "bias"), tensors, strict=True)}}  # type: ignore[dict-item]


#: Mesh dimensions by name, the head's placements, and whether processes see tokens of their own. "S", "R": Shard(0),
#: Replicate.
LAYOUTS = {
    "unnamed": (None, "S", True),
    "fsdp": (("dp_shard",), "S", True),
    "replicated": (("dp_replicate",), "R", True),
    "tp": (("tp",), "S", False),
    "unnamed_tp": (None, "S", False),
}
LAYOUTS_OF_FOUR = {
    "unnamed": (None, "S", True),
    "hsdp": (("dp_replicate", "dp_shard"), "RS", True),
    "fsdp_tp": (("dp_shard", "tp"), "SS", True),
    "ddp_tp": (("dp_replicate", "tp"), "RS", True),
}


def sharded_sums(rank: int, world: int, names: list[str]) -> dict[str, Any]:
    """Results by layout and op. Over "tp" neighbours see the same tokens, over other dimensions their own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    found: dict[str, Any] = {}
    for layout, (dims, placed, own_tokens) in (LAYOUTS if world == 2 else LAYOUTS_OF_FOUR).items():
        shape = (world,) if len(placed) == 1 else (2, world // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=dims)
        placements = [Shard(0) if x == "S" else Replicate() for x in placed]
        apart = world // (2 if dims and len(dims) > 1 and "tp" in dims else 1) if own_tokens else 1
        piece = rank * apart // world
        for name in names:
            x = share(batch(), piece, apart)
            x["hidden"].requires_grad_()
            weight, bias = [distribute_tensor(t, mesh, placements).requires_grad_() for t in head()]
            total = SUMS[name](x, weight, bias)
            (total * apart).backward()
            for tensor in (weight, bias):
                assert tensor.grad.placements == tensor.placements and tensor.grad.shape == tensor.shape  # type: ignore[attr-defined]
            grads = {"weight": weight.grad.full_tensor(), "bias": bias.grad.full_tensor()}  # type: ignore[union-attr]
            found[f"{layout}-{name}"] = {
                "sum": total.detach(), "hidden": x["hidden"].grad / apart, "piece": (piece, apart), **grads
            }  # fmt: skip
    return found


def check_sums(results: list[dict[str, Any]], name: str) -> None:
    truth = expected(name)
    for layout in {key.rsplit("-", 1)[0] for key in results[0]}:
        pieces = {found["piece"][0]: found["sum"] for found in (result[f"{layout}-{name}"] for result in results)}
        torch.testing.assert_close(sum(pieces.values()), truth["sum"], msg=lambda m, at=layout: f"{at}: {m}")
        for result in results:
            found = result[f"{layout}-{name}"]
            own = share({"hidden": truth["hidden"]}, *found["piece"])["hidden"]
            for key, value in {**truth, "hidden": own}.items():
                if key != "sum":
                    torch.testing.assert_close(found[key], value, msg=lambda m, at=(layout, key): f"{at}: {m}")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(2, tmp_path_factory.mktemp("two"), sharded_sums, list(SUMS))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(4, tmp_path_factory.mktemp("four"), sharded_sums, list(SUMS))


@pytest.mark.parametrize("name", SUMS)
def test_a_sharded_head_gives_what_the_whole_one_gives(two: list[dict[str, Any]], name: str) -> None:
    check_sums(two, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUMS)
def test_a_head_on_a_mesh_of_four_gives_what_the_whole_one_gives(four: list[dict[str, Any]], name: str) -> None:
    check_sums(four, name)


# ---------------------------------------------------------------------------------------------------------------------
# Hidden states and targets as DTensors


def dtensor_tokens(rank: int, world: int) -> dict[str, Any]:
    """DTensors of tokens are whole tensors that every process sees."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    x, found = batch(), {}
    for kind, placement in {"Shard(1)": Shard(1), "Shard(2)": Shard(2), "Replicate": Replicate()}.items():
        hidden = distribute_tensor(x["hidden"], mesh, [placement]).requires_grad_()
        targets = distribute_tensor(x["targets"], mesh, [Shard(1)])
        upstream = distribute_tensor(x["upstream"], mesh, [placement if kind == "Shard(1)" else Shard(0)])
        weight, bias = [distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in head()]
        for name in ("token_loss", "divergence", "dpo"):
            hidden.grad = weight.grad = bias.grad = None
            total = SUMS[name]({**x, "hidden": hidden, "targets": targets, "upstream": upstream}, weight, bias)
            total.backward()
            assert type(total) is Tensor and hidden.grad.placements == (placement,)
            grads = {k: t.grad.full_tensor() for k, t in (("hidden", hidden), ("weight", weight), ("bias", bias))}
            found[f"{kind}-{name}"] = {"sum": total.detach(), **grads}
    local = (x["hidden"] / world).requires_grad_()
    weight, bias = head()
    total = SUMS["dpo"]({**x, "hidden": DTensor.from_local(local, mesh, [Partial()])}, weight, bias)
    total.backward()
    found["Partial-dpo"] = {"sum": total.detach(), "hidden": local.grad}
    return found


def test_tokens_may_be_dtensors(tmp_path: Path) -> None:
    for found in results_of(2, tmp_path, dtensor_tokens):
        for key, values in found.items():
            truth = expected(key.split("-")[1])
            for name, value in values.items():
                torch.testing.assert_close(value, truth[name], msg=lambda m, at=(key, name): f"{at}: {m}")


# ---------------------------------------------------------------------------------------------------------------------
# FSDP2: training, compiled code, errors


class Body(nn.Module):
    """A body and a head, whose loss is computed outside of any module's forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(H, H), nn.Tanh())
        self.lm_head = nn.Linear(H, V)
        self.double()


def train(model: Any, x: dict[str, Tensor], tokens: float) -> list[float]:
    """The losses of three steps of AdamW, each of two micro-batches."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=0.1), []
    for _ in range(3):
        for half in range(2):
            part = {name: value[half::2] for name, value in x.items()}
            loss = logitless.linear_loss(
                "dft", model.body(part["hidden"]), model.lm_head.weight, part["targets"], bias=model.lm_head.bias,
                normalizer=tokens,
            )  # fmt: skip
            loss.backward()
            found.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return found


def fsdp2_steps(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    meshes = {"default": None}
    if world == 4:
        meshes["hsdp"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    x, found = batch(), {}
    for layout, mesh in meshes.items():
        model: Any = Body()
        for part in (model.body, model.lm_head):
            fully_shard(part, **({} if mesh is None else {"mesh": mesh}))
        piece = share(x, rank, world)
        tokens = int((x["targets"] >= 0).sum()) / world
        losses_of_steps = train(model, piece, tokens)
        weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
        found[layout] = {"losses": losses_of_steps, "weights": weights}
    return found


def check_steps(results: list[dict[str, Any]], world: int) -> None:
    model, x = Body(), batch()
    # Micro-batches of the processes together hold the same sequences as those of one process.
    pieces = [share(x, rank, world) for rank in range(world)]
    order = [torch.cat([piece[name][half::2] for piece in pieces]) for name in x for half in range(2)]
    together = {name: torch.empty_like(value) for name, value in x.items()}
    for i, name in enumerate(x):
        together[name][0::2], together[name][1::2] = order[2 * i], order[2 * i + 1]
    truth = train(model, together, float((x["targets"] >= 0).sum()))
    for layout in results[0]:
        mean = [sum(values) / world for values in zip(*(r[layout]["losses"] for r in results), strict=True)]
        torch.testing.assert_close(mean, truth)
        for result in results:
            torch.testing.assert_close(result[layout]["weights"], dict(model.named_parameters()))


def test_an_fsdp2_optimizer_takes_the_same_steps_as_one_process(tmp_path: Path) -> None:
    check_steps(results_of(2, tmp_path, fsdp2_steps), 2)


@pytest.mark.slow
def test_fsdp2_and_hsdp_on_four_processes_take_the_same_steps(tmp_path: Path) -> None:
    check_steps(results_of(4, tmp_path, fsdp2_steps), 4)


def no_rows_and_errors(rank: int, world: int) -> dict[str, Any]:
    """A vocabulary that leaves the last process without a row, compiled calls, and refusals."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    x, (full, _) = batch(), head()
    found: dict[str, Any] = {"rows": distribute_tensor(full[: world + 1], mesh, [Shard(0)]).to_local().shape[0]}
    targets = x["targets"].clamp(max=world)

    def loss(weight: Tensor) -> Tensor:
        total: Tensor = logitless.linear_loss("dft", x["hidden"], weight, targets)
        return total

    weight = distribute_tensor(full[: world + 1], mesh, [Shard(0)]).requires_grad_()
    loss(weight).backward()
    found["few"], weight.grad = weight.grad.full_tensor(), None  # type: ignore[union-attr]
    one_graph = torch.__version__ >= "2.13"  # Dynamo of 2.9 breaks it at the DTensor
    torch.compile(loss, backend="aot_eager", fullgraph=one_graph)(weight).backward()
    found["compiled"] = weight.grad.full_tensor()  # type: ignore[union-attr]
    plain = full[: world + 1].clone().requires_grad_()
    loss(plain).backward()
    found["truth"] = plain.grad
    try:
        loss(DTensor.from_local(full / world, mesh, [Partial()]))
    except ValueError as error:
        found["partial"] = str(error)
    try:
        logitless.vocabulary_order(weight)
    except TypeError as error:
        found["order"] = str(error)
    return found


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_few_rows_compiled_calls_and_refusals(tmp_path: Path, world: int) -> None:
    """Three rows on two processes; five rows on four, of which the last has none."""
    results = results_of(world, tmp_path, no_rows_and_errors)
    assert [found["rows"] for found in results] == {2: [2, 1], 4: [2, 2, 1, 0]}[world]
    for found in results:
        torch.testing.assert_close(found["few"], found["truth"])
        torch.testing.assert_close(found["compiled"], found["truth"])
        assert found["partial"].startswith("weight: expected a DTensor of placements Shard and Replicate, got (Partial")
        assert "weight.full_tensor()" in found["order"]


# ---------------------------------------------------------------------------------------------------------------------
# FSDP1


def fsdp1_errors(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    found = {}
    for original in (True, False):
        model = FullyShardedDataParallel(Body(), use_orig_params=original, device_id=torch.device("cpu"))
        x = batch()
        try:
            logitless.linear_loss("dft", x["hidden"], model.module.lm_head.weight, x["targets"])
        except ValueError as error:
            found[original] = str(error)
        with torch.no_grad(), FullyShardedDataParallel.summon_full_params(model):
            found["whole"] = logitless.linear_loss("dft", x["hidden"], model.module.lm_head.weight, x["targets"])
    return found


def test_a_piece_of_fsdp1_is_refused(tmp_path: Path) -> None:
    x = batch()
    truth = logitless.linear_loss("dft", x["hidden"], Body().lm_head.weight, x["targets"]).detach()
    for found in results_of(2, tmp_path, fsdp1_errors):
        assert "weight: expected a whole tensor, got a flat piece of shape [" in found[True]
        assert f"weight: expected a whole tensor, got shape {[V, H]} without its data" in found[False]
        assert all("FSDP1" in found[original] for original in (True, False))
        torch.testing.assert_close(found["whole"], truth)


# ---------------------------------------------------------------------------------------------------------------------
# ZeRO-3


class FakeZero3:
    """What DeepSpeed does to a parameter, in one process: empty but while it is gathered, with a hook that reduces."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.reduced = values, None
        self.parameter: Any = nn.Parameter(values.clone())
        self.parameter.ds_id, self.parameter.ds_shape, self.parameter.ds_active_sub_modules = 0, values.shape, set()
        self.parameter.register_post_accumulate_grad_hook(self.reduce)
        self.set(False)

    def set(self, available: bool) -> None:
        self.parameter.data = self.values.clone() if available else self.values.new_empty(0)
        self.parameter.ds_status = SimpleNamespace(name="AVAILABLE" if available else "NOT_AVAILABLE")

    def reduce(self, parameter: Any) -> None:
        self.reduced, parameter.grad = parameter.grad, None


@pytest.fixture
def zero3(monkeypatch: pytest.MonkeyPatch) -> FakeZero3:
    fake = FakeZero3(head()[0])

    class GatheredParameters:
        def __init__(self, parameters: list[Any]) -> None:
            assert parameters == [fake.parameter]

        def __enter__(self) -> None:
            fake.set(True)

        def __exit__(self, *_: object) -> None:
            fake.set(False)

    package = ModuleType("deepspeed")
    package.zero = SimpleNamespace(GatheredParameters=GatheredParameters)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    return fake


@pytest.mark.parametrize("backward", ["recompute", "auto"])
def test_a_zero3_parameter_is_gathered_and_its_gradient_handed_to_deepspeeds_hook(
    zero3: FakeZero3, backward: Any
) -> None:
    x, (_, bias) = batch(), head()
    weight = head()[0].requires_grad_()
    for _ in range(2):
        found = logitless.linear_loss("dft", x["hidden"], zero3.parameter, x["targets"], bias=bias, backward=backward)
        assert zero3.parameter.shape == (0,)
        found.backward()
        assert zero3.parameter.shape == (0,) and zero3.parameter.grad is None
        truth = logitless.linear_loss("dft", x["hidden"], weight, x["targets"], bias=bias, backward=backward)
        (gradient,) = torch.autograd.grad(truth, weight)
        torch.testing.assert_close(found, truth)
        torch.testing.assert_close(zero3.reduced, gradient)
        assert len(zero3.parameter._post_accumulate_grad_hooks) == 1  # DeepSpeed's


def test_a_zero3_parameter_that_deepspeed_holds_is_left_to_it(zero3: FakeZero3) -> None:
    zero3.set(True)
    zero3.parameter.ds_active_sub_modules = {1}
    assert whole("weight", zero3.parameter) is zero3.parameter
    zero3.parameter.ds_active_sub_modules = set()  # a caller's own GatheredParameters around the forward alone
    x = batch()
    loss = logitless.linear_loss("dft", x["hidden"], zero3.parameter, x["targets"], backward="recompute")
    zero3.set(False)
    loss.backward()
    assert zero3.reduced is not None and zero3.reduced.shape == (V, H) and zero3.parameter.shape == (0,)


def test_a_zero3_parameter_in_one_compiled_graph_is_refused(zero3: FakeZero3) -> None:
    x = batch()

    def loss(weight: Tensor) -> Any:
        return logitless.linear_loss("dft", x["hidden"], weight, x["targets"])

    with pytest.raises(Exception, match="ZeRO-3 parameter is not gathered in compiled code"):
        torch.compile(loss, backend="eager", fullgraph=True)(zero3.parameter)
    found = torch.compile(loss, backend="eager")(zero3.parameter)  # breaks the graph there
    torch.testing.assert_close(found, loss(zero3.values))


class Embedded(nn.Module):
    """A body with a head, whose forward gives hidden states, or with targets the loss."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.lm_head = nn.Embedding(V, H), nn.Linear(H, V, bias=not tied)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        hidden = self.embed(ids).tanh()
        return hidden if targets is None else self.loss(hidden, targets)

    def loss(self, hidden: Tensor, targets: Tensor) -> Any:
        head = self.lm_head
        return logitless.linear_loss("dft", hidden, head.weight, targets, bias=head.bias, backward="recompute")


def micro_batches(world: int) -> list[tuple[Tensor, Tensor]]:
    """Six times the ids and targets of every process."""
    g = torch.Generator().manual_seed(4)
    return [
        (torch.randint(V, (world, 2, 5), generator=g), torch.randint(V, (world, 2, 5), generator=g)) for _ in "123456"
    ]


def deepspeed_steps(rank: int, world: int, layout: str) -> dict[str, Any]:
    """Three steps of two micro-batches under ZeRO-3, with the op outside of any forward or "inside" the model's."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    model = Embedded(layout == "tied")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "zero_optimization": zero}
    config["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), lr=0.5))
    for ids, targets in micro_batches(world):
        own = ids[rank], targets[rank]
        engine.backward(engine(*own) if layout == "inside" else model.loss(engine(own[0]), own[1]))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["outside", "tied", "inside"])
def test_deepspeed_takes_the_same_steps_as_one_process(tmp_path: Path, layout: str) -> None:
    pytest.importorskip("deepspeed")
    results = results_of(2, tmp_path, deepspeed_steps, layout)
    model = Embedded(layout == "tied")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for i, (ids, targets) in enumerate(micro_batches(2)):
        (sum(model(ids[rank], targets[rank]) for rank in range(2)) / 4).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    for found in results:
        torch.testing.assert_close(found, {name: p.detach() for name, p in model.named_parameters()})
