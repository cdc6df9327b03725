"""Reward functions: found by name, called as TRL calls them, and their results checked and summed.

    reward(prompts=[...], completions=[...], completion_ids=[...], **columns) -> [float or None, ...]

A reward for each completion; None where the function does not apply to it. Asynchronous functions run side by side.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from logitless.training.errors import InputError, nearest

#: What `score_completions` itself passes by name, so that no column of the data can.
PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_EXPECTED = "expected MODULE:FUNCTION or path/to/FILE.py:FUNCTION"


class Reward(NamedTuple):
    """A reward function and what the log calls it."""

    name: str
    function: Callable[..., Any]


class Scores(NamedTuple):
    """What the reward functions say about S completions."""

    total: torch.Tensor
    """`[S]` float32: weighted sums of the functions that apply; NaN where none does, which must give no advantage."""
    parts: dict[str, torch.Tensor]
    """`[S]` float32 for each reward's name, without its weight; NaN where it does not apply."""
    metrics: dict[str, float]
    """Means of the values that functions gave to `log_metric`, by name."""
    extra: dict[str, list[Any]]
    """Values that functions gave to `log_extra`, by column."""


def load_rewards(specs: Sequence[str | Mapping[str, Any]], folder: Path | None = None) -> list[Reward]:
    """The reward functions that the option `reward_funcs` names, each under a name of its own.

    Args:
        specs: see `load_reward`. A name that came before gets a number: `pattern_format`, `pattern_format_2`.
        folder: where the configuration file is.

    Raises:
        InputError: there is none, or one cannot be loaded.
    """
    if isinstance(specs, str | Mapping):
        specs = [specs]
    if not specs:
        raise InputError(f"reward_funcs: {_EXPECTED}, got none")
    seen, found = Counter[str](), []
    for spec in specs:
        reward = load_reward(spec, folder)
        seen[reward.name] += 1
        number = seen[reward.name]
        found.append(reward if number == 1 else reward._replace(name=f"{reward.name}_{number}"))
    return found


def load_reward(spec: str | Mapping[str, Any], folder: Path | None = None) -> Reward:
    """The reward function of a name.

    Args:
        spec: `module:function`; or `path/to/file.py:function`, from the folder or else from the current one; or a
            mapping with that name under `function`, whose other entries are arguments of the function.
        folder: where the configuration file is; None looks in the current folder alone.

    Raises:
        InputError: the spec has another form, or there is no such module, file or function, or it fails to load.
    """
    if isinstance(spec, Mapping):
        arguments = {str(key): value for key, value in spec.items() if key != "function"}
        if "function" not in spec:
            raise InputError(f"reward_funcs: {_EXPECTED}, or a mapping with that under 'function', got {dict(spec)!r}")
        reward = load_reward(spec["function"], folder)
        return Reward(reward.name, functools.partial(reward.function, **arguments)) if arguments else reward
    where, _, attribute = str(spec).rpartition(":")
    if not isinstance(spec, str) or not where or not attribute.isidentifier():
        raise InputError(f"reward_funcs: {_EXPECTED}, or a mapping with that under 'function', got {spec!r}")
    module = _file_module(Path(where), spec, folder) if where.endswith(".py") else _named_module(where, spec, folder)
    function = getattr(module, attribute, None)
    if function is None:
        raise InputError(f"reward_funcs: {spec}: {where} has no {attribute!r}{nearest(attribute, vars(module))}")
    if not callable(function) or inspect.isclass(function):
        raise InputError(f"reward_funcs: {spec}: expected a function, got {type(function).__name__} {attribute!r}")
    return Reward(_name_of(function), function)


def _named_module(name: str, spec: str, folder: Path | None) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed_to_load(spec, error) from error
        files = [place / f"{name.replace('.', '/')}.py" for place in _folders(folder)]
        there = next((f"; for {file}, write {name}.py:..." for file in files if file.is_file()), "")
        raise InputError(f"reward_funcs: {spec}: there is no module {error.name!r}{there}") from error
    except Exception as error:
        raise _failed_to_load(spec, error) from error


