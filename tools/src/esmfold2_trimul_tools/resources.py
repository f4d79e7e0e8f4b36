"""Compile every kernel with the shipped settings, without a GPU, and read its resources.

Each setting is compiled for the calls that it was made for: widths that keep rows aligned, a mask,
a residual; float32 at "highest" precision and at "fp16x3".

The package plans each call, forward and backward, on meta tensors that stand for the target's.
Every launch of the plan is compiled with the specialisation, options and descriptors that it would
have there. Registers, stack and shared memory are read from the machine code.
"""

from __future__ import annotations

import contextlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .descriptors import faults
from .repository import find_root, load_kernel, submodule
from .uniform_registers import is_indirect, unwritten

# Outside a loop. One more block on a multiprocessor made up for 200 (stage 1 on an H200); with 464
# the transition's first stage, which holds rows of 512 channels, was the fastest on an H200.
MAX_SPILL_BYTES = 512
# In a loop, six registers. Settings with two were the fastest by far on an H100. A training step
# with the kernels for padding, which spill four, is 2 to 3 % slower than with those that spill two
# (sequences without padding, H200). Hopper's variants of wide rows have six with Triton 3.9, which
# a consumer reads once a tile, outside the loop over channels.
MAX_LOOP_SPILL_BYTES = 24
# In stage 3 of float32's split operands and in its backward, with more than 128 channels: read once
# for each block of output channels, outside of the loops over K. Stage 3 took 0.91 ms on an H200
# (C = 256, L = 512), and tiles of half the width, which spill nothing, 1.31; its backward 1.21 and
# 1.59. With 40 bytes more a step took 0.2 % longer.
MAX_SPLIT_LOOP_SPILL_BYTES = 450
_SPLIT_SPILLS = ("fused_ln_residual", "fused_ln_residual_bwd")
# In Hopper's kernels of the transition's and of stage 1's backward with 256 channels: read once a
# tile, outside of the loop over hidden channels, but for one or two registers (of the transition
# with biases, of which no case has any). With 216 bytes, read in that loop too, the transition's
# took 1.7 ms for 1.4. In dx of split operands too, whose rows in one block took 2.73 ms for 1.65.
MAX_TILE_SPILL_BYTES = 64
_INSTRUCTION_BYTES = 16  # of NVIDIA's machine code


@dataclass(frozen=True)
class Case:
    """One class of calls to compile for."""

    dtype: torch.dtype
    width: int  # C = D
    length: int
    padded: bool = False  # sequences with lengths of their own
    precision: str = "fp32"  # of float32

    def __str__(self) -> str:
        text = f"{str(self.dtype).removeprefix('torch.')} C={self.width} L={self.length}"
        text += " fp16x3" if self.precision == "fp16x3" else ""
        return f"{text} padded" if self.padded else text


CASES = tuple(
    Case(dtype, width, length, precision=precision)
    for dtype, precision in (
        (torch.bfloat16, "fp32"), (torch.float32, "fp32"), (torch.float32, "fp16x3")
    )
    for width, length in (
        (128, 64), (128, 128), (128, 512), (256, 64), (256, 128), (256, 256), (256, 512), (512, 512)
    )
) + (Case(torch.bfloat16, 256, 512, padded=True),)
# Settings of the backward don't depend on the length; stage 2's are those of long proteins. Wider
# operands than 256 are not split.
BACKWARD_CASES = tuple(
    case for case in CASES if case.length == 512 and (case.precision == "fp32" or case.width <= 256)
)


class _StandInDriver:
    """The part of a driver that Triton's JIT needs to specialise and compile for `target`."""

    def __init__(self, target):
        self._target = target

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> str:
        return f"{self._target.backend}:{self._target.arch}"

    def get_current_stream(self, device) -> int:
        return 0


def _gpu_target(target: str):
    from triton.backends.compiler import GPUTarget

    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64)


@contextlib.contextmanager
def _compiling_for(target: str) -> Iterator[None]:
    """A context in which Triton compiles for `target`."""
    from triton.runtime import driver

    try:
        previous = driver.active
    except RuntimeError:  # no GPU, no driver
        previous = None
    driver.set_active(_StandInDriver(_gpu_target(target)))
    try:
        yield
    finally:
        driver.set_active(previous)


