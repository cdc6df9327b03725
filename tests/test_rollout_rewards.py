"""Reward functions of a rollout: found by name, called as TRL calls them, results checked and summed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import math
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from logitless import rewards as shipped
from logitless.training.errors import InputError
from logitless.training.rollouts.rewards import (
    Reward,
    Scores,
    is_asynchronous,
    load_reward,
    load_rewards,
    score_completions,
)

ORIGINS = ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]


def scores(*functions: Any, weights: list[float] | None = None, count: int = 3, **columns: list[Any]) -> Scores:
    """Scores of three completions under functions that are named r0, r1, ..."""
    rewards = [Reward(f"r{number}", function) for number, function in enumerate(functions)]
    texts = ["short", "a longer one", "<think>a</think>b"][:count]
    ids = [torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1, 2, 3, 4]), []][:count]
    return score_completions(rewards, weights, ["p"] * count, texts, ids, columns, ORIGINS[:count])  # type: ignore[arg-type]


# Loading


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the configuration, beside the current one, with a file of reward functions in each."""
    (tmp_path / "config").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    body = "from dataclasses import dataclass\n\nLEVEL = {level}\nnot_one = 3\nclass Some: ...\n\n"
    body += "def reward(completions, base=0, **columns):\n    return [base + LEVEL for _ in completions]\n"
    (tmp_path / "config" / "mine.py").write_text(body.format(level=1))
    (tmp_path / "here" / "mine.py").write_text(body.format(level=2))
    (tmp_path / "here" / "only_here.py").write_text(body.format(level=3))
    (tmp_path / "here" / "broken.py").write_text("import no_such_package\n")
    (tmp_path / "here" / "wrong.py").write_text("x = 1 +\n")
    return tmp_path / "config"


def test_a_function_of_a_module() -> None:
    name, function = load_reward("logitless.rewards:think_format")
    assert (name, function) == ("think_format", shipped.think_format)


def test_a_function_of_a_file(folder: Path) -> None:
    for spec, within, level in (
        ("mine.py:reward", folder, 1),
        ("mine.py:reward", None, 2),
        ("only_here.py:reward", folder, 3),
        (f"{folder}/mine.py:reward", None, 1),
        ("../config/mine.py:reward", None, 1),
    ):
        loaded = load_reward(spec, within)
        assert loaded.name == "reward" and loaded.function(["a"]) == [level]
    one, again = load_reward("mine.py:reward"), load_reward("./mine.py:reward")
    assert one.function is again.function


def test_arguments_of_a_function(folder: Path) -> None:
    loaded = load_reward({"function": "mine.py:reward", "base": 10}, folder)
    assert loaded.name == "reward" and loaded.function(["a"]) == [11]
    found = load_rewards(["mine.py:reward", {"function": "mine.py:reward", "base": 5}, "mine.py:reward"], folder)
    assert [reward.name for reward in found] == ["reward", "reward_2", "reward_3"]
    assert [reward.function([""]) for reward in found] == [[1], [6], [1]]
    assert load_rewards("mine.py:reward", folder)[0].name == "reward"
    assert load_rewards({"function": "mine.py:reward"}, folder)[0].name == "reward"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("think_format", "expected MODULE:FUNCTION or path/to/FILE.py:FUNCTION, .* got 'think_format'"),
        ("", "expected MODULE:FUNCTION"),
        ("a:b c", "got 'a:b c'"),
        (3, "got 3"),
        ({"weight": 1.0}, r"expected MODULE:FUNCTION .* got \{'weight': 1.0\}"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("logitless.no_such:f", r"there is no module 'logitless\.no_such'"),
        ("only_here:reward", r"no module 'only_here'; for .*only_here\.py, write only_here\.py:\.\.\."),
        ("none.py:reward", r"none\.py:reward: no such file \(looked for .*config/none\.py, .*here/none\.py\)"),
        ("mine.py:rewrad", r"mine\.py has no 'rewrad' \(nearest: reward"),
        ("logitless.rewards:think_fromat", r"has no 'think_fromat' \(nearest: think_format"),
        ("mine.py:not_one", "expected a function, got int 'not_one'"),
        ("mine.py:Some", "expected a function, got type 'Some'"),
        ("broken.py:f", r"it fails to load: ModuleNotFoundError: No module named 'no_such_package' \(.*broken\.py:1\)"),
        ("wrong.py:f", "it fails to load: SyntaxError"),
    ],
)
def test_a_wrong_name_is_refused(folder: Path, spec: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"reward_funcs: .*{message}"):
        load_reward(spec, folder)


