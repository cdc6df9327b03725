"""`logitless teach`: the columns are the teacher's full-logit top-k, from a model as from a server, and train."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from training_fixtures import completion_rows, make_model, make_options, make_tokenizer, write_jsonl
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from logitless import linear_loss, losses
from logitless.cli import TEACHER_OPTIONS, app
from logitless.training import InputError, TrainOptions, openai_server, teachers
from logitless.training.data import read_rows
from logitless.training.parallel import World
from logitless.training.run import prepare
from logitless.training.teach import write_teacher_columns
from logitless.training.trainer import take_step

K = 7
TOKENIZER = make_tokenizer()
COLUMNS = ("target_ids", "teacher_logprob", "teacher_tail")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that is far from uniform, so that the lists have an order."""
    return make_model(tmp_path_factory.mktemp("teacher"), tied=False, sharpness=30)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "rows.jsonl", completion_rows(6))


def options(teacher: str, data: str, **changes: Any) -> TrainOptions:
    return make_options(Path(data).parent / "run", teacher, data, **{"per_device_eval_batch_size": 4} | changes)


def taught(
    teacher: str, data: str, name: str = "taught.parquet", server: str | None = None, **changes: Any
) -> list[dict[str, Any]]:
    output = Path(data).parent / name
    write_teacher_columns(options(teacher, data, **changes), str(output), k=K, server=server)
    return [row.values for row in read_rows(str(output))]


def ids_of(row: dict[str, str]) -> tuple[list[int], int]:
    """All ids of a row of strings, and the place of the completion's first."""
    prompt = TOKENIZER(row["prompt"])["input_ids"]
    return [*prompt, *TOKENIZER(row["completion"])["input_ids"], TOKENIZER.eos_token_id], len(prompt)


@functools.lru_cache
def loaded(folder: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder)


def log_probs(teacher: str, ids: list[int]) -> torch.Tensor:
    """`[T, V]`: row t is about the token at t, the first row about none."""
    model = loaded(teacher)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return torch.cat([torch.full_like(logits[:1], torch.nan), logits.log_softmax(-1)[:-1]])


def assert_columns(values: dict[str, Any], expected: torch.Tensor) -> None:
    """The columns of a row, where `expected` `[n, V]` holds the log-probs of its tokens that count."""
    top = expected.topk(K)
    assert values["target_ids"] == top.indices.tolist()
    torch.testing.assert_close(torch.tensor(values["teacher_logprob"]).double(), top.values, atol=2e-5, rtol=0)
    tail = torch.log1p(-top.values.exp().sum(-1))
    torch.testing.assert_close(torch.tensor(values["teacher_tail"]).double(), tail, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["taught.parquet", "taught.jsonl"])
def test_the_columns_are_the_top_k_of_full_logits(teacher: str, data: str, name: str) -> None:
    found = taught(teacher, data, name)
    assert len(found) == 6
    for row, values in zip(completion_rows(6), found, strict=True):
        ids, start = ids_of(row)
        assert {key: values[key] for key in row} == row
        assert_columns(values, log_probs(teacher, ids)[start:])


def test_both_formats_hold_the_same(teacher: str, data: str) -> None:
    """JSON keeps every digit of a float32, so the rows are equal, and a written file can be taught again."""
    assert taught(teacher, data, "a.parquet") == taught(teacher, data, "a.jsonl")
    again = taught(teacher, str(Path(data).parent / "a.jsonl"), "a.jsonl")
    assert again == taught(teacher, data, "b.parquet")


def test_columns_under_other_names_are_read_and_written_as_they_are(teacher: str, data: str, tmp_path: Path) -> None:
    """So one file of options serves training on the taught file too."""
    rows = [{"ask": row["prompt"], "reply": row["completion"]} for row in completion_rows(6)]
    named = write_jsonl(tmp_path / "named.jsonl", rows)
    found = taught(teacher, named, column_map={"prompt": "ask", "completion": "reply"})
    assert [{key: values[key] for key in rows[0]} for values in found] == rows
    assert [values["target_ids"] for values in found] == [values["target_ids"] for values in taught(teacher, data)]