def compile_case(kernel: ModuleType, target: str, case: Case) -> list[tuple[str, Any, dict]]:
    """(kernel, binary, config) of each kernel of a call and, of `BACKWARD_CASES`, of its backward.

    The calls are a triangle multiplication with a mask and a transition with four times the
    channels inside, both with a residual and norms in float32. The backward gives the gradients of
    x and of all parameters.
    """
    path = submodule(kernel, "triton_path")
    device = submodule(kernel, "triton_parts.device")
    compiled = {}
    with _compiling_for(target), device.standing_in(device.target_of(target, "any")):
        for planner, call, prefix in (
            (path, _call_of(kernel, case), ""),
            (path.transition, _transition_of(kernel, case), "transition_"),
        ):
            if case in BACKWARD_CASES:
                launches = planner.plan_training(call)
            else:
                launches = planner.plan(call).launches
            for launch, tensors in launches:
                name = _name_of(launch, prefix)
                if name not in compiled:
                    config = {
                        constant: value
                        for constant, value in launch.constants.items()
                        if constant.startswith("BLOCK_") or constant in ("DESCRIPTORS", "HELD")
                    }
                    if launch.variant:
                        config["VARIANT"] = launch.variant
                    compiled[name] = launch.compile(**tensors), {**config, **launch.options}
    return [(name, *found) for name, found in compiled.items()]


def _call_of(kernel: ModuleType, case: Case) -> NamedTuple:
    """A triangle multiplication of `case`, on the meta device."""
    module, width, length = submodule(kernel, "_call"), case.width, case.length
    norms = [_empty(width, dtype=torch.float32) for _ in range(4)]
    # One matrix, as a descriptor needs one projection behind the other.
    value, gate = _empty(4 * width, width, dtype=case.dtype).chunk(2)
    one = _empty(width, width, dtype=case.dtype)
    weights = module.Weights(*norms[:2], value, None, gate, None, *norms[2:], one, None, one, None)
    x = _empty(1, length, length, width, dtype=case.dtype)
    return module.Call(
        x=x, direction="outgoing", mask=_empty(1, length, length, dtype=torch.float32), residual=x,
        drop_mask=None, weights=weights, eps_in=1e-5, eps_out=1e-5, precision=case.precision,
        memory="default", recompute="none", inplace=False, lengths=_lengths_of(case),
    )  # fmt: skip


def _transition_of(kernel: ModuleType, case: Case) -> NamedTuple:
    """A transition of `case`, on the meta device; its two projections are halves of one matrix."""
    module, width, length = submodule(kernel, "_call"), case.width, case.length
    norms = [_empty(width, dtype=torch.float32) for _ in range(2)]
    gate, up = _empty(8 * width, width, dtype=case.dtype).chunk(2)
    down = _empty(width, 4 * width, dtype=case.dtype)
    x = _empty(1, length, length, width, dtype=case.dtype)
    return module.Transition(
        x=x, residual=x,
        weights=module.TransitionWeights(*norms, gate, None, up, None, down, None),
        eps=1e-5, precision=case.precision, inplace=False, lengths=_lengths_of(case),
    )  # fmt: skip


def _lengths_of(case: Case) -> torch.Tensor | None:
    return _empty(1, dtype=torch.int32) if case.padded else None


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _name_of(launch: Any, prefix: str) -> str:
    """The stage, and for kernels with several uses also the use."""
    constants, stage = launch.constants, launch.stage
    if stage == "row_products":
        return f"{prefix}row_products_{'in' if constants['N'] > constants['K'] else 'out'}"
    if stage == "input_bwd":
        return prefix + stage
    if constants.get("PROJECTIONS"):
        return f"{stage}_bwd"
    if constants.get("BOTH"):  # dt, transposed for db alone, is the left operand for outgoing
        left_a, _, left_b, _ = constants["TURNED"]
        return f"{stage}_bwd_{'incoming' if left_a == left_b else 'outgoing'}"
    turned = [letter for letter in "ab" if constants.get(f"TURNED_{letter.upper()}")]
    return f"{stage}_bwd_{''.join(turned)}" if turned else stage


