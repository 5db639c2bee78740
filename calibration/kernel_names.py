"""What kernels do, by their names and by the operators that launch them."""

from __future__ import annotations

import re
from typing import NamedTuple

_PRODUCT = re.compile(r"gemm|gemv|nvjet|cutlass", re.IGNORECASE)
# As in nvjet_sm90_tst (bfloat16), nvjet_hsh (float16), ampere_bf16_s16816gemm_bf16, gemv2T_kernel_val<__nv_bfloat16>.
_SIXTEEN_BITS = re.compile(
    r"nvjet_(sm\d+_)?[th]s[ths]|bf16|bfloat16|f16f16|_fp16_|_f16_|16816gemm|hgemm|half", re.IGNORECASE
)
_ACTIVATION = re.compile(r"silu|swish|gelu|relu|sigmoid|tanh|mish|softplus|glu|act_and_mul", re.IGNORECASE)
_MULTIPLICATION = re.compile(r"glu|_mul(?!t)|mul_|mulfunctor|::mul\b", re.IGNORECASE)
# What an activation consists of besides, where it is not one kernel.
_ARITHMETIC = re.compile(r"aten::(mul|add|pow|div|square|neg|exp|erf|clamp|clamp_min)_?")
# What goes along rows or rearranges them, whatever else is fused into it; and what changes the type.
_OTHER = re.compile(
    r"norm|softmax|attn|attention|flash|fmha|rope|rotary|reduce|triton_red|triton_per|gather|scatter|embedding|quant|fp8",
    re.IGNORECASE,
)


class Elementwise(NamedTuple):
    """A kernel that computes each element on its own, as an activation does."""

    activates: bool
    multiplies: bool


def is_product(kernel: str) -> bool:
    """Whether a kernel multiplies matrices."""
    return bool(_PRODUCT.search(kernel))


def of_sixteen_bits(kernel: str) -> bool:
    """Whether a product's kernel says that its operands are bfloat16 or float16."""
    return bool(_SIXTEEN_BITS.search(kernel))


def elementwise(kernel: str, operator: str) -> Elementwise | None:
    """What a kernel does that `operator` ("": unknown) launched; None: not, or not surely, element by element."""
    names = f"{operator} {kernel}"
    if _OTHER.search(names) or is_product(kernel):
        return None
    made = Elementwise(bool(_ACTIVATION.search(names)), bool(_MULTIPLICATION.search(names)))
    known = made.activates or "MulFunctor" in kernel or _ARITHMETIC.fullmatch(operator)
    return made if known else None
