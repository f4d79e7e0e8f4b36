"""The backward on the Triton path: the stages' backward kernels, sequence by sequence.

The forward keeps x, and may keep the product t with the moments of x, and beside them a and b. What
it did not keep is made again here. For each sequence, or, with a and b kept, for several short ones
as if they were one (`launches.sequences_merged`):

    stage 3, in chunks of rows         gives dt, and dq, the gradient of the gate before its sigmoid
    stage 2                            gives da and db from dt, a and b
    stage 1, in chunks of rows         gives dp and dg, and from them and dq dx

Where a and b were not kept, stage 1 makes them again, and stage 2 runs in groups of channels, whose
da and db take the place of the group before in dt and in a. Peak memory beyond the arguments, what
was kept among them, in tensors of one sequence's pair size (C = D a multiple of 64):

    dx, whose memory holds dq first                                                     1
    with a and b kept: dt, da and db                                                    3
    else dt, a and b, and room for da and db of one group of four                       3 1/2
      and for rows of a drop mask's gradient, if wanted                                 1/4

The rows of a chunk lie where da and db are not yet, or where dt, a and b were; there are as many
chunks as that takes, of whole waves of programs, for which stage 1 may take a little more. A
product that was not kept lies where dt will be. Of a small sequence, whose planes are not large
beside a GPU's memory, a chunk of stage 1 takes more of it, for fewer launches: with a and b kept
2 1/2 such tensors instead of one with C = D = 256 and L = 512, and 5 with L = 256; where they are
made again 2 1/2 with L = 256. Where one kernel goes to dx (`hopper/gated_input_backward.py`), dq is
in these rows too, 3, 6 and 3 tensors; without gradients of parameters there are none. The
parameters' gradients come from few products: with t^ and x^ the normalised rows without norm
weights,

    S = de^T t^, s = sum de        dWe = S g2 + s b2^T,  dg2 = sum_c We S,  db2 = sum_c We s
    H = [dp, dg, dq]^T x^          the same for [Wp; Wg; Wo], g1 and b1; of x^ g1, and divided by
                                   g1, where one kernel goes to dx

over all pairs, in fp32. No atomics: partial sums are written separately and added in a fixed order,
so equal calls give equal bits. In padded batches the kernels skip pairs beyond a length and write
zeros; the weight-gradient products still run over all rows.

All products are kernels of ours, in the call's precision: no setting of torch's applies to them.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import hopper
from .._call import Call, Weights
from .._call import merged as merge
from ..fused_dual_gemm import fused_dual_gemm_fwd, with_axes_of_x
from ..hopper.folded_norm import Folded, Folds
from ..trimul_einsum_triton import of_sequences, trimul_einsum_fwd
from ..triton_parts.device import device_target
from ..triton_parts.launch import Launches, PreparedLaunch, setting_of
from ..triton_parts.settings import LaunchConfig
from ..triton_parts.split_operands import PlaneScales, Split, multiplied, split_weights
from ..triton_parts.tiles import padded_pitch
from .fused_dual_gemm_backward import (
    Stage1Gradients,
    fused_dual_gemm_bwd,
    prepare_dual_gemm_bwd,
    rows_of_sums,
)
from .fused_ln_residual_backward import (
    Rows,
    Stage3Gradients,
    emit_means,
    fused_ln_residual_bwd,
    partial_sums,
    prepare_emit_means,
    prepare_ln_residual_bwd,
)
from .input_backward import holds_rows, input_bwd, prepare_input_bwd
from .launches import SMALL_PLANES, launches_of, sequences_merged
from .norm_backward import norm_out_bwd, prepare_norm_out_bwd
from .parameter_gradients import Projections, Sums, gradients_of_projections
from .row_products import RowParts, prepare_row_products, row_products
from .split_gradients import split_planes
from .trimul_einsum_backward import multiply_both

# The fewest pairs of a chunk, and elements of a group's planes: smaller ones don't fill a GPU.
_CHUNK_PAIRS = 16_384
_GROUP_ELEMENTS = 1 << 20
# Pairs of a program's tile in dx, about those in stage 1: a chunk is whole waves of programs, as a
# last wave of few takes as long as one of all.
_TILE_PAIRS = 128
# The bytes of a chunk's rows in stage 1 of small planes. Where a and b were kept there are two
# chunks at most; the others, and what is small then, are of calls that save memory.
_CHUNK_BYTES = 192 << 20
_SMALL_PLANES_AGAIN, _CHUNK_BYTES_AGAIN = 64 << 20, 96 << 20
# The most groups of a sequence, each of which holds whole blocks of the smallest dot.
_GROUPS = 4
_GROUP_MULTIPLE = 16
_OUT = Projections(("p_out_weight",), "norm_out")
_IN = Projections(("p_in_weight", "g_in_weight", "g_out_weight"), "norm_in")


class Wanted(NamedTuple):
    """Which gradients are asked for; those of parameters are computed all or none."""

    x: bool
    mask: bool
    drop_mask: bool
    parameters: bool

    @classmethod
    def of(cls, needs: frozenset[str]) -> "Wanted":
        names = ("x" in needs, "mask" in needs, "drop_mask" in needs)
        return cls(*names, not needs.isdisjoint(Weights._fields))

    @property
    def through_product(self) -> bool:
        """Whether one of them comes through the product t."""
        return self.x or self.mask or self.parameters

    @property
    def of_stage_3(self) -> frozenset[str]:
        """The outputs of stage 3's backward that are used."""
        found = {
            "emit": self.through_product, "gate": self.projections, "rows": self.through_product,
            "drop_mask": self.drop_mask, "sums": self.parameters,
        }  # fmt: skip
        return frozenset([name for name, wanted in found.items() if wanted])

    @property
    def projections(self) -> bool:
        """Whether dp, dg and dq are wanted: for dz, or for the parameters."""
        return self.x or self.parameters

    @property
    def of_stage_1(self) -> frozenset[str]:
        """The outputs of stage 1's backward, by their names in `Stage1Gradients`."""
        outputs = {
            "grads": self.projections,
            "hat_x": self.parameters,
            "mask": self.mask,
            "sums": self.parameters,
        }
        return frozenset(name for name, wanted in outputs.items() if wanted)