@pytest.mark.parametrize(("mode", "length"), [("keep_start", 11), ("keep_end", 4)])
def test_tokens_that_are_cut_have_empty_lists(teacher: str, data: str, mode: str, length: int) -> None:
    """The teacher reads what training reads: the row cut to max_length."""
    cut = {"max_length": length, "truncation_mode": mode}
    values = taught(teacher, data, **cut)[3]
    ids, start = ids_of(completion_rows(6)[3])
    begin = len(ids) - length if mode == "keep_end" else 0
    first, end = max(start, begin + 1), min(len(ids), begin + length)
    assert end - first < len(ids) - start and all(len(values[name]) == len(ids) - start for name in COLUMNS)
    assert [bool(part) for part in values["target_ids"]] == [first <= t < end for t in range(start, len(ids))]
    kept = {name: values[name][first - start : end - start] for name in COLUMNS}
    assert_columns(kept, log_probs(teacher, ids[begin:end])[first - begin :])
    path, world = str(Path(data).parent / "taught.parquet"), World(0, 1, torch.device("cpu"))
    assert prepare(options(teacher, path, method="top_k_distillation", **cut), world)
    with pytest.raises(InputError, match=r"taught.parquet, row \d: \d+ tokens that count list no target_ids"):
        prepare(options(teacher, path, method="top_k_distillation"), world)


def test_autocast_computes_as_in_a_run(teacher: str, data: str) -> None:
    """Under bfloat16 the log-probs are those of float32 within its rounding: several times 2^-9 of logits up to 15."""
    for ours, theirs in zip(taught(teacher, data), taught(teacher, data, bf16=True), strict=True):
        full, half = (torch.tensor(values["teacher_logprob"]) for values in (ours, theirs))
        assert not full.equal(half)
        torch.testing.assert_close(half[:, 0], full[:, 0], atol=0.3, rtol=0)


def test_rows_of_which_nothing_is_left_are_left_out(teacher: str, tmp_path: Path) -> None:
    rows = [{"prompt": "a long prompt " * 5, "completion": "x"}, {"prompt": "a", "completion": "b"}]
    (found,) = taught(teacher, write_jsonl(tmp_path / "rows.jsonl", rows), max_length=16)
    assert found["prompt"] == "a"


def test_texts_and_conversations(teacher: str, tmp_path: Path) -> None:
    """A text's first token is predicted from nothing; of a conversation the assistant's turns count."""
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}, {"text": "some text"}])
    found = taught(teacher, data, max_length=128)
    text = [*TOKENIZER("some text")["input_ids"], TOKENIZER.eos_token_id]
    assert found[1]["target_ids"][0] == [] and len(found[1]["target_ids"]) == len(text)
    assert_columns({name: found[1][name][1:] for name in COLUMNS}, log_probs(teacher, text)[1:])
    ids = TOKENIZER(TOKENIZER.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    answer = len(TOKENIZER("assistant<|im_end|>\n")["input_ids"])
    last = log_probs(teacher, ids)[-answer:]
    assert_columns({name: found[0][name][-answer:] for name in COLUMNS}, last)


@pytest.mark.parametrize("name", ["taught.parquet", "taught.jsonl"])
def test_training_on_the_file_is_the_loss_of_the_lists(teacher: str, data: str, tmp_path: Path, name: str) -> None:
    """The command's first loss equals `linear_loss` on the top-k of the teacher's full logits."""
    taught(teacher, data, name)
    student = make_model(tmp_path / "student")
    batch = {"per_device_train_batch_size": 6, "method": "top_k_distillation"}
    run = prepare(options(student, str(tmp_path / name), **batch), World(0, 1, torch.device("cpu")))
    model, hidden, top = LlamaForCausalLM.from_pretrained(student), [], []
    for row in completion_rows(6):
        ids, start = ids_of(row)
        hidden.append(model.model(torch.tensor([ids])).last_hidden_state[0, start - 1 : -1])
        top.append(log_probs(teacher, ids)[start:].topk(K))
    logprob = torch.cat([part.values for part in top]).float()
    own = linear_loss(
        losses.TopKDistillation(),
        torch.cat(hidden),
        model.lm_head.weight,
        torch.cat([part.indices for part in top]),
        teacher_logprob=logprob,
        teacher_tail=torch.log1p(-logprob.double().exp().sum(-1)).float(),
    )
    assert take_step(run, 0)["loss"] == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["taught.parquet", "taught.jsonl"])
