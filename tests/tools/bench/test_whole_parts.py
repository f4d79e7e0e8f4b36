"""The time of each part of a fold: no test here says how long anything takes."""

from types import SimpleNamespace

import pytest
import torch
from esmfold2_trimul_tools.bench.whole import parts as subject
from esmfold2_trimul_tools.bench.whole import run, ways
from esmfold2_trimul_tools.bench.whole.parts import (
    CONFIDENCE,
    DIFFUSION,
    LANGUAGE_MODEL,
    LAYER,
    MSA,
    REST,
    TRANSITION,
    TRIANGLE,
    Spans,
    measured,
)
from esmfold2_trimul_tools.bench.whole.ways import Installed
from esmfold2_trimul_tools.folding.fold import site_calls
from esmfold2_trimul_tools.folding.options import Settings
from whole_fakes import LENGTH, tiny_bench

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench(kernel):
    return tiny_bench(kernel)


class Ticks:
    """A clock that moves by 1 with every mark, and peaks that are asked for in turn."""

    def __init__(self, peaks=()):
        self._time, self._peaks = 0, iter(peaks)

    def now(self):
        self._time += 1
        return self._time

    def seconds(self, start, end):
        return end - start

    def peak_since(self):
        return next(self._peaks, None)


def recorded(story, peaks=()):
    """Spans of a story: names begin, None ends."""
    spans = Spans(Ticks(peaks))
    for part in story:
        spans.end() if part is None else spans.begin(part)
    return spans


def test_a_parts_time_is_without_the_parts_inside_it():
    spans = recorded([REST, CONFIDENCE, LAYER, TRANSITION, None, None, None, DIFFUSION, None, None])
    found = spans.by_part(loops=10)
    assert found == {REST: 3, CONFIDENCE: 2, TRIANGLE: 2, TRANSITION: 1, DIFFUSION: 1}
    assert sum(found.values()) == spans.seconds(spans.all[0])


def test_what_is_looped_counts_once_a_loop():
    spans = recorded([REST, "loops", LAYER, TRANSITION, None, None, None, None])
    assert spans.loop() == 5
    assert spans.by_part(loops=0) == {REST: 4, TRIANGLE: 2, TRANSITION: 1}
    assert spans.by_part(loops=2) == {REST: 2 + 3 * 2, TRIANGLE: 3 * 2, TRANSITION: 3}


@pytest.mark.parametrize(
    ("inside", "rest_of_the_layer"),
    [([], LAYER), ([TRANSITION], TRIANGLE), ([TRIANGLE, TRIANGLE], TRANSITION),
     ([TRIANGLE, TRANSITION], TRIANGLE)],
)  # fmt: skip
def test_what_remains_of_a_layer_is_the_part_that_was_not_seen(inside, rest_of_the_layer):
    story = [LAYER, *(word for part in inside for word in (part, None)), None]
    assert recorded(story).all[0].attributed == rest_of_the_layer


def test_the_peak_is_that_of_the_innermost_part():
    story = [REST, CONFIDENCE, LAYER, TRANSITION, None, None, None, None]
    # Asked for when each begins and ends; the first is of before the block.
    spans = recorded(story, peaks=[99, 1, 2, 3, 9, 4, 5, 6])
    assert spans.peak() == (9, "transition in confidence")
    assert recorded(story, peaks=[99, 1, 7, 3, 4, 5, 6, 2]).peak() == (7, "confidence")
    assert recorded(story).peak() is None
    spans = recorded([REST, "loops", MSA, None, None, None], peaks=[0, 0, 0, 5, 0, 0])
    assert spans.peak() == (5, "MSA encoder in loops")


def fold(bench, loops=0):
    return run._fold(bench, run._features(LENGTH, bench, 0), Settings(steps=2).resolved(
        bench.model.config), loops)  # fmt: skip


def spans_of(bench, installed=None, loops=0):
    with measured(bench, installed or Installed()) as spans:
        fold(bench, loops)
    return spans


def hooks(bench):
    """How many; transformers' own capture of hidden states has some, from the first fold on."""
    modules = bench.model.modules()
    return [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in modules]


def counts(spans):
    found = {}
    for span in spans.all:
        found[span.part] = found.get(span.part, 0) + 1
    return found