@dataclass(frozen=True)
class MachineCode:
    """The resources of one compiled kernel, per thread and per block, and traits of its code."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    spills_in_loop: bool
    matrix_instructions: int
    bulk_copies: int  # TMA loads and stores
    pipelined: bool  # fewer waits for wgmma than wgmma instructions
    descriptor_faults: tuple[str, ...] | None = None  # or of uniform registers, where looked for


def _nvidia_tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run_tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_machine_code(binaries: Sequence, checked: Sequence = ()) -> list[MachineCode]:
    """Reads kernels of one target: their cubins, or the text of AMD kernels.

    Of those `checked`, which are some of them, the descriptors too.
    """
    if any("amdgcn" in binary.asm for binary in binaries):
        return [_read_amdgcn(binary.asm["amdgcn"], binary.metadata.shared) for binary in binaries]
    distinct = {binary.asm["cubin"]: binary for binary in binaries}  # launches share kernels
    read, checked = {}, {binary.asm["cubin"] for binary in checked}
    for cubin, sass in zip(distinct, _disassemble(list(distinct.values())), strict=True):
        read[cubin] = _read_cubin(cubin, sass, distinct[cubin].metadata.shared)
        if cubin in checked:
            # Variants' warps part at an indirect branch, behind which `faults` can't follow.
            found = unwritten(sass) if is_indirect(sass) else faults(sass)
            read[cubin] = replace(read[cubin], descriptor_faults=tuple(found))
    return [read[binary.asm["cubin"]] for binary in binaries]


def _disassemble(binaries: Sequence) -> Iterator[list[tuple[int, str]]]:
    """(address, instruction) of each kernel's code.

    All in one run, as if they were one kernel: the disassembler takes 0.3 seconds to start and 0.02
    for a kernel.
    """
    if not binaries:
        return
    codes = [_code_of(binary.asm["cubin"]) for binary in binaries]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        path.write_bytes(b"".join(codes))
        architecture = f"SM{binaries[0].metadata.target.arch}"
        text = _run_tool(_nvidia_tool("nvdisasm"), "--binary", architecture, str(path))
    instructions = [
        (int(found[1], 16), found[2])
        for found in re.finditer(r"^\s*/\*([0-9a-f]+)\*/\s+(.*?);", text, re.MULTILINE)
    ]
    end = 0
    for code in codes:
        start, end = end, end + len(code) // _INSTRUCTION_BYTES
        yield instructions[start:end]


def _code_of(cubin: bytes) -> bytes:
    """The machine code in a cubin, which is a 64-bit ELF file: its sections ".text.*"."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = headers[of_names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", names + name)
    )


def _read_cubin(cubin: bytes, sass: list[tuple[int, str]], shared: int) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run_tool(_nvidia_tool("cuobjdump"), "--dump-resource-usage", str(path))
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    stack = int(re.search(r"STACK:(\d+)", usage).group(1))
    code = "\n".join(instruction for _, instruction in sass)
    spilling = re.compile(r"\b(LDL|STL)\b")
    wgmma = len(re.findall(r"\bHGMMA\b", code))
    waits = len(re.findall(r"\bWARPGROUP\.DEPBAR\b", code))
    return MachineCode(
        registers,
        stack if spilling.search(code) else 0,
        shared,
        any(spilling.search(instruction) for instruction in _in_loops(sass)),
        wgmma + len(re.findall(r"\b(?:HMMA|UTCHMMA|UTCQMMA|UTCOMMA)\b", code)),
        len(re.findall(r"\b(?:UTMALDG|UTMASTG)\b", code)),
        waits < wgmma,
    )


def _in_loops(sass: list[tuple[int, str]]) -> Iterator[str]:
    """The instructions of every loop: from the target of a backward jump to the jump."""
    loops = []
    for address, instruction in sass:
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", instruction)
        # A kernel's last instruction jumps to itself.
        if jump and int(jump[1], 16) < address:
            loops.append((int(jump[1], 16), address))
    return (
        instruction
        for address, instruction in sass
        if any(start <= address < end for start, end in loops)
    )


def _read_amdgcn(text: str, shared: int) -> MachineCode:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    lines = text.splitlines()
    labels, in_loop = {}, False
    for number, line in enumerate(lines):
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label.group(1)] = number
        jump = re.search(r"\bs_c?branch\w*\s+(\.LBB\w+)", line)
        if jump and jump.group(1) in labels:
            body = lines[labels[jump.group(1)] : number]
            in_loop = in_loop or any("scratch_" in part for part in body)
    return MachineCode(
        field("vgpr_count"),
        field("private_segment_fixed_size"),
        shared,
        in_loop,
        len(re.findall(r"\bv_mfma", text)),
        0,
        True,
    )