def _file_module(path: Path, spec: str, folder: Path | None) -> ModuleType:
    candidates = [place / path for place in _folders(folder)]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        looked = ", ".join(dict.fromkeys(map(str, candidates)))
        raise InputError(f"reward_funcs: {spec}: no such file (looked for {looked})")
    name = f"logitless_rewards_of_{file.resolve().as_posix()}"
    if name in sys.modules:
        return sys.modules[name]
    made = importlib.util.spec_from_file_location(name, file)
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    try:
        made.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed_to_load(spec, error) from error
    return module


def _folders(folder: Path | None) -> list[Path]:
    return [Path.cwd()] if folder is None else [folder, Path.cwd()]


def _failed_to_load(spec: str, error: Exception) -> InputError:
    return InputError(f"reward_funcs: {spec}: it fails to load: {_error_line(error)}")


def _error_line(error: BaseException) -> str:
    """An error with the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" ({frame.filename}:{frame.lineno})" for frame in last)
    return f"{type(error).__name__}: {error}{place}"


def _name_of(function: Callable[..., Any]) -> str:
    """A function's own name; a partial's is that of its function, and an object's that of its class."""
    inner = _innermost(function)
    return str(getattr(inner, "__name__", type(inner).__name__))


def _innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def is_asynchronous(function: Callable[..., Any]) -> bool:
    """Whether a call gives something to await; a partial and an object with an asynchronous call are looked into."""
    inner = _innermost(function)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


def score_completions(
    rewards: Sequence[Reward],
    weights: Sequence[float] | None,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    origins: Sequence[str],
    trainer_state: Any = None,
) -> Scores:
    """Calls every reward function once on all completions, and sums what they say: `total = sum_k weight_k part_k`.

    A function is left out of a completion's sum where it says None. Both sums and None are as in TRL.

    Args:
        rewards: the functions, each of a name of its own.
        weights: a finite weight for each; None: 1 each.
        prompts: a prompt for each of S completions; texts or lists of turns.
        completions: texts or lists of turns.
        completion_ids: the completions' token ids, which functions get as lists.
        columns: the data's other columns, each with S values.
        origins: where the row of each completion is, for messages.
        trainer_state: what functions get under this name; in TRL, Transformers' `TrainerState`.

    Raises:
        InputError: a function fails, or its result is not one finite number or None for each completion; a column has
            the name of something else that functions get; or weights of another number.
    """
    columns = {name: values for name, values in columns.items() if name not in ("prompt", "completion")}
    _check_names(rewards, columns)
    factors = _factors(rewards, weights)
    extra: defaultdict[str, list[Any]] = defaultdict(list)
    metrics: defaultdict[str, list[float]] = defaultdict(list)
    logs = {"log_extra": lambda name, values: extra[name].extend(values)}
    logs |= {"log_metric": lambda name, value: metrics[name].append(float(value))}
    ids = [each.tolist() if isinstance(each, torch.Tensor) else list(each) for each in completion_ids]
    rows = {"prompts": list(prompts), "completions": list(completions), "completion_ids": ids}
    rows |= {name: list(values) for name, values in columns.items()}
    batch = _Round(rows, {"trainer_state": trainer_state, **logs}, list(origins))
    results = _results(rewards, batch)
    parts = {name: _as_parts(name, result, batch.origins) for name, result in results.items()}
    means = {name: sum(values) / len(values) for name, values in metrics.items()}
    return Scores(_sum_of_parts(list(parts.values()), factors), parts, means, dict(extra))


class _Round(NamedTuple):
    """What every function gets: lists with a value for each completion, and what is for all of them."""

    rows: dict[str, list[Any]]
    shared: dict[str, Any]
    origins: list[str]

    def row(self, place: int) -> dict[str, Any]:
        return {name: values[place : place + 1] for name, values in self.rows.items()} | self.shared


def _check_names(rewards: Sequence[Reward], columns: Iterable[str]) -> None:
    for name in columns:
        if name in PASSED:
            raise InputError(f"the data has a column {name!r}, but reward functions get something else under this name")
    names = Counter(reward.name for reward in rewards)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(f"reward_funcs: expected names of their own, got {twice[0]!r} twice")
    for reward in rewards:
        bound = reward.function.keywords if isinstance(reward.function, functools.partial) else {}
        if both := sorted({*bound} & {*columns}):
            raise InputError(
                f"reward {reward.name}: {both[0]!r} is an argument of the function and a column of the data; rename "
                "the column"
            )


