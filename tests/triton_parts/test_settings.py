"""The shipped launch settings, and the pure function that chooses one of them."""

import dataclasses
import itertools
import json

import pytest
from esmfold2_trimul_tools.documents import in_lines
from fresh_process import ROOT

CONFIGS = ROOT / "build" / "torch-universal" / "triton_parts" / "configs"
FILES = {path.stem: json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json"))}
STAGES = (
    "fused_dual_gemm", "trimul_einsum", "fused_ln_residual",
    "fused_ln_residual_bwd", "norm_out_bwd", "fused_dual_gemm_bwd", "row_products", "input_bwd",
    "swiglu_hidden", "row_linear", "swiglu_projections", "swiglu_bwd",
    "row_products_and_sums",
)  # fmt: skip
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
WITHOUT_DESCRIPTORS = ("sm_80", "sm_86", "sm_89", "gfx942", "gfx950", "default", "interpreter")
ELEMENT_BYTES = (2, 4)
WIDTHS = (1, 16, 128, 129, 256, 257, 4096)
LENGTHS = (1, 76, 96, 97, 128, 160, 161, 320, 321, 512, 2000, 46_336)
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
NO_DEVICE = "no such device"


@pytest.fixture
def subject(submodule):
    return submodule("triton_parts.settings")


@pytest.fixture
def tables(subject, monkeypatch, tmp_path):
    """tables(name=table, ...): nothing is shipped but these."""

    def forget():
        subject._table.cache_clear()
        subject.pick_config.cache_clear()

    def write(**named):
        for name, table in named.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(table))
        monkeypatch.setattr(subject, "_CONFIGS", tmp_path)
        forget()

    yield write
    forget()


def setting(block_m: int = 64, **bounds) -> dict:
    config = {"block_m": block_m, "block_n": 32, "block_k": 16, "num_warps": 4, "num_stages": 2}
    return {**bounds, **config}


def table_of(*entries: dict) -> dict:
    """A table with these settings for every stage and element size."""
    return {stage: {str(size): list(entries) for size in ELEMENT_BYTES} for stage in STAGES}


def shapes(subject):
    for element_bytes, width, length in itertools.product(ELEMENT_BYTES, WIDTHS, LENGTHS):
        yield subject.Shape(element_bytes, width, length)


def test_every_target_has_a_table(subject):
    assert set(FILES) == {*TARGETS, "default", "interpreter"}
    assert subject.targets() == sorted(TARGETS)


@pytest.mark.parametrize("target", FILES)
def test_every_table_answers_every_shape(subject, target):
    table = subject.settings_of(target)
    for stage in STAGES:
        for shape, triton in itertools.product(shapes(subject), TRITONS):
            config = subject.pick_config(stage, target, NO_DEVICE, shape, triton)
            values = dataclasses.asdict(config)
            assert any(
                {**values, **entry} == {**entry, **values}
                for entry in table[stage][str(shape.element_bytes)]
            )
            for block in (config.block_m, config.block_n, config.block_k):
                assert block & (block - 1) == 0, config
                assert block >= 16, config
            assert config.num_warps in (1, 2, 4, 8, 16)
            assert 1 <= config.num_stages <= 8
            assert not (config.descriptors and target in WITHOUT_DESCRIPTORS)
            assert not config.fp32_dot or target.startswith("sm_"), config
            assert config.maxnreg is None or target.startswith("sm_")


@pytest.mark.parametrize("target", FILES)
def test_every_shipped_setting_is_picked_for_some_shape(subject, tables, target):
    numbered = json.loads(json.dumps(subject.settings_of(target)))
    for stage in STAGES:
        for entries in numbered[stage].values():
            for number, entry in enumerate(entries):
                entry["block_m"] = number
    tables(default=numbered)
    for stage in STAGES:
        for kind, entries in numbered[stage].items():
            picked = set()
            for entry in entries:
                width, length = entry.get("max_width", 4096), entry.get("max_length", 2048)
                split = kind == "split"
                shape = subject.Shape(4 if split else int(kind), width, length, split)
                triton, variants = entry.get("triton", "3.6.0"), {entry.get("kernel", "")}
                picked.add(
                    subject.pick_config(
                        stage, target, NO_DEVICE, shape, triton, frozenset(variants)
                    ).block_m
                )
            assert picked == set(range(len(entries))), (stage, kind)


