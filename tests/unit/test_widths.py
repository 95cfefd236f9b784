"""Width schedules: sums and positivity first, then the paper's values, then every refusal."""

import random
from fractions import Fraction

import pytest

from hmoe_megatron.widths import expert_widths, layer_widths, widths_fingerprint

MAIN = "arithmetic:9:23"


@pytest.mark.parametrize("seed", range(200))
def test_sum_positivity_and_nearness(seed):
    rng = random.Random(seed)
    E = rng.randint(1, 64)
    ratios = [rng.randint(1, 40) for _ in range(E)]
    unit = rng.choice([None, 1, 3, 16, 128])
    total = (unit or 1) * rng.randint(E * 40, E * 400)
    widths = expert_widths("hybrid:" + ",".join(map(str, ratios)), E, total, unit)
    assert sum(widths) == total and len(widths) == E and min(widths) >= (unit or 1)
    assert all(F % (unit or 1) == 0 for F in widths)
    exact = [Fraction(total * r, sum(ratios)) for r in ratios]
    # Only experts under one unit, raised to one, may shift the others by more than one unit.
    if min(exact) >= (unit or 1):
        assert all(abs(F - x) < (unit or 1) for F, x in zip(widths, exact, strict=True))
    assert all(widths[a] <= widths[b] + (unit or 1) for a in range(E) for b in range(E) if ratios[a] <= ratios[b])


@pytest.mark.parametrize(
    "total, multiple, expected",
    [
        (12_288, None, (864, 1056, 1248, 1440, 1632, 1824, 2016, 2208)),
        (32_768, None, (2304, 2816, 3328, 3840, 4352, 4864, 5376, 5888)),
        (12_288, 128, (896, 1024, 1280, 1408, 1664, 1792, 2048, 2176)),
        (2_048, None, (144, 176, 208, 240, 272, 304, 336, 368)),
    ],
)
def test_paper_widths(total, multiple, expected):
    assert expert_widths(MAIN, 8, total, multiple) == expected


@pytest.mark.parametrize(
    "schedule, num_experts, total, multiple, expected",
    [
        (MAIN, 6, 2048, None, (192, 252, 311, 371, 431, 491)),  # steps of 14/5: exact fractions, not floats
        ("arithmetic:23:9", 8, 2048, None, (368, 336, 304, 272, 240, 208, 176, 144)),
        (MAIN, 1, 100, None, (100,)),
        ("geometric:2", 4, 150, None, (10, 20, 40, 80)),
        ("geometric:0.5", 4, 150, None, (80, 40, 20, 10)),
        ("geometric:1.5", 3, 190, None, (40, 60, 90)),
        ("hybrid:1,1,1,1,2,2,4,4", 8, 2048, None, (128, 128, 128, 128, 256, 256, 512, 512)),
        ("equal", 3, 10, None, (4, 3, 3)),
        ("explicit:864, 1056", 2, 1920, 32, (864, 1056)),
        ("5,3", 2, None, None, (5, 3)),
        ("geometric:2", 8, 1024, 32, (32, 32, 32, 32, 64, 128, 224, 480)),  # none under one unit
        ("hybrid:1,1000000000,1", 3, 30, 10, (10, 10, 10)),
    ],
)
def test_values(schedule, num_experts, total, multiple, expected):
    assert expert_widths(schedule, num_experts, total, multiple) == expected


def test_layers():
    spec = f"0-1={MAIN}; 3=equal ;*=geometric:2"
    main, equal, default = (expert_widths(s, 4, 1500) for s in (MAIN, "equal", "geometric:2"))
    assert layer_widths(spec, 5, 4, 1500) == (main, main, default, equal, default)
    assert layer_widths(MAIN, 2, 4, 1500) == (main, main)
    assert layer_widths("equal;0=1,2,3", 2, 3, 6) == ((1, 2, 3), (2, 2, 2))
    assert layer_widths("0=1,2;1=3,4", 2, 2) == ((1, 2), (3, 4))


