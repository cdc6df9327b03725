"""Measures the tail-corrected backward on SmolLM2 and real text; docs/tail-corrected.md reads what it writes.

python -m benchmarks.tail_report curves      share kept, error with and without correction
python -m benchmarks.tail_report orders      of the vocabulary, on tokens that they were not made from
python -m benchmarks.tail_report times       against the three GEMMs and the exact methods, in turns
python -m benchmarks.tail_report finetune    loss curves with it and without; resumes after the last finished run
python -m benchmarks.tail_report plots       the PNG and the tables beside the JSON, from whatever is in it

`--work` keeps the model, hidden states and the fine-tuned model (runs/tail). `--model` measures another folder's model
than SmolLM2 as it comes, such as WORK/finetuned after `finetune`; `--label` names it in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import logitless
from logitless import linear_logprobs, linear_token_loss
from logitless.backends import tail
from logitless.types import TokenStats

from . import environment, tail_data, tail_orders
from .tail_data import Sample

RESULTS = Path(__file__).resolve().parent / "results" / "tail.json"
TOLERANCES = tuple(2.0**-k for k in range(7, 16))
Json = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Curves: what is kept, and how far off the gradients are


def relative(error: Tensor, exact: Tensor) -> float:
    return float(error.norm() / exact.norm())


class Exact:
    """The mean NLL's gradients on few tokens, from full logits."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        z = sample.hidden @ sample.weight.T
        self.p = z.sub_(z.logsumexp(-1, keepdim=True)).exp_()
        self.rows = torch.arange(len(sample.targets))
        self.loss = float(-self.p[self.rows, sample.targets].log().mean())
        gradient = self._matrix()
        self.d_hidden, self.d_weight = gradient @ sample.weight, gradient.T @ sample.hidden

    def _matrix(self) -> Tensor:
        matrix = self.p.clone()
        matrix[self.rows, self.sample.targets] -= 1
        return matrix

    def errors(self, error: Tensor) -> list[float]:
        """Relative, of d hidden and d weight, where the logits' gradient is off by `error [N, V]`."""
        hidden, weight, _ = self.sample
        return [relative(error @ weight, self.d_hidden), relative(error.T @ hidden, self.d_weight)]

    def of_bfloat16(self) -> list[float]:
        """Of an exact backward whose operands and results are bfloat16."""
        matrix, hidden, weight = (x.bfloat16().float() for x in (self._matrix(), *self.sample[:2]))
        found = ((matrix @ weight).bfloat16().float(), (matrix.T @ hidden).bfloat16().float())
        return [relative(x - y, y) for x, y in zip(found, (self.d_hidden, self.d_weight), strict=True)]

    def entries(self, threshold: float) -> Tensor:
        """Mask of the entries kept."""
        keep = self.p >= threshold
        keep[self.rows, self.sample.targets] = True
        return keep

    def whole_blocks(self, tolerance: float, block: int) -> Tensor:
        """Mask by the rule that keeps blocks of `block` entries by their mass."""
        count = -(-self.p.shape[1] // block)
        padded = F.pad(self.p, (0, count * block - self.p.shape[1])).view(len(self.p), count, block)
        keep = padded.sum(-1) >= tolerance
        keep[self.rows, self.sample.targets // block] = True
        return keep.repeat_interleave(block, 1)[:, : self.p.shape[1]]

    def left(self, keep: Tensor, block: int | None) -> Tensor:
        """What a mask leaves, less its block means (None: nothing is put back)."""
        rest = torch.where(keep, 0, self.p)
        if block is None:
            return rest
        count = -(-rest.shape[1] // block)
        means = F.pad(rest, (0, count * block - rest.shape[1])).view(len(rest), count, block).sum(-1) / block
        return rest.sub_(means.repeat_interleave(block, 1)[:, : rest.shape[1]])


def curves(sample: Sample) -> Json:
    """Both rules, corrected and not, at every tolerance."""
    exact = Exact(sample)
    points = []
    for tolerance in TOLERANCES:
        entries, blocks = exact.entries(tolerance / tail.SHARE), exact.whole_blocks(tolerance, 64)
        points.append(
            {
                "tolerance": tolerance,
                "kept": float(entries.float().mean()),
                "tail_mass": float(torch.where(entries, 0, exact.p).sum(-1).mean()),
                "corrected": exact.errors(exact.left(entries, tail.BLOCK)),
                "dropped": exact.errors(exact.left(entries, None)),
                "blocks_kept": float(blocks.float().mean()),
                "blocks_corrected": exact.errors(exact.left(blocks, 64)),
            }
        )
    return {"loss": exact.loss, "tokens": len(sample.targets), "bfloat16": exact.of_bfloat16(), "points": points}


# ---------------------------------------------------------------------------------------------------------------------
# Times


def nll(stats: TokenStats) -> Tensor:
    assert stats.logprob is not None
    return -stats.logprob


def gradients(sample: Sample, loss: Callable[..., Tensor], *, frozen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, d hidden and d weight of one step."""
    hidden, weight = sample.hidden.detach().requires_grad_(), sample.weight.detach().requires_grad_(not frozen)
    hidden.grad = weight.grad = None
    value = loss(hidden, weight, sample.targets)
    value.backward()
    empty = torch.empty(0)
    return value.detach(), empty if hidden.grad is None else hidden.grad, empty if weight.grad is None else weight.grad


def three_gemms(sample: Sample, *, frozen: bool = False, tokens: int = 160) -> None:
    """The products of an exact single pass, in its chunks and its layout, and nothing else."""
    hidden, weight, _ = sample
    buffer = torch.empty(len(weight) * tokens)
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), tokens):
        x = hidden[start : start + tokens]
        z = buffer[: len(weight) * len(x)].view(len(weight), len(x))
        torch.mm(weight, x.T, out=z)
        torch.mm(z.T, weight, out=d_hidden[start : start + tokens])
        if not frozen:
            d_weight.addmm_(z, x)


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)


def by_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """Any loss on top of the log-probs; here the mean."""
    logprob = linear_logprobs(hidden, weight, targets, **options).logprob
    assert logprob is not None
    return -logprob.mean()


def methods(sample: Sample, order: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; "ordered" has the vocabulary in `order`."""

    def single(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return linear_token_loss(hidden, weight, targets, nll, **options)

    def by(strategy: str, k: int, *, ordered: bool = False) -> Json:
        options: Json = {"backward": strategy.replace("-", "_"), "tail_tolerance": 2.0**-k}
        return options | ({"vocabulary_order": order} if ordered else {})

    half = Sample(sample.hidden.bfloat16(), sample.weight.bfloat16(), sample.targets)
    found: dict[str, Callable[[], Any]] = {
        "three GEMMs": partial(three_gemms, sample),
        "materialised": partial(gradients, sample, materialised),
        "single pass": partial(gradients, sample, single),
        "log-probs, recompute": partial(gradients, sample, by_logprobs),
        "frozen head, two GEMMs": partial(three_gemms, sample, frozen=True),
        "frozen head, single pass": partial(gradients, sample, single, frozen=True),
        "bfloat16, single pass": partial(gradients, half, single),
    }
    for name, tolerances in (("tail-corrected", (10, 12, 13)), ("screened", (9, 10, 12, 13))):
        for k in tolerances:
            found[f"{name} 2^-{k}"] = partial(gradients, sample, partial(single, **by(name, k)))
        found[f"{name} 2^-10, ordered"] = partial(gradients, sample, partial(single, **by(name, 10, ordered=True)))
        found[f"log-probs, {name} 2^-12"] = partial(gradients, sample, partial(by_logprobs, **by(name, 12)))
        found[f"frozen head, {name} 2^-12"] = partial(gradients, sample, partial(single, **by(name, 12)), frozen=True)
        found[f"bfloat16, {name} 2^-12"] = partial(gradients, half, partial(single, **by(name, 12)))
    return found


def flat_methods(sample: Sample, order: Tensor) -> dict[str, Callable[[], Any]]:
    """An untrained model's near-uniform distributions: the exact path, found out."""
    flat = Sample(0.1 * sample.hidden, sample.weight, sample.targets)
    made = methods(flat, order)
    return {name: made[name] for name in ("three GEMMs", "single pass", "tail-corrected 2^-12", "screened 2^-12")}


def times(made: dict[str, Callable[[], Any]], rounds: int) -> Json:
    """Seconds of every method in turns, errors against the single pass in float32, and what was left."""
    for name in ("three GEMMs", "single pass"):
        made[name]()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in made}
    outcomes: Json = {}
    for turn in range(rounds):
        for name in list(made)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            outcomes[name] = made[name]()
            seconds[name].append(time.perf_counter() - start)
    found: Json = {}
    for name, run in made.items():
        found[name] = {"seconds": seconds[name], "cpu_seconds": _cpu_seconds(run)}
        if outcomes[name] is not None:
            found[name]["errors"] = _errors(outcomes[name], outcomes["single pass"])
        if "2^-" in name:
            with logitless.tail_report() as report:
                run()
            found[name] |= {
                "kept": report.kept / max(1, report.entries),
                "tail_mass": float(report.tail_mass.mean()),
                "exact_tokens": report.exact_tokens,
            }
    return found


def _cpu_seconds(run: Callable[[], Any]) -> float:
    """Of the whole process, once: what a busy machine does not change much."""
    start = time.process_time()
    run()
    return time.process_time() - start


def _errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Of the loss (absolute), d hidden and d weight (relative, where there is one)."""
    loss = float((found[0].float() - exact[0]).abs())
    pairs = zip(found[1:], exact[1:], strict=True)
    return [loss, *(relative(x.float() - y, y) for x, y in pairs if len(x))]


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning


def finetune(folder: Path, seed: int, options: Json, settings: argparse.Namespace, save: Path | None) -> list[float]:
    """Losses of AdamW on the docstrings; the seed orders the sequences."""
    torch.manual_seed(seed)
    model, tokenizer = tail_data.load(folder)
    ids = tail_data.sequences(tokenizer, tail_data.docstrings(held_out=False), settings.length)
    order = torch.cat([torch.randperm(len(ids)) for _ in range(1 + settings.steps * settings.batch // len(ids))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    losses = []
    for step in range(settings.steps):
        batch = ids[order[step * settings.batch : (step + 1) * settings.batch]]
        hidden = model.model(batch[:, :-1])[0]
        loss = linear_token_loss(hidden, model.get_output_embeddings().weight, batch[:, 1:], nll, **options)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (step + 1) / 20) * (1 - step / settings.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 10 == 0:
            print(f"seed {seed} {options.get('backward', 'exact')} step {step} loss {losses[-1]:.4f}", flush=True)
    if save is not None:
        model.save_pretrained(save)
        tokenizer.save_pretrained(save)
    return losses


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def update(path: Path, keys: Sequence[str], value: Any) -> None:
    """Puts a result into the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    place = results
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = value
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial_path, path)


def run_curves(given: argparse.Namespace, folder: Path) -> None:
    for text in given.texts:
        sample = tail_data.sample(folder, text, 4096, given.work / "hidden")
        chosen = torch.randperm(4096, generator=torch.Generator().manual_seed(0))[: given.tokens]
        few = Sample(sample.hidden[chosen], sample.weight, sample.targets[chosen])
        found = curves(few) | {"environment": environment.describe()}
        update(given.output, ["curves", given.label, text], found)
        print(f"{given.label} {text}: loss {found['loss']:.3f}", flush=True)


def run_orders(given: argparse.Namespace, folder: Path) -> None:
    """An order is made from other tokens of a text, from other texts, and from the model as it was at first."""
    first = tail_data.model_folder(given.work)
    for text in given.texts:
        whole = tail_data.sample(folder, text, 4096, given.work / "hidden")
        sample, others = tail_orders.split(whole, given.tokens)
        sources = {"another part": tail_orders.Source(whole.weight, others)}
        for name in tail_data.TEXTS:
            if name != text:
                other = tail_data.sample(folder, name, 4096, given.work / "hidden")
                sources[name] = tail_orders.Source(other.weight, other.hidden[: len(others)])
        if folder != first:
            before = tail_data.sample(first, text, 4096, given.work / "hidden")
            sources["another part, before"] = tail_orders.Source(before.weight, before.hidden[-len(others) :])
        found = tail_orders.measure(sample, sources, partial(print, f"{given.label} {text}", flush=True))
        update(given.output, ["orders", given.label, text], found | {"environment": environment.describe()})


def run_times(given: argparse.Namespace, folder: Path) -> None:
    for text in given.texts:
        sample = tail_data.sample(folder, text, given.tokens, given.work / "hidden")
        other = tail_data.sample(
            folder, next(name for name in tail_data.TEXTS if name != text), 4096, given.work / "hidden"
        )
        order = logitless.vocabulary_order(sample.weight, other.hidden)
        for part, make in (("times", methods), ("flat", flat_methods)):
            if part == "flat" and (text != given.texts[0] or given.methods):
                continue
            found = {"environment": environment.describe(), "tokens": given.tokens}
            wanted = ("three GEMMs", "single pass", *given.methods)
            made = {name: run for name, run in make(sample, order).items() if not given.methods or name in wanted}
            found["methods"] = times(made, given.rounds)
            update(given.output, [part, given.label, text], found)
            base = min(found["methods"]["three GEMMs"]["seconds"])
            for name, row in found["methods"].items():
                print(f"{part} {text} {name:36s} {min(row['seconds']) / base:.3f} {row.get('errors', '')}", flush=True)


def run_finetune(given: argparse.Namespace, folder: Path) -> None:
    done = json.loads(given.output.read_text()).get("finetune", {}).get("runs", {}) if given.output.exists() else {}
    about = {name: getattr(given, name) for name in ("steps", "batch", "length", "lr")}
    update(given.output, ["finetune", "settings"], about | {"environment": environment.describe()})
    for seed in given.seeds:
        for name, options in (("exact", {}), ("tail-corrected", {"backward": "tail_corrected"})):
            key = f"{name}, seed {seed}"
            if len(done.get(key, ())) != given.steps:
                save = given.work / "finetuned" if name == "tail-corrected" and seed == given.seeds[0] else None
                update(given.output, ["finetune", "runs", key], finetune(folder, seed, options, given, save))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=("curves", "orders", "times", "finetune", "plots"))
    add("--work", type=Path, default=Path("runs/tail"))
    add("--model", type=Path, help="folder of a Transformers model (default: SmolLM2)")
    add("--label", default="as released", help="its name in the results")
    add("--texts", nargs="+", choices=list(tail_data.TEXTS), default=list(tail_data.TEXTS))
    add("--tokens", type=int, help="of each text (default 1024, 4096 for times)")
    add("--rounds", type=int, default=4)
    add("--methods", nargs="+", default=[], help="of times: these, the three GEMMs and the single pass")
    add("--steps", type=int, default=300)
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--batch", type=int, default=2, help="sequences of a step")
    add("--length", type=int, default=128, help="tokens of a sequence")
    add("--lr", type=float, default=5e-5)
    add("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    given.tokens = given.tokens or {"times": 4096}.get(given.command, 1024)
    if given.command == "plots":
        from . import tail_plots

        results = json.loads(given.output.read_text())
        given.output.with_suffix(".md").write_text(tail_plots.markdown(results))
        return tail_plots.draw(results, given.output.with_suffix(".png"))
    folder = given.model or tail_data.model_folder(given.work)
    runs = {"curves": run_curves, "orders": run_orders, "times": run_times, "finetune": run_finetune}
    runs[given.command](given, folder)


if __name__ == "__main__":
    main()