@torch.no_grad()
def run_backward(
    call: Call,
    grad_out: Tensor,
    product: Tensor | None,
    moments: Tensor | None,
    planes: Tensor | None,
    needs: frozenset[str],
    launches: Launches | None = None,
) -> dict[str, Tensor]:
    """The gradients that `needs` names, each with the dtype and shape of its tensor.

    Args:
        call: the forward's; x's device must be the current one. Residual and inplace don't matter.
        grad_out: [B, L, L, C] in the dtype of x, any strides.
        product, moments, planes: from `forward_saving`; the last or all may be None.
        needs: names from `DIFFERENTIABLE`, of tensors that the call has.
        launches: by default the cached ones of this kind of call.
    """
    x, weights = call.x, call.weights
    batch, length = x.shape[:2]
    wanted = Wanted.of(needs)
    if launches is None:
        kept = product is not None, planes is not None
        launches = launches_of(call, "backward", wanted, kept, likeness(grad_out))
    gradients = {}
    for name in ("x", "mask", "drop_mask"):
        if name in needs:
            like = getattr(call, name)
            # Contiguous, whatever the argument's strides.
            gradients[name] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if batch == 0 or length == 0:
        return gradients | {
            name: torch.zeros_like(value)
            for name, value in weights._asdict().items()
            if name in needs
        }
    parts, by_rows = {}, gradients
    merged = 1 if planes is None else sequences_merged(call)
    if merged > 1:
        call, grad_out = call.merged(merged), merge(grad_out, merged)
        by_rows = {name: merge(gradient, merged) for name, gradient in gradients.items()}
        size = batch // merged, -1, merged * length, product.shape[-1]
        product, moments = product.view(size), moments.view(size)
        planes = planes.view(batch // merged, 2, *product.shape[1:])
    of_products, scales = split_weights(call, launches)
    grad_q = memory_of_grad_q(call, wanted, by_rows)
    to_grad_x = setting_to_grad_x(call, wanted, launches)
    norms = Norms(launches, weights, call.precision)
    for entry in range(batch // merged):
        sequence = slice(entry, entry + 1)
        Sequence(
            call.of_entry(entry),
            launches,
            wanted,
            parts,
            {name: gradient[entry] for name, gradient in by_rows.items()},
            None if grad_q is None else grad_q[entry],
            norms,
            to_grad_x,
            split=None
            if scales is None
            else Split(of_products.weights, scales.of_entries(sequence)),
        ).run(
            grad_out[entry],
            None if product is None else product[sequence],
            None if moments is None else moments[sequence],
            None if planes is None else planes[entry],
        )
    if wanted.parameters:
        gradients |= gradients_of_parameters(launches, weights, parts, needs)
    return gradients


def memory_of_grad_q(call: Call, wanted: Wanted, gradients: dict[str, Tensor]) -> Tensor | None:
    """Memory for dq like x, if it is wanted: that of dx, or of one sequence for all."""
    x = call.x
    if not wanted.projections or (wanted.x and holds_rows(x, call.precision)):
        return gradients.get("x")
    return torch.empty(x.shape[1:], dtype=x.dtype, device=x.device).expand(x.shape)


def gradients_of_parameters(
    launches: Launches,
    weights: Weights,
    parts: dict[str, RowParts],
    needs: frozenset[str],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Those that `needs` names, from the parts of `Sequence`, in their dtypes or in `dtype`."""
    out, into = parts["out"], parts["in"]
    of_gate = out.sums[:, weights.g_out_weight.shape[0] :]
    sums = [Sums(_IN, into, of_gate), Sums(_OUT, out)]
    return gradients_of_projections(launches, sums, weights, needs, dtype)


class Norms:
    """What the stages take of the norms and the projections behind them, made once for all rows."""

    def __init__(self, launches: Launches, weights: Weights, precision: str) -> None:
        self._launches, self._weights, self._precision = launches, weights, precision
        self._means: tuple[Tensor, Tensor | None] | None = None
        self._folded: tuple | None = None
        self.folds = Folds(launches, weights)

    def of_stage_3(self, prepared: PreparedLaunch) -> tuple[tuple, tuple | None]:
        """`emit_means` for a launch of stage 3, and what its variant takes."""
        if prepared.variant == "hopper":
            return self._fold()
        if self._means is None:
            prepared = self._launches.of(
                ("emit_means",), prepare_emit_means, self._weights, self._precision
            )
            self._means = emit_means(self._weights, prepared)
        return self._means, None

    def constants(self) -> Tensor:
        """Of stage 1, where Hopper's kernels run: see `Folded`."""
        self._fold()
        return self.folds.planes(0).constants

    def _fold(self) -> tuple[tuple[Tensor, Tensor | None], Folded]:
        if self._folded is None:
            self._folded = self.folds.of_backward()
        return self._folded


class Sequence(NamedTuple):
    """The backward of one sequence; in `stage_3` and `stage_1`, of R of its L rows.

    With a and b kept it may be that of several sequences, whose R > L rows are those of one.
    """

    call: Call  # x [1, R, L, C]
    launches: Launches
    wanted: Wanted
    # "out": S, and sums of de and dq; "in": H, and sums of dp and dg, or of all three of H's.
    parts: dict[str, RowParts]
    # Of x [R, L, C], mask [R, L], and drop_mask [L, C] or [R, 1, C], to be written.
    gradients: dict[str, Tensor]
    grad_q: Tensor | None  # memory for dq [R, L, C]: that of dx, if `holds_rows`
    norms: "Norms"
    to_grad_x: LaunchConfig | None  # `setting_to_grad_x`
    first_row: int = 0  # of x, which matters only with lengths
    split: Split | None = None  # of a call of split numbers

    def run(
        self,
        grad_out: Tensor,
        product: Tensor | None,
        moments: Tensor | None,
        planes: Tensor | None,
    ) -> None:
        """Fills what is to be written.

        grad_out is [L, L, C], product [1, D, L, pitch], moments [1, 2, L, pitch], planes
        [2, D, L, pitch]; or, of several sequences, all have R rows and the axes of x.
        """
        hidden, length = self.call.hidden, self.call.x.shape[2]
        if planes is not None:
            size = apart = hidden
            memory = self._memory(2 * hidden, 3 * hidden)
            grad_t, scratch = memory[2 * hidden : 3 * hidden], (memory[: 2 * hidden],)
        else:
            # Room for a group's da, dt; room for its db, a, b. Each group takes the place of the
            # one before, so that da and db of all lie `apart` planes from each other.
            size = group_size(hidden, length)
            apart = hidden + size
            memory = self._memory(apart + hidden, 2 * apart + hidden)
            grad_t, scratch = memory[size:apart], (memory[:size], memory[apart : apart + size])
            planes = memory[apart + size : 2 * apart + hidden].unflatten(0, (2, hidden))
            if len(memory) >= 2 * apart + hidden + 2 * size:
                scratch = (memory[2 * apart + hidden :],)
            if self.to_grad_x is not None:
                self.norms.constants()  # one launch folds all norms, those of a and b too
            made = self._planes_again(planes)
            moments = made if moments is None else moments
            if product is None:
                product = grad_t[None]
                self._product_again(product, planes)
        if not self._merged:
            moments = with_axes_of_x(moments, self.call.direction)
        by_rows = moments[0, :, : self.call.x.shape[1], :length]
        self.stage_3(product[0], by_rows, grad_out, grad_t, *scratch)
        if self.wanted.through_product:
            grad_planes = memory[: 2 * apart].unflatten(0, (2, apart))
            self._stage_2(grad_t, planes, grad_planes, size)
            self.stage_1(memory[: 2 * apart], by_rows, apart, memory[apart + hidden :])

    @property
    def _merged(self) -> bool:
        """Whether these are several sequences."""
        return self.call.x.shape[1] > self.call.x.shape[2]

    def _memory(self, before: int, least: int) -> Tensor:
        """Planes [`least` or more, R, pitch] for a, b, dt, da, db, and rows of stages 3 and 1.

        The rows of a chunk of stage 1 lie behind the first `before` planes, da and db, and may need
        more planes than are left.
        """
        x, hidden = self.call.x, self.call.hidden
        rows, length, channels = x.shape[1:]
        pitch = padded_pitch(length)
        width = 4 * hidden + channels
        if self.to_grad_x is not None:
            width = max(1, sum(self._widths()))
        chunks = -(-width * length // ((least - before) * pitch))
        small, most, few = SMALL_PLANES, _CHUNK_BYTES, 2
        saving = least > 3 * hidden  # a and b are made again
        if saving:
            small, most, few = _SMALL_PLANES_AGAIN, _CHUNK_BYTES_AGAIN, chunks
        if hidden * rows * pitch * x.element_size() < small:
            chunks = min(few, -(-rows * length * width * x.element_size() // most))
        step = max(self._least_rows(), -(-rows // chunks))
        if not saving:  # those that save memory take no more rows
            step = self._whole_waves(step)
        count = max(least, before + -(-step * length * width // (rows * pitch)))
        return torch.empty(count, rows, pitch, dtype=x.dtype, device=x.device)

    def _whole_waves(self, step: int) -> int:
        """A number of rows i rounded up to whole waves of programs."""
        rows, length = self.call.x.shape[1:3]
        wave = self._wave()
        return min(rows, -(-step * length // wave) * wave // length)

    def _wave(self) -> int:
        """The pairs of a wave of programs."""
        return _TILE_PAIRS * device_target(self.call.x.device).multiprocessors

    def _least_rows(self) -> int:
        """The fewest rows i of a chunk."""
        rows, length = self.call.x.shape[1:3]
        return min(rows, -(-_CHUNK_PAIRS // length))

    def _product_again(self, product: Tensor, planes: Tensor) -> None:
        """Fills the product [1, D, L, pitch] of planes [2, D, L, pitch]."""
        a, b = planes[None, 0], planes[None, 1]
        scales = self._scales_of(0, self.call.hidden)
        trimul_einsum_fwd(self.call, self.launches, a, b, product, "again", scales=scales)

    def _scales_of(self, first: int, size: int) -> PlaneScales | None:
        """Those of a group's a and b, if they are split numbers."""
        if self.split is None:
            return None
        sequences = self.call.x.shape[1] // self.call.x.shape[2]
        channels = slice(first, first + size)
        return self.split.scales.of_planes(self.call.hidden, channels, sequences)

    def _planes_again(self, planes: Tensor) -> Tensor:
        """Fills planes [2, D, L, pitch] with a and b, as the forward did; returns the moments."""
        call = self.call._replace(weights=multiplied(self.call.weights, self.split))
        scales = None if self.split is None else self.split.scales
        return fused_dual_gemm_fwd(
            call, self.launches, planes[None].unbind(1), scales=scales, folds=self.norms.folds
        )

    def _chunks(
        self, memories: tuple[Tensor, ...], widths: tuple[int, ...]
    ) -> tuple[list[Tensor], list[slice]]:
        """Cuts the rows i into chunks whose pairs, with elements of these widths, fit the memories.

        Returns what `_row_buffers` takes: one memory for all widths, or one for each, of which the
        last may be missing. They are others, and larger, if chunks would not fill a GPU.
        """
        rows, length = self.call.x.shape[1:3]
        least, most, found = self._least_rows() * length, rows, []
        shares = [sum(widths)] if len(memories) == 1 else widths
        for memory, width in itertools.zip_longest(memories, shares):
            if memory is None:
                memory = memories[0].new_empty(memories[0].numel() if width else 0)
            if memory.numel() < least * width:
                memory = memory.new_empty(least * width)
            found.append(memory.view(-1))
            most = min(most, memory.numel() // (length * width)) if width else most
        even = self._whole_waves(-(-rows // -(-rows // most)))
        wave = self._wave()
        fitting = most * length // wave * wave // length  # of whole waves
        steps = [step for step in (min(most, even), fitting) if step]
        step = min(steps, key=lambda step: _launched(rows, step, length, wave))
        return found, [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _widths(self) -> tuple[int, int]:
        """The columns of a chunk's rows in stage 1: of dp, dg, with dx also dq; of x^ or x^ g1."""
        hidden, channels, wanted = self.call.hidden, self.call.x.shape[3], self.wanted
        if self.to_grad_x is not None:
            return (4 * hidden + channels, channels) if wanted.parameters else (0, 0)
        return (
            4 * hidden if wanted.projections else 0,
            channels if wanted.parameters else 0,
        )

    def _normal(self, rows: Tensor | None) -> Tensor | None:
        """Memory for normalised rows, as their products take them."""
        return rows if self.split is None or rows is None else rows.view(torch.float16)

    def _first_row(self, chunk: slice) -> int:
        """The first row of a launch; 0 without lengths, where every chunk can share a launch."""
        return 0 if self.call.lengths is None else self.first_row + chunk.start

    def stage_3(
        self, product: Tensor, moments: Tensor, grad_out: Tensor, grad_t: Tensor, *scratch: Tensor
    ) -> None:
        """Fills grad_t [D, R, pitch], which may be the product, and dq.

        product is [D, R, pitch], moments [2, R, L] and grad_out [R, L, C]. The scratch is for rows
        of de and of t^, one memory for both or one for each.
        """
        call, wanted, weights = self.call, self.wanted, self.call.weights
        hidden, (length, channels) = product.shape[0], call.x.shape[2:]
        drop_mask = None if call.drop_mask is None else call.drop_mask[0]
        for_each_row, grad_drop = drop_mask is not None and drop_mask.ndim == 3, None
        widths = (
            channels if wanted.through_product else 0,
            hidden if wanted.parameters else 0,
            channels if wanted.drop_mask else 0,
        )
        scratch, chunks = self._chunks(scratch, widths)
        for chunk in chunks:
            rows = Rows(
                product[:, chunk], call.x[0, chunk], moments[:, chunk], grad_out[chunk],
                drop_mask[chunk] if for_each_row else drop_mask, call.lengths,
            )  # fmt: skip
            first_row = self._first_row(chunk)
            count = (chunk.stop - chunk.start) * length
            grad_q = self.grad_q[chunk].view(count, channels) if wanted.projections else None
            prepared = self.launches.of(
                ("ln_residual_bwd", count, first_row, *_alignments(rows.x, rows.grad_out, grad_q)),
                prepare_ln_residual_bwd, rows, weights, (call.eps_in, call.eps_out),
                call.precision, wanted.of_stage_3, None, first_row, self.split,
            )  # fmt: skip
            emit, hat_t, drop_rows = _row_buffers(scratch, count, widths)
            hat_t = self._normal(hat_t)
            out = Stage3Gradients(
                emit=emit,
                gate=grad_q,
                rows=_float32(call.x, 5, count) if wanted.through_product else None,
                drop_mask=drop_rows,
                sums=_float32(call.x, partial_sums(prepared), 2, channels)
                if wanted.parameters else None,
            )  # fmt: skip
            means, folded = self.norms.of_stage_3(prepared)
            fused_ln_residual_bwd(rows, weights, means, prepared, out, folded, self.split)
            if wanted.drop_mask:
                of_pairs = out.drop_mask.view(-1, length, channels)
                total = of_pairs.sum(int(for_each_row), keepdim=for_each_row, dtype=torch.float32)
                if for_each_row:
                    self.gradients["drop_mask"][chunk] = total
                else:
                    grad_drop = total if grad_drop is None else grad_drop.add_(total)
            if wanted.through_product:
                prepared = self.launches.of(
                    ("norm_out_bwd", count, first_row),
                    prepare_norm_out_bwd, rows.t, grad_t[:, chunk], length, weights,
                    call.precision, None, first_row, call.lengths is not None,
                    hat_t is not None, self.split,
                )  # fmt: skip
                norm_out_bwd(
                    out.emit, rows.t, out.rows, weights, prepared, grad_t[:, chunk], hat_t,
                    call.lengths, self.split,
                )  # fmt: skip
            if wanted.parameters:
                self._add_product("out", emit, hat_t, out.sums.flatten(1))
            del out  # freed before the next chunk's is allocated
        if grad_drop is not None:
            self.gradients["drop_mask"].copy_(grad_drop)

    def _stage_2(self, grad_t: Tensor, planes: Tensor, grad_planes: Tensor, size: int) -> None:
        """Fills grad_planes [2, at least D, R, pitch], da and db, `size` channels at a time.

        They have the axes of x. planes [2, D, R, pitch] are a and b.
        """
        for first in range(0, grad_t.shape[0], size):
            group = slice(first, first + size)
            self._stage_2_of_group(grad_t[group], first, planes[:, group], grad_planes[:, group])

    def _stage_2_of_group(
        self, grad: Tensor, first: int, planes: Tensor, grad_planes: Tensor
    ) -> None:
        """Fills grad_planes [2, G, R, pitch], da and db, from dt of G channels, `first` on."""
        operands = grad, planes, grad_planes
        if self._merged:
            length = self.call.x.shape[2]
            operands = [of_sequences(tensor, length) for tensor in operands]
        scales = self._scales_of(first, len(grad))
        if scales is not None:
            scales = split_planes(operands[0], scales, self.launches)
        multiply_both(self.call, self.launches, *operands, first, self._merged, scales)

    def stage_1(self, planes: Tensor, moments: Tensor, apart: int, memory: Tensor) -> None:
        """Fills dx and dmask from dq and planes [2 `apart`, R, pitch], da and db.

        The planes of db begin at plane `apart`, which is D or more. moments are [2, R, L]; `memory`
        is scratch, which may be all but the D planes of each.
        """
        call, wanted, weights = self.call, self.wanted, self.call.weights
        length, channels = call.x.shape[2:]
        hidden = call.hidden
        grad_mask = self.gradients.get("mask")
        widths = self._widths()
        scratch, chunks = self._chunks((memory,), widths)
        if self.to_grad_x is not None:
            for chunk in chunks:
                self._stage_1_to_grad_x(chunk, planes, moments, apart, scratch)
            return
        into = multiplied(weights, self.split)
        into = into.p_in_weight, into.g_in_weight, into.g_out_weight
        outputs = wanted.of_stage_1
        for chunk in chunks:
            x, grad_h, x_moments = call.x[0, chunk], planes[:, chunk], moments[:, chunk]
            mask = None if call.mask is None else call.mask[0, chunk]
            mask_out = None if grad_mask is None else grad_mask[chunk]
            first_row = self._first_row(chunk)
            count = (chunk.stop - chunk.start) * length
            prepared = self.launches.of(
                ("dual_gemm_bwd", count, first_row, *_alignments(x, mask_out)),
                prepare_dual_gemm_bwd, call, x, mask, x_moments, grad_h, apart, outputs, None,
                first_row, self.split,
            )  # fmt: skip
            grads, hat_x = _row_buffers(scratch, count, widths)
            hat_x, sums = self._normal(hat_x), None
            if wanted.parameters:
                sums = _float32(call.x, rows_of_sums(prepared), 4 * hidden)
            out = Stage1Gradients(grads, hat_x, mask_out, sums)
            fused_dual_gemm_bwd(
                call, x, mask, x_moments, grad_h, prepared, out, self.norms.folds, self.split,
            )  # fmt: skip
            if not wanted.projections:
                continue
            grad_q = self.grad_q[chunk].view(count, channels)
            if wanted.parameters:
                self._add_product("in", grads, hat_x, sums, grad_q)
            if wanted.x:
                grad_x = self.gradients["x"][chunk]
                prepared = self.launches.of(
                    ("input_bwd", count, first_row, *_alignments(x, grad_q, grad_x)),
                    prepare_input_bwd, grads, grad_q, x, x_moments, into, call.precision, None,
                    first_row, call.lengths is not None,
                )  # fmt: skip
                input_bwd(
                    grads, grad_q, x, x_moments, into, weights.norm_in_weight, grad_x, prepared,
                    call.lengths, None if self.split is None else self.split.factors,
                )  # fmt: skip

    def _stage_1_to_grad_x(
        self, chunk: slice, planes: Tensor, moments: Tensor, apart: int, scratch: list[Tensor]
    ) -> None:
        """`stage_1` of a chunk by one kernel, and the parameters' sums."""
        call, variant = self.call, hopper.kernels("gated_input_backward")
        x, grad_h, x_moments = call.x[0, chunk], planes[:, chunk], moments[:, chunk]
        mask = None if call.mask is None else call.mask[0, chunk]
        count = x.shape[0] * x.shape[1]
        rows, normal = _row_buffers(scratch, count, self._widths())
        prepared = self.launches.of(
            ("gated_input_bwd", count, *_alignments(x)), variant.prepare, call, x, mask,
            x_moments, grad_h, apart, rows is not None, self.to_grad_x,
        )  # fmt: skip
        grad_q = self.grad_q[chunk].view(count, x.shape[2])
        out = rows, normal, self.gradients["x"][chunk]
        tensors = x, mask, x_moments, grad_h, grad_q
        variant.launch(prepared, call, tensors, out, self.norms.constants())
        if rows is not None:
            self._add_product("in", rows, normal, None, scaled=True)

    def _add_product(
        self, which: str, left: Tensor, right: Tensor, partial: Tensor | None,
        last: Tensor | None = None, scaled: bool = False,
    ) -> None:  # fmt: skip
        """Adds left^T right of a chunk's rows [M, N] and [M, K], and sums, to the parts.

        The sums are those of left, or partial ones. `scaled` is that of `RowParts`.
        """
        parts = self.parts.get(which)
        sums = 0 if partial is None else partial.shape[0]  # a variant may have others
        prepared = self.launches.of(
            ("row_products", which, left.shape[0], sums, parts is None, *_alignments(last)),
            prepare_row_products, left, right, self.call.precision, None, partial is None, parts,
            partial, last,
        )  # fmt: skip
        made = row_products(left, right, prepared, parts, partial, last)
        self.parts[which] = made._replace(scaled=scaled)


def _launched(rows: int, step: int, length: int, wave: int) -> int:
    """The cost of chunks of `step` rows of pairs: a chunk counts as half a wave of programs."""
    waves = rows // step * -(-step * length // wave) + -(-(rows % step) * length // wave)
    return 2 * waves + -(-rows // step)


def setting_to_grad_x(call: Call, wanted: Wanted, launches: Launches) -> LaunchConfig | None:
    """The setting of the kernel from da and db to dx, if it takes all sequences of a call."""
    return launches.setting("to dx", _setting_to_grad_x, call, wanted)


def _setting_to_grad_x(call: Call, wanted: Wanted) -> LaunchConfig | None:
    x = call.x
    if not wanted.x or wanted.mask or (len(x) > 1 and x.stride(0) * x.element_size() % 16):
        return None
    if not hopper.variants("gated_input_backward", "takes", x[0], call):
        return None
    width, length = x.shape[3], x.shape[2]
    variants = frozenset({"whole"})
    config = setting_of("fused_dual_gemm_bwd", x, width, length, variants=variants)
    return config if config.kernel == "whole" else None


def group_size(hidden: int, length: int) -> int:
    """The channels of a group: all, or a part large enough to be worth its launches."""
    groups = _GROUPS
    while groups > 1 and (
        hidden % (groups * _GROUP_MULTIPLE) or hidden * length**2 < groups * _GROUP_ELEMENTS
    ):
        groups //= 2
    return hidden // groups


def _row_buffers(
    memories: list[Tensor], count: int, widths: tuple[int, ...]
) -> list[Tensor | None]:
    """[count, width] for each width, None where it is 0.

    They lie one behind the other in one memory, or each in its own.
    """
    if len(memories) == 1:
        memories = memories[0][: count * sum(widths)].split([count * width for width in widths])
    return [
        memory[: count * width].view(count, width) if width else None
        for memory, width in zip(memories, widths, strict=True)
    ]


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _alignments(*tensors: Tensor | None) -> list[int]:
    """Each address modulo 16; chunks differ if their rows aren't multiples of 16 bytes."""
    return [0 if tensor is None else tensor.data_ptr() % 16 for tensor in tensors]


def likeness(tensor: Tensor) -> tuple:
    return tensor.dtype, tensor.stride(), tensor.data_ptr() % 16