def test_fingerprint_tells_widths_apart():
    a = widths_fingerprint([[1, 2], [3, 4]])
    assert a == widths_fingerprint(((1, 2), (3, 4))) and len(a) == 16 and int(a, 16) >= 0
    assert (
        len(
            {
                a,
                widths_fingerprint([[1, 2, 3, 4]]),
                widths_fingerprint([[12], [3, 4]]),
                widths_fingerprint([[3, 4], [1, 2]]),
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    "args, words",
    [
        (("foo", 2, 8), "--hmoe-widths 'foo': unknown schedule; write arithmetic"),
        (("", 2, 8), "unknown schedule"),
        (("equal:2", 2, 8), "unknown schedule"),
        (("arithmetic:9", 2, 8), "1 numbers where"),
        (("arithmetic:9:11:13", 2, 8), "3 numbers where"),
        (("arithmetic:0:9", 2, 8), "'0' is not a positive number"),
        (("arithmetic:-1:9", 2, 8), "'-1' is not a positive number"),
        (("geometric:inf", 2, 8), "'inf' is not a positive number"),
        (("geometric:nan", 2, 8), "'nan' is not a positive number"),
        (("geometric:1e9", 2, 8), "'1e9' is not a positive number"),
        (("geometric:" + "9" * 10_000, 2, 8), "is not a positive number"),
        (("geometric:٣", 2, 8), "is not a positive number"),
        (("geometric:99", 4096, 2**31 - 1), "take a factor nearer to 1"),
        (("geometric:2", 8, 100), "experts 0 would have width 0; raise --hmoe-total-width"),
        (("hybrid:1,2,3", 2, 8), "3 ratios, but --num-experts 2"),
        (("hybrid:1,,3", 3, 8), "'' is not a positive number"),
        (("1,2,3", 2), "3 widths, but --num-experts 2"),
        (("explicit:1,0", 2), "'0' is not a positive whole number"),
        (("explicit:1,1.5", 2), "'1.5' is not a positive whole number"),
        (("1,2", 2, 4), "add up to 3, but --hmoe-total-width 4"),
        (("1,2", 2, None, 2), "[1] are no multiples of --hmoe-width-multiple 2"),
        (("2147483647,1", 2), "over the limit"),
        ((MAIN, 8), "set --hmoe-total-width"),
        ((MAIN, 8, 7), "--hmoe-total-width 7 is too small for --num-experts 8"),
        ((MAIN, 8, 896, 128), "set --hmoe-total-width to 1024 or more"),
        ((MAIN, 8, 12_300, 128), "set --hmoe-total-width to 12288 or 12416"),
        ((MAIN, 8, 0), "--hmoe-total-width '0'"),
        ((MAIN, 8, -5), "--hmoe-total-width '-5'"),
        ((MAIN, 8, float("inf")), "--hmoe-total-width 'inf'"),
        ((MAIN, 8, 10**12), "--hmoe-total-width '1000000000000'"),
        ((MAIN, 8, 1024, 0), "--hmoe-width-multiple '0'"),
        ((MAIN, 0, 1024), "--num-experts '0'"),
        ((MAIN, True, 1024), "--num-experts 'True'"),
        ((MAIN, 10**9, 2**31 - 1), "--num-experts '1000000000'"),
        ((None, 2, 8), "--hmoe-widths: must be text"),
    ],
)
def test_refusals(args, words):
    with pytest.raises(ValueError) as error:
        expert_widths(*args)
    assert words in str(error.value) and len(str(error.value)) < 1000
    assert "--" in str(error.value)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("0-3=equal;3-4=equal", "layers named twice: 3, named by nothing: 5-7 (of 0-7)"),
        ("1=equal;7=equal", "named by nothing: 0, 2-6"),
        ("equal;equal", "two defaults"),
        ("equal;*=equal", "two defaults"),
        ("equal;", "two defaults"),
        ("0-7=equal;*=equal", "no layer is left for the default"),
        ("a=equal", "'a' selects no layers"),
        ("=equal", "'' selects no layers"),
        ("0=1=equal", "'0=1' selects no layers"),
        ("3-1=equal", "no rising range"),
        ("0-999999999=equal", "no rising range within the layers 0-7 of --num-layers 8"),
        ("0=foo;*=equal", "unknown schedule"),
    ],
)
def test_layer_refusals(spec, words):
    with pytest.raises(ValueError) as error:
        layer_widths(spec, 8, 2, 8)
    assert words in str(error.value) and "--hmoe-widths" in str(error.value)


@pytest.mark.parametrize("seed", range(20))
def test_mutated_specs_raise_nothing_but_value_error(seed):
    rng = random.Random(seed)
    for _ in range(200):
        text = list(rng.choice([f"0-1={MAIN};*=geometric:2", "hybrid:1,2,3,4", "explicit:1,2,3,4", "equal"]))
        for _ in range(rng.randint(1, 4)):
            text[rng.randrange(len(text))] = rng.choice("0129:;,=-*. \n\x00e\ud800∞²")
        try:
            widths_LE = layer_widths("".join(text), 3, 4, rng.choice([None, 1000]))
        except ValueError as error:
            str(error).encode()
        else:
            assert len(widths_LE) == 3 and all(len(w) == 4 and min(w) > 0 for w in widths_LE)
