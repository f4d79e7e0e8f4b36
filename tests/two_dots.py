"""A kernel that ptxas 12.8 compiles wrongly for sm_90: it is compiled and never run."""

import triton
import triton.language as tl


@triton.jit
def _two_dots_kernel(
    x_ptr, first_ptr, second_ptr, out_ptr, stride_first_n, stride_first_k, stride_second_n,
    stride_second_k, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """[64, N] tiles of x @ first.T / 2 and x @ second.T / 4, whose operands x are in registers."""
    offs_m = tl.arange(0, 64)[:, None]
    offs_n = tl.arange(0, N)[:, None]
    offs_k = tl.arange(0, K)[None, :]
    x = tl.load(x_ptr + offs_m * K + offs_k)
    first = tl.load(first_ptr + offs_n * stride_first_n + offs_k * stride_first_k)
    out = tl.dot((x * 0.5).to(tl.bfloat16), first.T)
    second = tl.load(second_ptr + offs_n * stride_second_n + offs_k * stride_second_k)
    out = tl.dot((x * 0.25).to(tl.bfloat16), second.T, out)
    tl.store(out_ptr + offs_m * N + tl.arange(0, N)[None, :], out)


def compile_two_dots(one_layout: bool) -> triton.compiler.CompiledKernel:
    """The kernel for sm_90; but for `one_layout` the second projection's columns are apart."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    unit = {"stride_first_k", "stride_second_k" if one_layout else "stride_second_n"}
    constants = dict.fromkeys(unit, 1) | {"N": 32, "K": 64}
    signature = {
        name: "constexpr" if name in constants
        else "i32" if name.startswith("stride")
        else "*fp32" if name in ("out_ptr", "x_ptr")
        else "*bf16"
        for name in _two_dots_kernel.arg_names
    }  # fmt: skip
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind != "constexpr"
    }
    source = ASTSource(_two_dots_kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))