def collect(
    targets: list[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    kernel: ModuleType | None = None,
    cases: Sequence[Case] = CASES,
    check_descriptors: bool = False,
) -> list[dict]:
    """Compiles the shipped settings of every stage for `targets` (all of them by default).

    Args:
        targets: names of the package's tables.
        progress: called with (done, total, what) before each compilation.
        kernel: the loaded kernel package; the checkout's own by default.
        cases: the calls to compile for.
        check_descriptors: whether to look for wgmma descriptors that ptxas made wrongly
            (`descriptors.faults`, and `uniform_registers.unwritten` of variants), which takes a
            tenth of a second for a kernel of sm_90.

    Returns:
        One dict for each kernel, target and class of calls: kernel, target, case, config, registers
        (per thread), spill_bytes (per thread), shared_bytes (per block), spills_in_loop,
        matrix_instructions, bulk_copies, pipelined, descriptor_faults (None where they were not
        looked for), shared_limit (bytes of a block there); if it could
        not be compiled, error in place of the last nine.

    Raises:
        ValueError: a target without a table, or a process with TRITON_INTERPRET set.
    """
    from triton import knobs

    kernel = load_kernel(find_root()) if kernel is None else kernel
    tables = submodule(kernel, "triton_parts.settings")
    for target in targets or ():
        if target not in tables.targets():
            known = ", ".join(tables.targets())
            raise ValueError(f"target must be one of {known}; got {target!r}")
    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set: an interpreted kernel can't be compiled")
    targets = targets or tables.targets()
    total = len(targets) * len(cases)
    rows = []
    for number, target in enumerate(targets):
        compiled = []
        for done, case in enumerate(cases, number * len(cases)):
            if progress is not None:
                progress(done, total, f"{target} {case}")
            where = {"target": target, "case": str(case)}
            try:
                found = compile_case(kernel, target, case)
            except Exception as error:  # all that a compiler may raise is a finding, not a crash
                rows.append({"kernel": "all kernels", **where, "config": {}, "error": repr(error)})
                continue
            compiled += [
                ({"kernel": stage, **where, "config": config}, binary)
                for stage, binary, config in found
            ]
        binaries = [binary for _, binary in compiled]
        codes = read_machine_code(binaries, binaries if check_descriptors else ())
        limit = {"shared_limit": tables.settings_of(target)["shared_bytes"]}
        rows += [
            {**row, **asdict(code), **limit}
            for (row, _), code in zip(compiled, codes, strict=True)
        ]
    if progress is not None:
        progress(total, total, "done")
    return rows


def problems(rows: list[dict]) -> list[str]:
    """A sentence for each kernel in the rows of `collect` that is over a limit."""
    found = []
    for row in rows:
        where = f"{row['kernel']} on {row['target']} ({row['case']})"
        if "error" in row:
            found.append(f"{where}: can't be compiled: {row['error']}")
            continue
        limit = row["shared_limit"]
        if row["shared_bytes"] > limit:
            found.append(f"{where}: {row['shared_bytes']} bytes of shared memory, of {limit}")
        if row["spill_bytes"] > MAX_SPILL_BYTES:
            found.append(f"{where}: {row['spill_bytes']} bytes of spills, of {MAX_SPILL_BYTES}")
        most = MAX_LOOP_SPILL_BYTES
        of_tiles = ("swiglu_bwd", "fused_dual_gemm_bwd")
        if "fp16x3" in row["case"]:
            of_tiles = ("input_bwd", "transition_input_bwd")
        if row["kernel"] in _SPLIT_SPILLS and "fp16x3" in row["case"]:
            most = MAX_SPLIT_LOOP_SPILL_BYTES
        elif row["kernel"] in of_tiles and "C=256" in row["case"]:
            most = MAX_TILE_SPILL_BYTES
        if row["spills_in_loop"] and row["spill_bytes"] > most:
            found.append(f"{where}: registers spill inside a loop")
        found += [f"{where}: {fault}" for fault in row.get("descriptor_faults") or ()]
    return found
