"""How the processes of a run share one model: a copy each, or a part of every weight each (FSDP2, ZeRO-3).

    Copies     one process, or several that average their gradients: what torchrun starts
    FSDP2      PyTorch's `fully_shard`, applied by Accelerate as its plugin says
    ZeRO3      DeepSpeed's stage 3, started by Accelerate as its plugin says

`accelerate launch --config_file` writes which it is into the environment, where Accelerate's plugins read it. The
trained model and frozen references are both sharded. Weights are loaded whole into the memory of the host and looked
at there, then every process keeps its part of them on its device.

A weight is put together for its own use, by all processes at once. So all of them must run the model equally often,
in evaluation too, and none may read a weight alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from logitless.training.config import TrainOptions
from logitless.training.errors import InputError

_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, besides its count of steps

# ---------------------------------------------------------------------------------------------------------------------
# Weights that are a part of themselves


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of a whole weight: of one that ZeRO-3 has partitioned, PyTorch knows an empty part only."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


def is_part(weight: Tensor) -> bool:
    """Whether a weight is sharded over the processes."""
    return hasattr(weight, "device_mesh") or hasattr(weight, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """Whether every process holds a part of the model only, some of which may be whole at the moment."""
    return any(hasattr(module, "reshard") for module in model.modules()) or any(map(is_part, model.parameters()))


@torch.no_grad()
def whole_weight(weight: Tensor) -> Tensor:
    """A weight that is put together from all processes, which must call it at once; a plain tensor as it is."""
    if hasattr(weight, "device_mesh"):
        found: Tensor = weight.full_tensor()  # type: ignore[attr-defined]
        return found
    if not hasattr(weight, "ds_id"):
        return weight.detach()
    with gathered_weights([weight]):
        return weight.detach().clone()


@contextmanager
def gathered_weights(weights: list[Any]) -> Iterator[None]:
    """Has the weights that ZeRO-3 partitioned whole meanwhile, for all processes at once; others stay."""
    partitioned = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def like(value: Tensor, weight: Tensor) -> Tensor:
    """This process's part of a whole tensor that belongs to a weight, on its device; all of it for a plain weight."""
    if not hasattr(weight, "device_mesh"):
        return value.to(weight.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(weight.device), mesh, placements, src_data_rank=None)


