"""The registered ops: `opcheck`, and `torch.compile` of every public function without a graph break."""

from __future__ import annotations

import pytest
import torch

import logitless
from logitless import losses
from logitless.ops import functions
from logitless.ops.registered import logprobs as logprobs_op
from logitless.ops.registered import token_loss as token_loss_op
from logitless.ops.registered.shared import Execution
from logitless.testing import TokenProblem, make_problem
from logitless.types import DIFFERENTIABLE, OUTPUTS, LogitTransform

WEIGHTS = torch.linspace(0.1, 2.0, 9)
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def execution(strategy: str = "recompute", chunk_bytes: int | None = 100) -> Execution:
    return Execution("chunked", strategy, 0.0, chunk_bytes, None)


def problem(trainable=("hidden", "weight", "bias"), **options) -> TokenProblem:
    return make_problem((6,), 4, 9, ignored=0.3, trainable=trainable, **{"bias": True, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("outputs", "softcap"),
    [("logprob", None), ("lse entropy", 3.0), (" ".join(DIFFERENTIABLE), 3.0), (" ".join(OUTPUTS), None)],
)
@pytest.mark.parametrize("logit_weight", [None, WEIGHTS], ids=["", "weighted"])
@pytest.mark.parametrize("trainable", [("hidden", "weight", "bias"), ("weight",), ()], ids=str)
def test_opcheck_logprobs(trainable, logit_weight, softcap, outputs, dtype):
    hidden, weight, bias, targets = problem(trainable, dtype=dtype)
    transform = LogitTransform(1.5, softcap, 0.7).packed()
    arguments = (hidden, weight, bias, targets, None, logit_weight, transform, -100, outputs, None, *execution())
    torch.library.opcheck(torch.ops.logitless.logprobs.default, arguments, test_utils=TESTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", ["logprob", "logprob lse mean_logit correct"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("logit_weight", [None, WEIGHTS], ids=["", "weighted"])
def test_opcheck_logprobs_of_a_frozen_head(logit_weight, transposed, bias, outputs, dtype):
    hidden, weight, bias, targets = problem(("hidden",), dtype=dtype, bias=bias)
    if transposed:
        hidden = hidden.detach().T.contiguous().T.requires_grad_()
    transform = LogitTransform(1.5, None, 0.7).packed()
    arguments = (
        hidden,
        weight,
        bias,
        targets,
        None,
        logit_weight,
        transform,
        -100,
        outputs,
        None,
        *execution("single_pass"),
    )
    torch.library.opcheck(torch.ops.logitless.logprobs.default, arguments, test_utils=TESTS)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_opcheck_logprobs_backward(softcap, needs, entropy):
    hidden, weight, bias, targets = (x.detach() for x in problem())
    outputs = "logprob lse entropy" if entropy else "logprob"
    head = (hidden, weight, bias, targets, None, WEIGHTS, LogitTransform(1.0, softcap).packed(), -100)
    stats = logprobs_op.logprobs(*head, outputs, None, *execution(chunk_bytes=None))
    known = [*stats[:2], stats[2] if entropy else None]
    upstream = [torch.randn(6), None, torch.randn(6) if entropy else None, torch.randn(6)]
    arguments = (upstream, known, [], list(needs), *head, None, *execution())
    torch.library.opcheck(torch.ops.logitless.logprobs_backward.default, arguments, test_utils=TESTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [("hidden", "weight", "bias"), ("hidden",), ()], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_opcheck_token_loss(monkeypatch, softcap, trainable, dtype):
    # The gradients among the op's outputs are private: the last backward scales them in place, as a compiled one may
    # not. opcheck compares every output afterwards.
    monkeypatch.setattr(token_loss_op, "scaled", lambda gradient, factor, dtype: (gradient * factor).to(dtype))
    hidden, weight, bias, targets = problem(trainable, dtype=dtype)
    needs = [name in trainable for name in ("hidden", "weight", "bias")]
    transform = LogitTransform(1.5, softcap, 0.7).packed()
    strategy = "single_chunk" if dtype == torch.bfloat16 else "single_pass"
    with functions.handle_of(lambda stats, x: x * stats.logprob * stats.entropy - stats.mean_logit) as handle:
        arguments = (
            hidden, weight, bias, targets, None, WEIGHTS, [torch.rand(6)], None, handle, [], transform, -100,
            "logprob entropy mean_logit", needs, None, *execution(strategy, 200),
        )  # fmt: skip
        torch.library.opcheck(torch.ops.logitless.token_loss.default, arguments, test_utils=TESTS)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


def arguments(trainable=("hidden", "weight", "bias")):
    p = make_problem((4, 3), 5, 9, bias=True, ignored=0.3, trainable=trainable)
    return p, torch.linspace(-2.0, -0.1, 12).view(4, 3)


def own_loss(stats, x):
    return x * stats.logprob.square() + stats.lse


CALLS = {
    "logprobs": lambda p, ref: logitless.linear_logprobs(
        p.hidden, p.weight, p.targets, bias=p.bias, outputs=OUTPUTS, softcap=5.0
    ),
    "logprobs without targets": lambda p, ref: logitless.linear_logprobs(
        p.hidden, p.weight, None, bias=p.bias, outputs=("lse", "entropy")
    ),
    "logprob alone": lambda p, ref: logitless.linear_logprobs(p.hidden, p.weight, p.targets).logprob,
    "token loss": lambda p, ref: logitless.linear_token_loss(
        p.hidden, p.weight, p.targets, own_loss, token_inputs=(ref,), outputs=("logprob", "lse"), bias=p.bias
    ),
    "token loss, none": lambda p, ref: logitless.linear_token_loss(
        p.hidden, p.weight, p.targets, own_loss, token_inputs=(ref,), outputs=("logprob", "lse"), reduction="none"
    ),
    "cross-entropy": lambda p, ref: logitless.linear_cross_entropy(
        p.hidden, p.weight, p.targets, bias=p.bias, label_smoothing=0.1, z_loss=0.01, token_weight=ref, shift=True
    ),
    "class weights": lambda p, ref: logitless.linear_cross_entropy(
        p.hidden, p.weight, p.targets, bias=p.bias, label_smoothing=0.1, class_weight=torch.linspace(0.1, 1, 9)
    ),
    "class weights under a softcap": lambda p, ref: logitless.linear_cross_entropy(
        p.hidden, p.weight, p.targets, label_smoothing=0.1, class_weight=torch.linspace(0.1, 1, 9), softcap=3.0
    ),
    "class weights, none": lambda p, ref: logitless.linear_cross_entropy(
        p.hidden, p.weight, p.targets, label_smoothing=0.1, class_weight=torch.linspace(0.1, 1, 9), reduction="none"
    ),
    "normalizer": lambda p, ref: logitless.linear_cross_entropy(
        p.hidden, p.weight, p.targets, normalizer=torch.tensor(7.0)
    ),
    "dft": lambda p, ref: logitless.linear_dft(p.hidden, p.weight, p.targets, power=0.5, token_weight=ref),
    "loss object": lambda p, ref: logitless.linear_loss(losses.DFT(power=0.5), p.hidden, p.weight, p.targets),
    "loss by name": lambda p, ref: logitless.linear_loss("nll", p.hidden, p.weight, p.targets),
    "f-divergence": lambda p, ref: logitless.linear_f_divergence_sft(p.hidden, p.weight, p.targets, ref),
    "f-divergence with values": lambda p, ref: logitless.linear_f_divergence_sft(
        p.hidden, p.weight, p.targets, ref, value="lse", ref_lse=-ref
    ),
    "dpo": lambda p, ref: logitless.linear_dpo(p.hidden, p.weight, p.targets, ref_logprob=ref),
    "dpo in one sweep": lambda p, ref: logitless.linear_dpo(
        p.hidden, p.weight, p.targets, ref_logprob=ref, backward="single_pass"
    ),
    "dpo, ipo": lambda p, ref: logitless.linear_dpo(
        p.hidden, p.weight, p.targets, ref_logprob=ref, loss_type="ipo", reduction="none"
    ),
    "dpo, flat": lambda p, ref: logitless.linear_dpo(
        p.hidden.reshape(-1, 5),
        p.weight,
        p.targets.reshape(-1),
        ref_logprob=ref.reshape(-1),
        cu_seqlens=torch.tensor([0, 2, 5, 9, 12]),
    ),
    "dpo with the reference's states": lambda p, ref: logitless.linear_dpo(
        p.hidden, p.weight, p.targets, ref_hidden=p.hidden.detach() * 0.9
    ),
}
FROZEN = [n for n in CALLS if "one sweep" not in n]


def flatten(out):
    if isinstance(out, torch.Tensor):
        return [out]
    return [x for x in out if x is not None]


def compare(call, trainable, backend, tolerance=None):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    tolerance = tolerance or {}
    for _ in range(2):  # traced, then as compiled
        results = []
        for function in (compiled, call):
            p, ref = arguments(trainable)
            out = flatten(function(p, ref))
            total = sum((x * torch.linspace(0.5, 2, x.numel()).view_as(x)).sum() for x in out if x.requires_grad)
            leaves = [x for x in p if x is not None and x.requires_grad]
            gradients = torch.autograd.grad(total, leaves, allow_unused=True)
            results.append([*out, *(g for g in gradients if g is not None)])
        assert len(results[0]) == len(results[1])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("name", CALLS)
def test_compiled_without_a_graph_break(name):
    compare(lambda p, ref: CALLS[name](p, ref), ("hidden", "weight", "bias"), "aot_eager")


@pytest.mark.parametrize("name", FROZEN)
def test_compiled_with_a_frozen_head(name):
    compare(lambda p, ref: CALLS[name](p, ref), ("hidden",), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_compiled_by_inductor(name):
    compare(CALLS[name], ("hidden", "weight", "bias"), "inductor")


@pytest.mark.parametrize("module", ["LinearCrossEntropyLoss", "LinearDFTLoss"])
def test_compiled_modules(module):
    compiled = torch.compile(getattr(logitless.nn, module)(), fullgraph=True, backend="aot_eager")
    p, _ = arguments()
    torch.testing.assert_close(
        compiled(p.hidden, p.weight, p.targets), getattr(logitless.nn, module)()(p.hidden, p.weight, p.targets)
    )


def test_compiled_hyper_parameters_may_change():
    """Another loss, another float, another object with the same fields: each call is its own loss."""
    p, ref = arguments()

    def call(loss, **options):
        return logitless.linear_loss(loss, p.hidden, p.weight, p.targets, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for loss in (losses.DFT(), losses.DFT(0.5), losses.DFT(0.25), losses.NLL(), losses.NLL(z_loss=0.1), losses.DFT()):
        torch.testing.assert_close(compiled(loss), call(loss))
    for beta in (0.1, 0.2, 0.3):
        loss = losses.FDivergenceSFT(beta=beta)
        torch.testing.assert_close(compiled(loss, ref_logprob=ref), call(loss, ref_logprob=ref))


def test_compiled_shapes_may_change():
    compiled = torch.compile(logitless.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for tokens in (4, 7, 12, 1, 30):
        p = make_problem((tokens,), 4, 9, ignored=0.2)
        torch.testing.assert_close(
            compiled(p.hidden, p.weight, p.targets), logitless.linear_cross_entropy(p.hidden, p.weight, p.targets)
        )


@pytest.mark.parametrize("backward", ["auto", "tail_corrected"])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)  # torch 2.9 wants it for what a forward keeps
def test_compiled_float_options_may_change(backward):
    torch._dynamo.reset()
    p, _ = arguments()

    def call(options):
        return logitless.linear_logprobs(p.hidden, p.weight, p.targets, backward=backward, **options).logprob

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for softcap, temperature in ((None, 1.0), (None, 0.5), (5.0, 0.7), (7.0, 0.7), (8.0, 0.6)):
        options = dict(softcap=softcap, temperature=temperature)
        torch.testing.assert_close(compiled(options), call(options))


def test_compiled_with_a_bad_target_still_raises():
    p, _ = arguments()
    p.targets[0, 0] = 9
    compiled = torch.compile(logitless.linear_dft, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="targets"):
        compiled(p.hidden, p.weight, p.targets)


def test_compiled_in_a_model_under_autocast():
    p, _ = arguments()

    def call(hidden):
        with torch.autocast("cpu", torch.bfloat16):
            return logitless.linear_cross_entropy(hidden, p.weight, p.targets)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p.hidden), call(p.hidden))
