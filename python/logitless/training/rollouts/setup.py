"""The rounds that a run's options describe, and what is refused before the first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logitless.losses import Loss
from logitless.training.checks import embedding_rows, head_rows
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.loader import TOGETHER, Loader
from logitless.training.mixture import ComponentOptions
from logitless.training.objective import computes_in_bf16
from logitless.training.parallel import World
from logitless.training.rollouts.advantages import SCALES_OF, estimator_of, scale_of
from logitless.training.rollouts.critic import load_critic
from logitless.training.rollouts.generation import Sampling, TextGenerator
from logitless.training.rollouts.groups import Schedule, shows
from logitless.training.rollouts.inputs import correction_of
from logitless.training.rollouts.model_generator import ModelTextGenerator, ends_of
from logitless.training.rollouts.options import RolloutOptions
from logitless.training.rollouts.prompts import Prompts
from logitless.training.rollouts.rewards import load_rewards
from logitless.training.rollouts.rounds import Judge, Rounds, RoundSettings
from logitless.training.rollouts.server import ServerTextGenerator

#: Options of a value function.
OF_CRITIC = ("gamma", "lam", "cliprange_value", "critic_learning_rate")


def check_options(options: TrainOptions, loss: Loss, world: World) -> None:
    """Raises InputError for options of a run that samples which exclude one another, or would do nothing."""
    if world.strategy.shards:
        raise InputError(f"on_policy: a model in parts ({world.strategy.name}) does not sample; train it as copies")
    if options.packing:
        raise InputError("packing: completions are not packed; padding_free has no padding either")
    if options.precompute_ref_log_probs:
        raise InputError("precompute_ref_log_probs: completions are not known before training")
    if options.temperature <= 0:
        raise InputError(f"temperature must be above 0 to sample a group, got {options.temperature}")
    kind, shown = shows(loss), options.num_demonstrations
    if kind == "nothing" and (shown != 1 or options.demonstration_schedule):
        option = "num_demonstrations" if shown != 1 else "demonstration_schedule"
        raise InputError(f"{option}: {loss.name} reads no demonstrations")
    if not 1 <= shown <= options.num_generations:
        raise InputError(f"num_demonstrations must be from 1 to num_generations={options.num_generations}, got {shown}")
    if kind == "prefix" and options.max_completion_length < 2:
        raise InputError("max_completion_length must be at least 2: a prefix and a token behind it")
    _check_rewards(options, loss)
    round_sizes(options, loss)
    sampling_of(options)


def _check_rewards(options: TrainOptions, loss: Loss) -> None:
    """Raises InputError for options of rewards and advantages that the run would not read."""
    asked = [name for name in ("reward_weights", "advantage_estimator", "scale_rewards") if getattr(options, name)]
    if options.reward_funcs is None:
        if asked:
            raise InputError(f"{asked[0]}: no reward_funcs are named")
        return
    estimator = estimator_of(loss, options.advantage_estimator)
    known = SCALES_OF.get(estimator, ())
    if options.scale_rewards is not None and options.scale_rewards not in known:
        expected = f"expected one of {', '.join(known)}" if known else "it divides by no deviation of rewards"
        raise InputError(f"scale_rewards: the advantages are {estimator}'s, {expected}, got {options.scale_rewards}")
    if estimator != "gae":
        for spec in dataclasses.fields(RolloutOptions):
            if spec.name in OF_CRITIC and getattr(options, spec.name) != spec.default:
                raise InputError(f"{spec.name}: the advantages are {estimator}'s, without a value function; expected "
                                 "advantage_estimator gae beside it")  # fmt: skip


def require_sampled(options: TrainOptions, components: Sequence[ComponentOptions]) -> None:
    """Raises InputError for options of rollouts that no component, or not the one that has them, would read.

    Args:
        options: the run's, which components that sample may share with others.
        components: of the run.
    """
    shared = any(component.options.samples for component in components)
    for component in components:
        if component.options.samples:
            continue
        for spec in dataclasses.fields(RolloutOptions):
            value = getattr(component.options, spec.name)
            if spec.name == "on_policy" or value == spec.default or (shared and value == getattr(options, spec.name)):
                continue
            with component.blamed():
                why = "on_policy is false" if component.options.on_policy is False else "reward_funcs are not named"
                raise InputError(f"{spec.name}: nothing is sampled, as {why}")


def micro_batches(options: TrainOptions) -> int:
    """Micro-batches of a round in a process."""
    return options.steps_per_generation or options.gradient_accumulation_steps


def round_sizes(options: TrainOptions, loss: Loss) -> tuple[int, int]:
    """Prompts of a round in a process, and updates of one pass over it.

    Raises:
        InputError: sizes that do not divide one another, so that a group, or an update, would be cut.
    """
    batch, group = options.per_device_train_batch_size, options.num_generations
    accumulation, sampled = options.gradient_accumulation_steps, micro_batches(options)
    if sampled % accumulation:
        raise InputError(f"steps_per_generation must be a multiple of gradient_accumulation_steps={accumulation}, got "
                         f"{sampled}")  # fmt: skip
    if batch * sampled % group:
        raise InputError(
            f"per_device_train_batch_size * steps_per_generation = {batch} * {sampled} completions are no whole groups "
            f"of num_generations={group}"
        )
    if TOGETHER in loss.inputs and batch % group:
        raise InputError(f"{loss.name} compares a group within a batch: per_device_train_batch_size={batch} must be a "
                         f"multiple of num_generations={group}")  # fmt: skip
    return batch * sampled // group, sampled // accumulation


def make_rounds(
    options: TrainOptions,
    loss: Loss,
    world: World,
    *,
    model: Any,
    tokenizer: Any,
    source: str,
    prompts: Prompts,
    loader: Loader,
    answer_end: str,
) -> Rounds:
    """The rounds of one component, of which `check_options` takes the options.

    Args:
        model: the trained model.
        source: where it came from, for a value function.
        prompts: its data.
        loader: how sequences become batches.
        answer_end: the token with which the chat template ends an answer, or "".

    Raises:
        InputError: a reward function or a value function that cannot be loaded, or a model that cannot sample.
    """
    groups, updates = round_sizes(options, loss)
    bf16 = computes_in_bf16(options, world.device)
    sampling = sampling_of(options)
    estimator = estimator_of(loss, options.advantage_estimator)
    schedule = Schedule(shows(loss), options.demonstration_schedule or {})
    schedule.confirm()
    judge = None
    if options.reward_funcs is not None:
        judge = Judge(tuple(load_rewards(options.reward_funcs, Path.cwd())), options.reward_weights)
    critic = None
    if judge is not None and estimator == "gae":
        critic = load_critic(source, options.model_revision, options, world, bf16=bf16)
    generator = make_generator(options, world, model, tokenizer, loader.pad_token, answer_end, bf16=bf16)
    correction = correction_of(options, loss, sampling, served=options.use_vllm)
    if correction != "none":
        _require_known_draws(generator, sampling)
    settings = RoundSettings(
        tokenizer=tokenizer,
        generator=generator,
        sampling=sampling,
        judge=judge,
        schedule=schedule,
        estimator=estimator,
        scale=scale_of(loss, options.scale_rewards),
        correction=correction,
        critic=critic,
        groups=groups,
        updates=updates,
        passes=options.num_iterations,
    )
    return Rounds(prompts, loader, settings)


def _require_known_draws(generator: TextGenerator, sampling: Sampling) -> None:
    """Raises InputError for a server that does not say what its tokens were drawn from, which is to be corrected."""
    told = getattr(generator, "processed", True) or (sampling.temperature == 1 and not sampling.cuts)
    if not told:
        raise InputError(
            "use_vllm: the server gives log-probabilities of undivided logits, and not of what it draws from at this "
            "temperature, top_p, top_k and min_p; start it with --logprobs-mode processed_logprobs, or set "
            "importance_sampling to none"
        )


def sampling_of(options: TrainOptions) -> Sampling:
    """How completions are drawn."""
    return Sampling(
        max_tokens=options.max_completion_length,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
    )


def make_generator(
    options: TrainOptions, world: World, model: Any, tokenizer: Any, pad_token: int, answer_end: str, *, bf16: bool
) -> TextGenerator:
    """What samples: the model in this process, or a server.

    Raises:
        InputError: the model could draw tokens that it cannot read, or there is no such server.
    """
    if head_rows(model) > embedding_rows(model):
        raise InputError(
            f"{options.model_name_or_path}: the head has {head_rows(model)} rows and the embedding "
            f"{embedding_rows(model)}, so that tokens may be drawn that cannot be read"
        )
    ends = ends_of(model, tokenizer, answer_end)
    if options.use_vllm:
        folder = (
            Path(options.output_dir) / "vllm" if options.vllm_weights_dir is None else Path(options.vllm_weights_dir)
        )
        return ServerTextGenerator(
            options.vllm_server_base_url,
            end_ids=ends,
            vocabulary=embedding_rows(model),
            folder=folder.absolute(),
            world=world,
            model_name=options.vllm_server_model,
            start_timeout=options.vllm_server_timeout,
            timeout=options.vllm_request_timeout,
            requests=options.vllm_server_requests,
        )
    # evaluation may ask for any number of completions, and gets no more memory than a round
    size = options.per_device_generation_batch_size or options.per_device_train_batch_size * micro_batches(options)
    return ModelTextGenerator(model, pad_token=pad_token, ends=ends, bf16=bf16, batch_size=size)