def parameters_of(model: Any) -> dict[str, nn.Parameter]:
    """The parameters by name as the optimizer has them: FSDP2 leaves some whole after a forward pass."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return dict(model.named_parameters())


def whole_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by name, whole, one after the other; all processes must take all of them."""
    parameters_of(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        yield name, whole_weight(tensor)


def gathered_state(model: Any, *, keep: bool) -> dict[str, Tensor] | None:
    """What a process saves of a sharded model: its tensors on the CPU; None where the model is not sharded.

    Of an adapted model these are what is trained, and embedding and head, which peft saves where they were resized.

    Args:
        keep: whether this process needs them; the others take part with empty hands.
    """
    if not is_sharded(model):
        return None
    parameters_of(model)
    state = model.state_dict(keep_vars=True)
    if hasattr(model, "peft_config"):
        ends = (*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters())
        kept = set(map(id, ends))
        state = {name: x for name, x in state.items() if x.requires_grad or id(x) in kept}
    found: dict[str, Tensor] = {}
    once: dict[int, Tensor] = {}  # a tied weight has two names and stays one tensor
    for name, tensor in state.items():
        if id(tensor) not in once:
            value = whole_weight(tensor)
            once[id(tensor)] = value.cpu() if keep else value.new_empty(0)
        found[name] = once[id(tensor)]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Strategies


class Copies:
    """Every process holds the whole model; several of them average gradients, of all weights by DDP."""

    #: Whether a process holds a part of the weights only.
    shards: ClassVar[bool] = False
    #: Whether weights can be exchanged during a run, as a reference that follows the trained model needs it.
    writes: ClassVar[bool] = True
    #: For the log.
    name: str = ""
    notes: tuple[str, ...] = ()

    def host(self, device: torch.device) -> torch.device:
        """Where weights are loaded to."""
        return torch.device("cpu") if self.shards else device

    def require(self, options: TrainOptions) -> None:
        """Raises InputError where a run of these options is not served."""

    def place(self, model: Any) -> None:
        """Brings a model that is not trained into its place."""

    def trained(self, model: Any, options: TrainOptions, make: Callable[[], Any]) -> tuple[Any, Any]:
        """Brings the trained model into its place.

        Args:
            make: makes its optimizer.

        Returns:
            What is called for a forward pass with a gradient, and the optimizer.
        """
        # the gradients of a subset are fewer, and are averaged where they are collected (subsets.py)
        several = dist.is_initialized() and dist.get_world_size() > 1 and options.finetuning_type == "full"
        return DistributedDataParallel(model) if several else model, make()

    def exchange(self, parallel: Any, last: bool) -> AbstractContextManager[Any]:
        """The context of a forward and a backward pass; copies exchange gradients at a step's last one alone."""
        alone = isinstance(parallel, DistributedDataParallel) and not last
        return parallel.no_sync() if alone else nullcontext()

    def backward(self, parallel: Any, loss: Tensor, last: bool) -> None:
        """Adds the gradient of a loss; gradients are averaged over processes at a step's last one."""
        loss.backward()

    def step(self, parallel: Any, optimizer: Any, max_norm: float, check: Callable[[float], None]) -> float:
        """Clips the gradients, takes the optimizer's step and forgets them; returns their norm.

        Args:
            max_norm: their norm is clipped to it; 0 is no limit.
            check: looks at the norm before the step, and raises where it must not be taken.
        """
        moved = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = float(whole_weight(torch.nn.utils.clip_grad_norm_(moved, max_norm or math.inf)))
        check(norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def moments(self, optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's tensors of a parameter, whole; all processes must call it at once."""
        return {moment: whole_weight(tensor) for moment, tensor in optimizer.state.get(parameter, {}).items()}

    def set_moment(self, optimizer: Any, parameter: nn.Parameter, moment: str, tensor: Tensor) -> None:
        """Gives the optimizer what `moments` gave."""
        if moment == "step":
            # AdamW keeps its step counter on the CPU unless it is fused
            device = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
            optimizer.state[parameter][moment] = tensor.to(device)
        else:  # in the precision of the weights, which a run may change
            optimizer.state[parameter][moment] = like(tensor.to(parameter.dtype), parameter)

    def leave(self) -> None:
        """Undoes what starting has left behind in the process."""


class _Accelerated(Copies):
    """A strategy that Accelerate's configuration asks for."""

    shards = True

    def __init__(self, use_cpu: bool) -> None:
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin

        if use_cpu and torch.cuda.is_available():
            raise InputError(f"use_cpu: {self.name} shards over the GPUs that are there; hide them "
                             "(CUDA_VISIBLE_DEVICES=), or start one process")  # fmt: skip
        self.options_of_launch()
        once = GradientAccumulationPlugin(num_steps=1)  # the loss is divided by the count of a whole step
        try:
            self.accelerator = Accelerator(mixed_precision="no", gradient_accumulation_plugin=once)
        except ImportError as error:
            raise InputError(f"accelerate's configuration asks for {self.name}: {error}") from error

    def options_of_launch(self) -> None:
        """Reads what the launcher asks for. Raises InputError where that is not served."""
        raise NotImplementedError

    def leave(self) -> None:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


class FSDP2(_Accelerated):
    """PyTorch's `fully_shard`: each module's weights are gathered for its own forward and backward pass."""

    name = "FSDP2"

    def options_of_launch(self) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy

        if (
            os.environ.get("FSDP_VERSION", "1") != "2"
        ):  # 1 is Accelerate's default; its plugin may fail with another word
            raise InputError("accelerate's configuration: fsdp_version: 1 is not served; set fsdp_version: 2")
        plugin = self._plugin()
        refused = {
            "fsdp_offload_params": (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "set it to false"),
            "fsdp_activation_checkpointing": (plugin.activation_checkpointing, "use --gradient_checkpointing"),
            "fsdp_ignored_modules": (plugin.ignored_modules is not None, "leave it out"),
        }
        for name, (asked, cure) in refused.items():
            if asked:
                raise InputError(f"accelerate's configuration: {name} is not served; {cure}")

    def _plugin(self) -> Any:
        """A plugin of the environment's, new for every model, whose classes it notes."""
        from accelerate import FullyShardedDataParallelPlugin

        if _truth("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            self.notes = ("fsdp_cpu_ram_efficient_loading: no effect, every process reads the weights",)
        return FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)

    def place(self, model: Any) -> None:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        self.accelerator.state.fsdp_plugin = self._plugin()  # which Accelerate drops on CPU processes
        try:
            fsdp2_prepare_model(self.accelerator, model)
        except ValueError as error:
            raise InputError(
                f"accelerate's configuration: FSDP2 cannot shard {type(model).__name__}: {error}"
            ) from error

    def trained(self, model: Any, options: TrainOptions, make: Callable[[], Any]) -> tuple[Any, Any]:
        self.place(model)
        return model, make()


class ZeRO3(_Accelerated):
    """DeepSpeed's stage 3: each module's weights are gathered for its own forward and backward pass."""

    name = "ZeRO-3"
    writes = False

    def options_of_launch(self) -> None:
        os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "false"  # weights are looked at before they are partitioned

    def require(self, options: TrainOptions) -> None:
        config = self.accelerator.deepspeed_plugin.deepspeed_config
        stage = config["zero_optimization"]
        offload = [name for name in ("offload_optimizer", "offload_param")
                   if (stage.get(name) or {}).get("device", "none") != "none"]  # fmt: skip
        refused = {
            f"zero_stage: {stage['stage']}": (stage["stage"] != 3, "stage 3, or torchrun for a copy in each process"),
            ", ".join(offload): (bool(offload), "none"),
            "optimizer": ("optimizer" in config, "none, as the options name it"),
            "scheduler": ("scheduler" in config, "none, as the options name it"),
            "bf16 or fp16": (_enabled(config, "bf16") or _enabled(config, "fp16"), "the options' bf16, or none"),
        }
        for name, (asked, expected) in refused.items():
            if asked:
                raise InputError(f"DeepSpeed's configuration: {name} is not served; expected {expected}")
        wanted = {
            "gradient_accumulation_steps": (1, options.gradient_accumulation_steps),  # 1 is what the launcher fills in
            "train_micro_batch_size_per_gpu": (options.per_device_train_batch_size,),
            "gradient_clipping": (options.max_grad_norm,),
        }
        for name, ours in wanted.items():
            if config.get(name, "auto") not in ("auto", *ours):
                raise InputError(f"DeepSpeed's configuration: {name} is {config[name]}, and the option is {ours[-1]}; "
                                 "expected auto, or the same")  # fmt: skip
        if options.dtype != "float32":
            raise InputError(f"dtype: DeepSpeed keeps float32 weights beside those of {options.dtype}, which trains "
                             "another model; expected float32")  # fmt: skip

    def trained(self, model: Any, options: TrainOptions, make: Callable[[], Any]) -> tuple[Any, Any]:
        config = self.accelerator.deepspeed_plugin.deepspeed_config
        config |= {
            "gradient_accumulation_steps": 1,  # the loss is divided by the count of a whole step
            "train_micro_batch_size_per_gpu": options.per_device_train_batch_size,
            "gradient_clipping": options.max_grad_norm,
        }
        config.pop("train_batch_size", None)
        engine, optimizer = self.accelerator.prepare(model, make())
        return engine, optimizer.optimizer

    def place(self, model: Any) -> None:
        import deepspeed

        config = self.accelerator.deepspeed_plugin.deepspeed_config
        deepspeed.initialize(model=model, config=config)  # complete, since the trained model comes first

    def backward(self, parallel: Any, loss: Tensor, last: bool) -> None:
        parallel.set_gradient_accumulation_boundary(is_boundary=last)
        parallel.backward(loss)

    def step(self, parallel: Any, optimizer: Any, max_norm: float, check: Callable[[float], None]) -> float:
        parallel.step()
        norm = float(parallel.get_global_grad_norm())
        check(norm)
        return norm

    def moments(self, optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = optimizer.optimizer
        if not parameter.requires_grad or not inner.state:
            return {}
        steps = next(iter(inner.state.values()))["step"].clone()
        found = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in _MOMENTS}
        return {"step": steps} | found

    def set_moment(self, optimizer: Any, parameter: nn.Parameter, moment: str, tensor: Tensor) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        flats, inner = optimizer.fp32_partitioned_groups_flat, optimizer.optimizer
        for flat in flats:
            if not inner.state[flat]:  # AdamW makes its tensors in its first step
                device = flat.device if inner.defaults.get("fused") else torch.device("cpu")
                zeros = {name: torch.zeros_like(flat) for name in _MOMENTS}
                inner.state[flat] |= {"step": torch.zeros((), device=device), **zeros}
        if moment == "step":
            for flat in flats:
                inner.state[flat]["step"].copy_(tensor)
            return
        # the last process's part is padded, for which DeepSpeed's setter of whole tensors has no room
        size, rank = parameter.partition_numel(), dist.get_rank()  # type: ignore[attr-defined]
        padded = F.pad(tensor.flatten(), (0, size * dist.get_world_size() - tensor.numel()))
        safe_set_local_optimizer_state(parameter, padded[rank * size : (rank + 1) * size].to(parameter.device), moment)


def _enabled(config: dict[str, Any], section: str) -> bool:
    return config.get(section, {}).get("enabled") is True


def _truth(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def strategy_of_launch(use_cpu: bool) -> Copies:
    """The strategy that the launcher's environment asks for.

    Raises:
        InputError: one that is not served.
    """
    if _truth("ACCELERATE_USE_PARALLELISM_CONFIG") or _truth("ACCELERATE_USE_MEGATRON_LM"):
        raise InputError("accelerate's configuration: parallelism_config and Megatron-LM are not served; expected "
                         "FSDP2, DeepSpeed's ZeRO-3 or copies (MULTI_GPU)")  # fmt: skip
    if _truth("ACCELERATE_USE_FSDP"):
        return FSDP2(use_cpu)
    if _truth("ACCELERATE_USE_DEEPSPEED"):
        return ZeRO3(use_cpu)
    return Copies()