def test_a_list_of_the_whole_vocabulary(teacher: str, data: str, tmp_path: Path, name: str) -> None:
    """Nothing is unlisted then: the tail is -inf, and the loss of the teacher itself is 0."""
    write_teacher_columns(options(teacher, data), str(tmp_path / name), k=258)
    batch = {"per_device_train_batch_size": 6, "method": "top_k_distillation"}
    run = prepare(options(teacher, str(tmp_path / name), **batch), World(0, 1, torch.device("cpu")))
    assert take_step(run, 0)["loss"] == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Servers


def given(prompt_logprobs: Any) -> Any:
    return {"choices": [{"index": 0, "text": "x", "prompt_logprobs": prompt_logprobs}]}


class Server:
    """A server with vLLM's form of answers, from full logits; `change` may spoil one, `statuses` come first."""

    def __init__(self, folder: str) -> None:
        self.folder, self.requests = folder, 0
        loaded(folder)  # now, as `from_pretrained` changes state that all threads share
        self.statuses: list[int] = []
        self.change: Any = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({"data": [{"id": "tiny"}]} if self.path == "/v1/models" else {})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests += 1
                assert self.path == "/v1/completions" and asked["model"] == "tiny" and asked["max_tokens"] == 1
                status = server.statuses.pop() if server.statuses else 200
                answer = server.answer(asked["prompt"], asked["prompt_logprobs"])
                self.answer({"error": "not now"} if status != 200 else answer, status)

            def answer(self, content: Any, status: int = 200) -> None:
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, prompt: list[int], k: int) -> Any:
        entries: list[Any] = [None]
        for token, row in zip(prompt[1:], log_probs(self.folder, prompt)[1:].float(), strict=True):
            rank = int((row >= row[token]).sum())
            top = row.topk(k)
            pairs = [(token, row[token].item(), rank)]
            pairs += list(zip(top.indices.tolist(), top.values.tolist(), range(1, k + 1), strict=True))
            entries.append({str(i): {"logprob": x, "rank": r, "decoded_token": "?"} for i, x, r in pairs})
        return given(entries) if self.change is None else self.change(entries)


@pytest.fixture
def server(teacher: str) -> Iterator[Server]:
    found = Server(teacher)
    yield found
    found.http.shutdown()
    found.http.server_close()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_a_server_gives_the_file_of_the_model(teacher: str, data: str, server: Server, suffix: str) -> None:
    """The prompt's own ids, which the server adds to its lists, are dropped; unlikely as they are, there are some."""
    ours, theirs = taught(teacher, data), taught(teacher, data, "served.parquet", server.url + suffix)
    outside = 0
    for row, local, served in zip(completion_rows(6), ours, theirs, strict=True):
        ids, start = ids_of(row)
        outside += sum(token not in part for token, part in zip(ids[start:], served["target_ids"], strict=True))
        assert served["target_ids"] == local["target_ids"]
        for name, tolerance in (("teacher_logprob", 2e-5), ("teacher_tail", 2e-4)):
            a, b = torch.tensor(local[name]), torch.tensor(served[name])
            torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
    assert outside > 10 and server.requests == 6