def test_every_part_of_a_stock_fold_is_seen_and_the_parts_add_up(bench):
    wanted = fold(bench)
    before = hooks(bench)
    spans = spans_of(bench)
    seen = counts(spans)
    assert seen[TRIANGLE] == site_calls(bench.model, loops=0) == 2 * seen[TRANSITION]
    assert seen[DIFFUSION] == seen[CONFIDENCE] == seen["loops"] == seen[REST] == 1
    assert seen[LANGUAGE_MODEL] == 2 and seen[MSA] == 1 + len(bench.msa_layers)
    found = spans.by_part(loops=0)
    assert found.keys() == {
        TRIANGLE, TRANSITION, MSA, DIFFUSION, CONFIDENCE, LANGUAGE_MODEL, REST
    }  # fmt: skip
    assert sum(found.values()) == pytest.approx(spans.seconds(spans.all[0]))
    # A fold of two loops repeats what a fold of none does once.
    twice = counts(spans_of(bench, loops=2))
    assert twice[TRIANGLE] == site_calls(bench.model, loops=2)
    # Nothing of it stays.
    assert hooks(bench) == before
    assert not {"_run_trunk_loops", "_sample_structure"} & vars(bench.model).keys()
    assert torch.equal(fold(bench).plddt, wanted.plddt)


@pytest.mark.parametrize("way", [ways.ours, ways.our_layer, ways.unchunked])
def test_parts_of_other_ways_are_told_apart(bench, way):
    with way(bench) as installed:
        found = spans_of(bench, installed).by_part(loops=0)
    assert {TRIANGLE, TRANSITION, MSA} <= found.keys() and LAYER not in found


def test_a_layer_that_one_forward_has_replaced_is_told_apart_by_our_ops(bench):
    """As a patch of whole layers may do it: no module of the layer is called."""
    kernel = bench.sources.kernel

    def forward_of(layer):
        def forward(*arguments, pair_attention_mask=None):
            pair = arguments[0] if len(arguments) < 3 else arguments[1]
            for name in ways.TRIANGLES:
                weights = kernel.from_esmfold2(getattr(layer, name))
                pair = pair + kernel.triangle_multiplicative_update(pair, **weights)
            transition = layer.pair_transition
            pair = pair + transition.mlp(transition.norm(pair))
            return pair if len(arguments) < 3 else (arguments[0], pair)

        return forward

    with ways._replaced(bench.layers, forward_of):
        spans = spans_of(bench, Installed(has_our_ops=True))
        alone = spans_of(bench)
    seen = counts(spans)
    assert seen[TRIANGLE] == site_calls(bench.model, loops=0) and TRANSITION not in seen
    found = spans.by_part(loops=0)
    assert LAYER not in found and found[TRIANGLE] > 0 and found[TRANSITION] > 0
    # Without our ops there is nothing to tell them apart by.
    assert alone.by_part(loops=0).keys() & {LAYER, TRIANGLE, TRANSITION} == {LAYER}


def test_an_op_of_ours_that_is_no_triangle_is_a_transition(bench):
    spans = Spans(Ticks())
    mode = subject._OurOps(bench, spans)
    namespace = subject.namespace_of(bench.sources.kernel)
    for name in ("trimul_fwd", "trimul_fwd_", "swiglu_fwd"):
        op = SimpleNamespace(namespace=namespace, name=lambda name=name: f"{namespace}::{name}")

        class Op(SimpleNamespace):
            def __call__(self, one, *, two):
                return one + two

        assert mode.__torch_dispatch__(Op(**vars(op)), (), (1,), {"two": 2}) == 3
    assert [span.part for span in spans.all] == [TRIANGLE, TRIANGLE, TRANSITION]


def test_a_fold_that_raises_leaves_nothing_behind(bench):
    def fail(*_, **__):
        raise MemoryError("full")

    fold(bench)
    before = hooks(bench)
    layer = bench.model.confidence_head.folding_trunk.layers[0]
    with ways._replaced([layer], lambda _: fail), pytest.raises(MemoryError, match="full"):
        spans_of(bench, Installed(has_our_ops=True))
    assert hooks(bench) == before
    assert not {"_run_trunk_loops", "_sample_structure"} & vars(bench.model).keys()
    assert fold(bench).plddt.isfinite().all()