def _factors(rewards: Sequence[Reward], weights: Sequence[float] | None) -> list[float]:
    factors = [1.0] * len(rewards) if weights is None else list(weights)
    if len(factors) != len(rewards):
        raise InputError(f"reward_weights: expected {len(rewards)}, one for each of reward_funcs, got {len(factors)}")
    for reward, factor in zip(rewards, factors, strict=True):
        if not math.isfinite(factor):
            raise InputError(f"reward_weights: expected a finite number for {reward.name}, got {factor}")
    return factors


def _results(rewards: Sequence[Reward], batch: _Round) -> dict[str, Any]:
    """What each function returns, by name, in the order of the rewards."""
    arguments = batch.rows | batch.shared
    waiting = [reward for reward in rewards if is_asynchronous(reward.function)]
    found: dict[str, Any] = {}
    for reward in rewards:
        if reward not in waiting:
            found[reward.name] = _guarded(reward, batch, functools.partial(reward.function, **arguments))
    if waiting:
        calls = [reward.function(**arguments) for reward in waiting]
        for reward, outcome in zip(waiting, _runner().run(_all(calls)), strict=True):
            if isinstance(outcome, Exception):
                raise _failure(reward, batch, outcome) from outcome
            found[reward.name] = outcome
    return {reward.name: found[reward.name] for reward in rewards}


@functools.cache
def _runner() -> asyncio.Runner:
    """One event loop for all rounds, since a function may keep its connections from one to the next."""
    return asyncio.Runner()


async def _all(calls: Sequence[Any]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


def _guarded(reward: Reward, batch: _Round, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        raise _failure(reward, batch, error) from error


def _failure(reward: Reward, batch: _Round, error: Exception) -> InputError:
    """The error to raise for a function that failed, with the first row on which it fails alone."""
    place = _failing_row(reward, batch)
    row = "" if place is None else f" on a completion of {batch.origins[place]}"
    hint = ""
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        hint = "; a reward function ends in **columns, since it gets every column of the data"
    return InputError(f"reward {reward.name} failed{row}: {_error_line(error)}{hint}")


def _failing_row(reward: Reward, batch: _Round) -> int | None:
    for place in range(len(batch.origins)):
        try:
            result = reward.function(**batch.row(place))
            if is_asynchronous(reward.function):
                _runner().run(_one(result))
        except Exception:
            return place
    return None


async def _one(call: Any) -> Any:
    return await call


def _as_parts(name: str, result: Any, origins: Sequence[str]) -> torch.Tensor:
    """A function's result as `[S]` float32, NaN for None."""
    expected = f"expected a list of {len(origins)} finite numbers or None"
    if isinstance(result, str | bytes | Mapping) or not isinstance(result, Iterable) or _is_scalar(result):
        raise InputError(f"reward {name}: {expected}, got {type(result).__name__} {result!r:.100}")
    values = list(result)
    if len(values) != len(origins):
        raise InputError(f"reward {name}: {expected}, got {len(values)} values")
    for value, origin in zip(values, origins, strict=True):
        number = _as_float(value)
        if value is not None and (number is None or not math.isfinite(number)):
            raise InputError(f"reward {name}: {expected}, got {value!r:.100} for a completion of {origin}")
    return torch.tensor([math.nan if value is None else _as_float(value) for value in values], dtype=torch.float32)


def _is_scalar(value: Any) -> bool:
    """Whether it is a tensor or array without dimensions, which has a method to iterate over it that fails."""
    return getattr(value, "ndim", None) == 0


def _as_float(value: Any) -> float | None:
    """A number, a bool, or a tensor or array without dimensions, as a float; None for anything else."""
    if _is_scalar(value) and hasattr(value, "item"):
        value = value.item()
    return float(value) if isinstance(value, int | float) else None


def _sum_of_parts(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Weighted sums `[S]` over the parts that are not NaN; NaN where all are."""
    stacked = torch.stack(list(parts))  # [K, S]
    total = (stacked * torch.tensor(weights, dtype=torch.float32)[:, None]).nansum(0)
    return total.masked_fill(stacked.isnan().all(0), math.nan)