def test_a_module_whose_own_import_fails_is_not_called_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder.parent / "here"))
    with pytest.raises(InputError, match=r"broken:f: it fails to load: .*'no_such_package' \(.*broken\.py:1\)"):
        load_reward("broken:f", folder)
    sys.modules.pop("broken", None)


def test_no_reward_at_all() -> None:
    with pytest.raises(InputError, match=r"reward_funcs: expected .*, got none"):
        load_rewards([])


# Scoring


def test_functions_get_what_trl_gives_them() -> None:
    seen: dict[str, Any] = {}

    def reward(
        prompts: Any, completions: Any, completion_ids: Any, answer: Any, trainer_state: Any, **rest: Any
    ) -> Any:
        seen.update(rest, prompts=prompts, completions=completions, ids=completion_ids, answer=answer)
        seen["state"] = trainer_state
        return [0.0, 1.0, 2.0]

    state = object()
    columns = {"prompt": ["x"] * 3, "completion": ["y"] * 3, "answer": (1, 2, 3)}
    texts = ["a", "b", "c"]
    ids = [torch.tensor([1]), [2], torch.tensor([], dtype=torch.int32)]
    found = score_completions([Reward("r", reward)], None, texts, texts, ids, columns, ORIGINS, state)  # type: ignore[arg-type]
    assert {*seen} == {"prompts", "completions", "ids", "answer", "state", "log_extra", "log_metric"}
    assert seen["ids"] == [[1], [2], []] and seen["answer"] == [1, 2, 3] and seen["state"] is state
    assert found.total.tolist() == [0.0, 1.0, 2.0] and found.total.dtype == torch.float32


def test_sums_are_weighted_and_leave_out_what_does_not_apply() -> None:
    found = scores(lambda **_: [1, None, None], lambda **_: [True, 0.5, None], weights=[2.0, -1.0])
    assert found.total[:2].tolist() == [1.0, -0.5] and found.total[2].isnan()
    assert found.parts["r0"].isnan().tolist() == [False, True, True]
    assert found.parts["r1"][:2].tolist() == [1.0, 0.5]


