"""The divergences' Triton kernel, compiled without a GPU for the six architectures of `triton_code.py`."""

from __future__ import annotations

import pytest
from triton_code import ARCHITECTURES, ASTSource, resources, triton

from logitless.kernels.triton import configs
from logitless.kernels.triton.divergence import divergence_kernel

FORMS = ("reverse_kl", "power", "symmetric_kl", "js", "skew_forward_kl", "total_variation", "cross_entropy")
#: The largest forms with everything there is, all forms with the least.
CASES = [(name, form, rich) for name in ARCHITECTURES for form in FORMS for rich in (False, form in ("power", "js"))]
FAST = [("hopper", "js", False)]
OPTIONAL = ("p_bias_q", "p_bias_p", "p_gradient_p", "inner_q", "outer_q", "inner_p", "outer_p")


def source(form: str, rich: bool) -> ASTSource:
    """The kernel's source, specialised as by the launcher: bfloat16 gradients over float32 products, contiguous rows.
    `rich` adds biases, softcaps and the reference's gradient."""
    names = divergence_kernel.arg_names
    values = {"FORM": form, "BLOCK_N": configs.ROW_PAIR.BLOCK_N, "BLOCK_V": configs.ROW_PAIR.BLOCK_V}
    values |= {} if rich else dict.fromkeys(OPTIONAL)
    values |= dict.fromkeys(("stride_qv", "stride_gqv", "stride_pv", "stride_gpv"), 1)
    types: dict[str, str] = {}
    for name in names:
        if name in values:
            types[name] = "constexpr"
        elif name.startswith("p_"):
            types[name] = "*bf16" if name.startswith("p_gradient") else "*fp32"
        else:
            types[name] = "i32" if name in ("N", "V") or name.startswith("stride") else "fp32"
    divisible = [i for i, name in enumerate(names) if types[name][0] == "*" or (types[name] == "i32" and name != "N")]
    constants = {(names.index(name),): value for name, value in values.items()}
    return ASTSource(divergence_kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in divisible})


@pytest.mark.parametrize(
    ("name", "form", "rich"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in dict.fromkeys(CASES)],
)
def test_it_compiles_without_spills_and_with_wide_loads(name, form, rich, tmp_path):
    arch = ARCHITECTURES[name]
    code = triton.compile(source(form, rich), target=arch.target, options={"num_warps": configs.ROW_PAIR.num_warps})
    assert code.metadata.shared <= arch.shared
    assert resources(code, tmp_path).stack == 0
    if name == "amd":
        assert "global_load_dwordx4" in code.asm["amdgcn"] or "buffer_load_dwordx4" in code.asm["amdgcn"]
    else:
        assert "ld.global.v4" in code.asm["ptx"]