@pytest.mark.parametrize("target", FILES)
def test_a_table_holds_its_note_and_every_stage(subject, target):
    assert list(FILES[target])[0] == "note"
    assert set(FILES[target]) <= {
        "note", "like", "shared_bytes", "fp32_dots", "fp32_default", *STAGES,
    }  # fmt: skip
    table = subject.settings_of(target)
    kinds = {stage: tuple(table[stage]) for stage in STAGES}
    split = {stage for stage in STAGES if kinds[stage] == ("2", "4", "split")}
    assert split in (set(), set(STAGES))
    assert all(kinds[stage] == ("2", "4") for stage in set(STAGES) - split)


@pytest.mark.parametrize("target", FILES)
def test_a_table_says_nothing_that_the_one_it_is_like_says(subject, target):
    own = FILES[target]
    if "like" in own:
        other = subject.settings_of(own["like"])
        for stage in own.keys() & set(STAGES):
            assert all(other[stage].get(size) != own[stage][size] for size in own[stage])


@pytest.mark.parametrize("target", FILES)
def test_a_table_has_an_entry_a_line(target):
    assert (CONFIGS / f"{target}.json").read_text() == in_lines(FILES[target]) + "\n"


@pytest.mark.parametrize("target", FILES)
def test_a_note_says_whether_the_settings_were_tuned(target):
    """Measured settings name the versions, the date and a page; others say that they are not."""
    note = FILES[target]["note"]
    if target == "interpreter":
        assert "no speed to tune" in note
    elif note.startswith("Untuned"):
        assert "not measured" in note
    else:
        assert "measured" in note.lower()
        for word in ("torch", "Triton", "202", "docs/performance.md"):
            assert word in note


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("target", FILES)
def test_length_chooses_between_a_few_classes_only(subject, stage, target):
    entries = subject.settings_of(target)[stage]["2"]
    bounds = {entry["max_length"] for entry in entries if "max_length" in entry}
    around = {bound + beyond for bound in bounds for beyond in (0, 1)}
    lengths = sorted({*range(1, 257), *range(257, 2049, 13), *around})
    for width in WIDTHS:
        shapes = [subject.Shape(2, width, length) for length in lengths]
        picked = [
            subject.pick_config(stage, target, NO_DEVICE, shape, "3.6.0") for shape in shapes
        ]
        changes = sum(one != other for one, other in itertools.pairwise(picked))
        assert changes <= 3, width
        of_long = [
            config for config, length in zip(picked, lengths, strict=True) if length > 1024
        ]
        assert of_long == of_long[:1] * len(of_long), width


def test_a_batch_counts_by_its_pairs(subject):
    assert subject.shape_of(2, 256, 100) == subject.Shape(2, 256, 100)
    assert subject.shape_of(2, 256, 100, batch=4) == subject.Shape(2, 256, 200)
    assert subject.shape_of(2, 256, 10, batch=2) == subject.Shape(2, 256, 14)


def test_the_first_setting_that_is_wide_and_long_enough_is_taken(subject, tables):
    tables(
        sm_90=table_of(
            setting(16, max_width=128, max_length=96),
            setting(32, max_width=128),
            setting(64, max_width=256),
            setting(128),
        )
    )

    def block_m(width, length):
        shape = subject.Shape(2, width, length)
        return subject.pick_config("trimul_einsum", "sm_90", NO_DEVICE, shape, "3.6.0").block_m

    widths = (1, 128, 129, 256, 257)
    assert [block_m(width, 97) for width in widths] == [32, 32, 64, 64, 128]
    assert [block_m(width, 96) for width in widths] == [16, 16, 64, 64, 128]


def test_a_newer_triton_has_settings_of_its_own(subject, tables):
    tables(
        sm_90=table_of(
            setting(16, triton="3.10", max_width=128), setting(32, triton="3.8"), setting(64)
        )
    )

    def block_m(triton, width=128):
        shape = subject.Shape(2, width, 512)
        return subject.pick_config("trimul_einsum", "sm_90", NO_DEVICE, shape, triton).block_m

    for older in ("3.6.0", "3.7.1", "3.7.1+git1a2b3c", "2.9.0", "unknown"):
        assert block_m(older) == 64
    for newer in ("3.8", "3.8.0", "3.8rc1", "3.9.0+git1a2b3c", "3.9.0a0"):
        assert block_m(newer) == 32
    for newest in ("3.10.0", "3.10rc1", "4.0.0"):
        assert (block_m(newest), block_m(newest, width=256)) == (16, 32)


def test_a_variant_is_taken_where_it_takes_the_call(subject, tables):
    tables(sm_90=table_of(setting(128, kernel="other", max_width=256), setting(32)))

    def picked(width, *variants):
        shape = subject.Shape(2, width, 64)
        names = frozenset(variants)
        return subject.pick_config("trimul_einsum", "sm_90", NO_DEVICE, shape, "3.6.0", names)

    assert (picked(256, "other").block_m, picked(256, "other").kernel) == (128, "other")
    assert (picked(256).block_m, picked(512, "other").block_m) == (32, 32)
    assert picked(256, "another").kernel == ""