def test_total_is_trls() -> None:
    """TRL's formula: a sum that skips NaN, and NaN where nothing but NaN is."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(5, 40, generator=draw)
    values[torch.rand(5, 40, generator=draw) < 0.6] = math.nan
    weights = torch.randn(5, generator=draw)
    functions = [
        functools.partial(lambda row, **_: [None if math.isnan(value) else value for value in row.tolist()], row)
        for row in values
    ]
    rewards = [Reward(str(number), function) for number, function in enumerate(functions)]
    found = score_completions(rewards, weights.tolist(), [""] * 40, [""] * 40, [[]] * 40, {}, [""] * 40)
    expected = (values.T * weights).nansum(dim=1)
    expected[values.isnan().all(0)] = math.nan
    assert expected.isnan().any() and not expected.isnan().all()
    torch.testing.assert_close(found.total, expected, equal_nan=True)


def test_results_may_be_tensors_arrays_and_scalars_of_theirs() -> None:
    numpy = pytest.importorskip("numpy")
    found = scores(
        lambda **_: torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        lambda **_: numpy.array([1.0, 2.0, 3.0]),
        lambda **_: (torch.tensor(1), numpy.float32(2.0), numpy.bool_(True)),
        lambda completions, **_: (float(number) for number, _ in enumerate(completions)),
    )
    assert found.total.tolist() == [3.0, 7.0, 9.0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "got NoneType None"),
        (1.0, "got float 1.0"),
        ("abc", "got str 'abc'"),
        ({1: 2, 3: 4, 5: 6}, "got dict"),
        (torch.tensor(1.0), "got Tensor"),
        ([1.0, 2.0], "got 2 values"),
        ([1.0, math.nan, 0.0], r"got nan for a completion of rows\.jsonl:2"),
        ([1.0, 0.0, -math.inf], r"got -inf for a completion of rows\.jsonl:3"),
        ([torch.tensor(math.inf), 0.0, 0.0], r"got tensor\(inf\) for a completion of rows\.jsonl:1"),
        ([1.0, "1", 0.0], r"got '1' for a completion of rows\.jsonl:2"),
        ([1.0, [1.0], 0.0], r"got \[1\.0\] for a completion of rows\.jsonl:2"),
        (torch.ones(3, 1), r"got tensor\(\[1\.\]\) for a completion of rows\.jsonl:1"),
    ],
)
def test_a_wrong_result_is_refused(result: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"reward r0: expected a list of 3 finite numbers or None, {message}"):
        scores(lambda **_: result)


def test_a_failure_names_function_row_and_line() -> None:
    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [1 / (len(text) - len("a longer one")) for text in completions]

    with pytest.raises(InputError) as caught:
        scores(lambda **_: [1, 1, 1], reward)
    assert "reward r1 failed on a completion of rows.jsonl:2: ZeroDivisionError: " in str(caught.value)
    assert f"({__file__}:" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_failure_of_no_row_alone() -> None:
    def reward(completions: list[str], **columns: Any) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(InputError, match=r"reward r0 failed: RuntimeError: too many"):
        scores(reward)


def test_a_function_that_does_not_take_the_columns() -> None:
    with pytest.raises(InputError, match=r"unexpected keyword argument .*a reward function ends in \*\*columns"):
        scores(lambda prompts, completions: [0.0] * 3)


def test_names_and_weights_are_checked() -> None:
    one = Reward("r", lambda **_: [0.0])
    call = functools.partial(score_completions, prompts=[""], completions=[""], completion_ids=[[]], origins=["f:1"])
    with pytest.raises(InputError, match="names of their own, got 'r' twice"):
        call([one, one], None, columns={})
    with pytest.raises(InputError, match="reward_weights: expected 1, one for each of reward_funcs, got 2"):
        call([one], [1.0, 2.0], columns={})
    with pytest.raises(InputError, match="reward_weights: expected a finite number for r, got nan"):
        call([one], [math.nan], columns={})
    for name in ("prompts", "completion_ids", "trainer_state", "log_metric"):
        with pytest.raises(InputError, match=f"the data has a column '{name}'"):
            call([one], None, columns={name: [1]})
    bound = Reward("p", functools.partial(shipped.pattern_format, pattern="a"))
    with pytest.raises(InputError, match="reward p: 'pattern' is an argument of the function and a column of the data"):
        call([bound], None, columns={"pattern": ["b"]})


def test_what_functions_log_is_kept() -> None:
    def reward(completions: list[str], log_extra: Any = None, log_metric: Any = None, **columns: Any) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        log_metric("mean_length", 4)
        log_metric("mean_length", torch.tensor(6.0))
        return [0.0] * len(completions)

    found = scores(reward)
    assert found.metrics == {"mean_length": 5.0} and found.extra == {"length": [5, 12, 17]}


def test_asynchronous_functions_run_side_by_side_and_on_one_loop() -> None:
    meeting: dict[str, asyncio.Event] = {}
    loops = set()

    async def first(completions: list[str], **columns: Any) -> list[float]:
        loops.add(asyncio.get_running_loop())
        meeting["event"] = asyncio.Event()
        await asyncio.wait_for(meeting["event"].wait(), timeout=10)
        return [1.0] * len(completions)

    class Second:
        async def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
            await asyncio.sleep(0)
            meeting["event"].set()
            return [2.0, None, 2.0]

    assert is_asynchronous(functools.partial(first)) and is_asynchronous(Second())
    assert not is_asynchronous(shipped.exact_match)
    for _ in range(2):
        found = scores(first, lambda **_: [4, 4, 4], Second())
        assert list(found.parts) == ["r0", "r1", "r2"] and found.total.tolist() == [7.0, 5.0, 7.0]
    assert len(loops) == 1


def test_a_failure_of_an_asynchronous_function() -> None:
    async def reward(completions: list[str], **columns: Any) -> list[float]:
        await asyncio.sleep(0)
        return [{"short": 1.0, "a longer one": 2.0}[text] for text in completions]

    with pytest.raises(InputError, match=r"reward r1 failed on a completion of rows\.jsonl:3: KeyError"):
        scores(lambda **_: [0, 0, 0], reward)


def test_no_completions() -> None:
    found = scores(lambda completions, **_: [1.0 for _ in completions], count=0)
    assert found.total.shape == (0,) and found.parts["r0"].shape == (0,)


# TRL's


def test_trls_own_functions_run() -> None:
    trl_rewards = pytest.importorskip("trl.rewards")
    found = load_rewards(["trl.rewards:think_format_reward", "logitless.rewards:think_format"])
    found += [
        Reward("overlong", trl_rewards.get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)),
        Reward("repetition", trl_rewards.get_repetition_penalty_reward(ngram_size=1)),
    ]
    turns = [[{"role": "assistant", "content": text}] for text in ("<think>a</think>b", "c")]
    prompts = [[{"role": "user", "content": "q"}]] * 2
    result = score_completions(
        found, [1, 1, 1, 1], prompts, turns, [[1, 1], [1, 2, 3]], {"answer": ["b"] * 2}, ["f:1", "f:2"]
    )
    assert [part.tolist() for part in result.parts.values()] == [[1, 0], [1, 0], [0, -0.5], [-0.5, 0]]
    assert result.total.tolist() == [1.5, -0.5]


def test_rewards_under_trls_trainer_are_those_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """`GRPOTrainer` itself calls synchronous and asynchronous functions, ours and a user's, on rows of its data."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    monkeypatch.setattr(trainer, "profiling_context", lambda *_: contextlib.nullcontext())

    async def asynchronous(completions: list[Any], trainer_state: Any, **columns: Any) -> list[float | None]:
        return [None] + [0.25 * trainer_state] * (len(completions) - 1)

    rewards = [
        *load_rewards(
            ["logitless.rewards:exact_match", "logitless.rewards:think_format", "logitless.rewards:repetition_penalty"]
        ),
        load_reward(
            {"function": "logitless.rewards:soft_overlong_punishment", "max_completion_len": 4, "soft_punish_cache": 2}
        ),
        Reward("asynchronous", asynchronous),
    ]
    turns = [[{"role": "assistant", "content": text}] for text in ("Answer: 4", "<think></think>5", "")]
    prompts, ids = [[{"role": "user", "content": "q"}]] * 3, [[1, 2, 3], [1, 1, 1, 1, 1], []]
    columns = {"answer": ["4", None, "5"]}
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        stand_in = SimpleNamespace(
            accelerator=SimpleNamespace(device=torch.device("cpu")),
            reward_funcs=[reward.function for reward in rewards],
            reward_func_names=[reward.name for reward in rewards],
            reward_processing_classes=[None] * len(rewards),
            environments=None,
            state=2,
            async_loop=loop,
            _log_completion_extra=None,
            _log_metric=None,
        )
        inputs = [
            {"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, columns["answer"], strict=True)
        ]
        call = inspect.unwrap(trainer.GRPOTrainer._calculate_rewards)
        theirs = call(stand_in, inputs, prompts, turns, ids)
        loop.call_soon_threadsafe(loop.stop)
        while loop.is_running():
            time.sleep(0.001)
    found = score_completions(rewards, None, prompts, turns, ids, columns, ORIGINS, trainer_state=2)
    torch.testing.assert_close(torch.stack(list(found.parts.values()), 1), theirs, equal_nan=True)
    assert theirs.isnan().sum() == 2 and theirs[0, 0] == 1.0 and theirs[1, 1] == 1.0 and theirs[2, 4] == 0.5


def test_trls_accuracy_and_ours_score_alike() -> None:
    pytest.importorskip("trl.rewards")
    pytest.importorskip("math_verify")
    found = load_rewards(["trl.rewards:accuracy_reward", "logitless.rewards:math_equal"])
    turns = [[{"role": "assistant", "content": text}] for text in (r"\boxed{0.5}", r"\boxed{2}")]
    columns = {"solution": [r"\frac{1}{2}"] * 2}
    result = score_completions(found, None, ["q"] * 2, turns, [[]] * 2, columns, ["f:1", "f:2"])
    assert [part.tolist() for part in result.parts.values()] == [[1, 0], [1, 0]]
    assert {*result.extra} == {"solution", "gold_parsed", "answer_parsed"}