def test_a_busy_server_is_asked_again(teacher: str, data: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("logitless.training.openai_server.time.sleep", waits.append)
    server.statuses = [503, 429, 500]
    assert taught(teacher, data, "served.jsonl", server.url, per_device_eval_batch_size=1)
    assert server.requests == 6 + 3 and sum(waits) == 1 + 2 + 4
    tries = 1 + len(openai_server.WAITS)
    server.statuses, server.requests = [503] * tries, 0
    with pytest.raises(InputError, match=r"rows.jsonl, line 1: http.*/v1/completions: status 503: .*not now"):
        taught(teacher, data, "served.jsonl", server.url, per_device_eval_batch_size=1)
    assert server.requests == tries


def all_with(entries: list[Any], logprob: Callable[[int], float]) -> Any:
    """The answer with other values, from the ranks of the ids."""
    return given([e and {i: {"logprob": logprob(x["rank"])} for i, x in e.items()} for e in entries])


#: What is said of a first row of 10 ids, and the answer that it is said of, made from the right one.
SPOILED: dict[str, Any] = {
    "status 400: .*not now": None,
    "no choices": lambda entries: {"choices": []},
    "not JSON": lambda entries: b"<html>",
    "expected one entry for each of 10 ids, got 9 entries": lambda entries: given(entries[1:]),
    "for each of 10 ids, got None": lambda entries: given(None),
    "expected ids with their logprob, got None": lambda entries: given([None for _ in entries]),
    r"prompt_logprobs\[8\]: the prompt's own id \d+ is missing": lambda entries: given([{} for _ in entries]),
    r"prompt_logprobs\[8\]: expected k=7 ids at least, got 1": lambda entries: given(
        [e and dict([next(iter(e.items()))]) for e in entries]
    ),
    "the listed probabilities add to more than 1": lambda entries: all_with(entries, float),
    "expected log-probabilities, not logits": lambda entries: all_with(entries, lambda rank: float("nan")),
}


@pytest.mark.parametrize("message", SPOILED)
def test_an_answer_that_cannot_be_used_is_named(teacher: str, data: str, server: Server, message: str) -> None:
    server.change = SPOILED[message]
    server.statuses = [400] if server.change is None else []
    with pytest.raises(InputError, match=rf"rows.jsonl, line 1: {server.url}/v1/completions: .*{message}"):
        taught(teacher, data, "served.jsonl", server.url, per_device_eval_batch_size=1)
    assert server.requests == 1 and sorted(path.name for path in Path(data).parent.iterdir()) == ["rows.jsonl"]


def test_a_server_that_is_none(teacher: str, data: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitless.training.openai_server.time.sleep", lambda seconds: None)
    with pytest.raises(InputError, match=r"server: http.*/v1/other/v1/models lists no model"):
        taught(teacher, data, server=server.url + "/v1/other")
    with pytest.raises(InputError, match=r"server: http://127.0.0.1:1/v1/models: no answer"):
        taught(teacher, data, server="http://127.0.0.1:1")
    with pytest.raises(InputError, match="begins with http:// or https://, got 'localhost:8000'"):
        taught(teacher, data, server="localhost:8000")


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize("name", ["taught.parquet", "taught.jsonl"])
def test_an_interrupted_run_leaves_the_old_file(
    teacher: str, data: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, answers = Path(data).parent / name, []
    output.write_text("old")
    ask = teachers.ModelTeacher.__call__

    def interrupted(*arguments: Any) -> Any:
        answers.append(ask(*arguments))
        if len(answers) == 2:
            raise KeyboardInterrupt
        return answers[-1]

    monkeypatch.setattr(teachers.ModelTeacher, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        taught(teacher, data, name, per_device_eval_batch_size=2)
    assert output.read_text() == "old" and len(list(output.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ({"output": "a.csv"}, {}, r"output: expected a name that ends in .parquet or .jsonl, got 'a.csv'"),
        ({"k": 0}, {}, "k must be at least 1, got 0"),
        ({"k": 259}, {}, "k: expected at most 258, the vocabulary of .*, got 259"),
        ({"server": "http://x"}, {"teacher_model_name_or_path": "y"}, "two teachers"),
        ({}, {"backend": "materialised"}, "backend: .*'materialised'"),
        ({}, {"dataset_name": ""}, "--dataset_name is required"),
        ({}, {"dataset_name": "", "mixture": [{"dataset_name": "x"}]}, "mixture: a teacher reads"),
        ({}, {"teacher_model_name_or_path": "no-such-folder/x/y"}, "no-such-folder/x/y"),
    ],
)
def test_what_cannot_be_taught_is_refused(
    teacher: str, data: str, arguments: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    chosen = {"output": str(Path(data).parent / "taught.jsonl")} | arguments
    with pytest.raises(InputError, match=message):
        write_teacher_columns(options(teacher, data, **changes), **chosen)


def test_bad_rows_are_named(teacher: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(InputError, match=r"rows.jsonl, line 2: expected messages"):
        taught(teacher, data)


def test_rows_that_parquet_would_change_are_refused(teacher: str, tmp_path: Path) -> None:
    """Arrow gives every row's tool the first one's order of names, and the template writes them down."""
    template = "{{ tools[0]['function'] | list }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = make_model(tmp_path / "model", chat_template=template)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tools = [{"name": "f", "x": 1, "y": 2}, {"name": "f", "y": 2, "x": 1}]
    rows = [{"messages": turns, "tools": [tool]} for tool in tools]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=r"line 2: Parquet gives .*; write .jsonl"):
        taught(model, data)
    assert [row["tools"] for row in taught(model, data, "taught.jsonl")] == [row["tools"] for row in rows]


def test_a_teacher_of_other_ids_is_refused(teacher: str, data: str, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"another tokenizer: the id \d+ is '[ab]' to the data's"):
        taught(teacher, data, teacher_model_name_or_path=other)


def test_rows_of_a_head_that_are_no_tokens_are_left_out(teacher: str, data: str, tmp_path: Path) -> None:
    """Lists and tail are those of the 258 tokens, so that a model of a shorter head can learn them."""
    model = LlamaForCausalLM.from_pretrained(teacher)
    model.resize_token_embeddings(264, mean_resizing=False)
    model.get_output_embeddings().weight.data[258:] = model.get_output_embeddings().weight.data[:6] * 1.5
    model.save_pretrained(tmp_path / "padded")
    make_tokenizer().save_pretrained(tmp_path / "padded")
    found = taught(teacher, data, teacher_model_name_or_path=str(tmp_path / "padded"))
    for values, row in zip(found, completion_rows(6), strict=True):
        ids, start = ids_of(row)
        with torch.no_grad():
            full = model(torch.tensor([ids])).logits[0, :-1, :258].double().log_softmax(-1)
        assert_columns(values, full[start - 1 :])
    with pytest.raises(InputError, match="k: expected at most 258"):
        write_teacher_columns(options(teacher, data), str(tmp_path / "x.jsonl"), k=259)


def test_ids_beyond_the_teachers_embedding_are_refused(teacher: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x"}, {"text": "<tool>"}])
    with pytest.raises(InputError, match=r"line 2: the token '<tool>' has the id 258, but the embedding of"):
        taught(folder, data)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))  # type: ignore[return-value]


def test_the_command(teacher: str, data: str, tmp_path: Path, server: Server) -> None:
    """A file of a training run's options serves both commands, and the teacher is another model than the student."""
    student, config = make_model(tmp_path / "student"), tmp_path / "run.yaml"
    config.write_text(f"model_name_or_path: {student}\nmax_length: 16\nuse_cpu: true\n")
    both = ("--config", str(config), "--dataset_name", data, "--k", str(K))
    files = [str(tmp_path / "new" / name) for name in ("model.parquet", "server.parquet")]
    for output, source in zip(
        files, (("--teacher_model_name_or_path", teacher), ("--server", server.url)), strict=True
    ):
        result = command("teach", *both, "--output", output, *source)
        assert result.exit_code == 0, result.output
        assert "data: 6 of 6 rows" in result.output and f"done: 6 rows with {K} ids a token in" in result.output
    ours, theirs = ([row.values["target_ids"] for row in read_rows(name)] for name in files)
    assert ours == theirs == [row["target_ids"] for row in taught(teacher, data, max_length=16)]
    run = ("--method", "top_k_distillation", "--dataset_name", files[0], "--output_dir", str(tmp_path / "run"))
    result = command("train", "--config", str(config), *run, "--max_steps", "1")
    assert result.exit_code == 0, result.output
    result = command("teach", *both, "--output", "a.csv")
    assert result.exit_code == 2 and "error: output: expected" in result.output


def test_the_flags_are_options_of_a_run() -> None:
    shown = CliRunner().invoke(app, ["teach", "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).output
    assert all(name in shown for name in (*TEACHER_OPTIONS, "--output", "--k", "--server", "--config"))
    assert "learning_rate" not in shown and set(TEACHER_OPTIONS) <= set(TrainOptions().to_dict())