def test_a_stage_and_an_element_size_have_settings_of_their_own(subject, tables):
    table = table_of()
    blocks = iter([2**power for power in range(4, 4 + 2 * len(STAGES))])
    wanted = {}
    for stage in STAGES:
        for size in ELEMENT_BYTES:
            wanted[stage, size] = next(blocks)
            table[stage][str(size)] = [setting(wanted[stage, size])]
    tables(default=table)
    for (stage, size), block_m in wanted.items():
        shape = subject.Shape(size, 128, 512)
        picked = subject.pick_config(stage, "default", NO_DEVICE, shape, "3.6.0")
        assert picked.block_m == block_m


def test_device_before_target_before_default(subject, tables):
    tables(
        NVIDIA_H200=table_of(setting(128)),
        sm_90=table_of(setting(64)),
        default=table_of(setting(16)),
    )

    def block_m(target, device_name):
        shape = subject.Shape(2, 256, 512)
        return subject.pick_config("fused_dual_gemm", target, device_name, shape, "3.6.0").block_m

    assert block_m("sm_90", "NVIDIA H200") == 128
    assert block_m("sm_90", "NVIDIA H100 80GB HBM3") == 64
    assert block_m("sm_90", "") == 64
    assert block_m("sm_103", "NVIDIA B300") == 16


@pytest.mark.parametrize("target", ["sm_103", "gfx1201", "xpu"])
def test_an_unlisted_target_has_the_shipped_default(subject, target):
    assert subject.settings_of(target, "Some Device") == subject.settings_of("default")


def test_a_table_is_like_another_but_for_what_it_says(subject, tables):
    small = {stage: {"2": [setting(16)]} for stage in STAGES}
    tables(
        default={"fp32_dots": ["ieee"], **table_of(setting(64))},
        sm_90={"like": "default", "note": "own", "fused_dual_gemm": small["fused_dual_gemm"]},
        NVIDIA_H200={"like": "sm_90", "fp32_dots": ["tf32"]},
    )
    of_sm_90 = subject.settings_of("sm_90", "NVIDIA H100")
    assert of_sm_90["fused_dual_gemm"] == {"2": [setting(16)], "4": [setting(64)]}
    assert of_sm_90["trimul_einsum"] == {"2": [setting(64)], "4": [setting(64)]}
    assert (of_sm_90["note"], of_sm_90["fp32_dots"]) == ("own", ["ieee"])
    of_h200 = subject.settings_of("sm_90", "NVIDIA H200")
    assert of_h200 == {**of_sm_90, "fp32_dots": ["tf32"]}


def test_a_table_that_is_too_narrow_says_so(subject, tables):
    tables(default=table_of(setting(max_width=64)))
    shape = subject.Shape(2, 65, 512)
    with pytest.raises(ValueError) as caught:
        subject.pick_config("trimul_einsum", "sm_90", NO_DEVICE, shape, "3.6.0")
    assert str(caught.value) == f"no setting of trimul_einsum for {shape}"


@pytest.mark.parametrize("stage", ["einsum", "", None])
def test_an_unknown_stage_is_refused(subject, stage):
    with pytest.raises(ValueError) as caught:
        subject.pick_config(stage, "sm_90", NO_DEVICE, subject.Shape(2, 128, 512), "3.6.0")
    assert str(caught.value) == f"stage must be one of {STAGES}; got {stage!r}"


def test_options_are_what_the_launcher_takes(subject):
    config = subject.LaunchConfig(64, 32, 16, num_warps=8, num_stages=3)
    assert config.options() == {"num_warps": 8, "num_stages": 3}
    limited = dataclasses.replace(config, maxnreg=128)
    assert limited.options() == {"num_warps": 8, "num_stages": 3, "maxnreg": 128}


def test_the_classes_of_lengths_are_those_of_all_stages(submodule):
    """So that `warmup` has one length of each, for a training too."""
    settings = submodule("triton_parts.settings")
    for target in settings.targets():
        *bounds, beyond = settings.class_lengths(target, "")
        entries = [
            entry
            for stage in settings.STAGES
            for kind in settings.settings_of(target)[stage].values()
            for entry in kind
        ]
        assert {entry["max_length"] for entry in entries if "max_length" in entry} == set(bounds)
        assert beyond == bounds[-1] + 1
