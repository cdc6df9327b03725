"""The training loop behind `logitless train`; needs the `train` extra (Transformers and friends).

    options     config, other_names, mixture, errors
    rows        data, formats, arrow_json          a file, folder or hub dataset, row by row with its place
                forms, turns                       one form of row, one form of turn
                template, template_date, chat      the chat template
                marks, conversation                where answers stand in what it writes
                tokens, columns, examples, render  tokens, labels, inputs of the loss
    batches     collate, loader, sampler
    model       places, settings, model, adapters, subsets, optimizer, checks
    loss        inputs, estimates, reference_model, objective, evaluation
    run         run (everything put together), trainer (the loop), resume, checkpoint, files, metrics
    processes   parallel, sharding                 this one among others, and its part of the model
    teach       teachers, teach, openai_server
    extrapolate                                    a model from two others
    rollouts/   generation, model_generator, server       what samples completions
                prompts, groups, rollout, rewards, inputs, advantages, critic   of a round
                rounds, setup, evaluation, summary, log   rounds, made from options, and what is said of them
    reward      implicit_reward (its __init__ lists its files), statistics, document
    evaluate/   (its __init__ lists its files); frozen, right, row_files, tables   what commands that only ask share
    critical_tokens, seeds                         rows of which critical tokens count; one run a seed

`render` is the way from a row to its tokens, `run` the one from options to the first step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from logitless.training.config import METHODS, TrainOptions
from logitless.training.errors import InputError, NonFiniteLossError

if TYPE_CHECKING:
    from logitless.training.trainer import TrainResult, train

__all__ = ["METHODS", "InputError", "NonFiniteLossError", "TrainOptions", "TrainResult", "train"]


def __getattr__(name: str) -> Any:
    """Loads the loop, and with it the optional packages, on first use: options and help need neither."""
    if name not in ("TrainResult", "train"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from logitless.training import trainer

    return getattr(trainer, name)
