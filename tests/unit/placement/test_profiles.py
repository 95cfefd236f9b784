"""Hardware profiles: published figures with their sources, and the file, which may hold anything."""

import copy
import json
import math
import os
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe_megatron.placement import FLOPS, CostModel, Profile
from hmoe_megatron.placement.cost import training_flops
from hmoe_megatron.placement.profiles import MAX_FILE_BYTES, PROFILES, peak_flops, profile_named
from tests.unit.placement.hostile_json import BYTES, JSON

GPUS = ("a100", "h100", "h200", "b200")
RATES = (
    "flops_per_s",
    "launch_s",
    "memory_bytes_per_s",
    "activation_bytes_per_s",
    "row_tile",
    "width_tile",
    "intra_node_bytes_per_s",
    "inter_node_bytes_per_s",
)
MAX_MESSAGE = 4000
MEASURED = Profile(
    "measured on a CPU",
    1.2e11,
    launch_s=1.3e-4,
    memory_bytes_per_s=1.5e10,
    row_tile=25.5,
    intra_node_bytes_per_s=1.1e9,
    element_bytes=4,
    activation_bytes_per_s=8.5e9,
    sources={"flops_per_s": "fit to 30 layers"},
)
BODY = json.loads(MEASURED.to_json())


def test_names():
    assert set(PROFILES) == {"flops", *GPUS} and all(profile.name == name for name, profile in PROFILES.items())
    assert PROFILES["flops"] == FLOPS == Profile("flops", 1.0, unit="FLOPs"), "nothing costs but FLOPs"


@pytest.mark.parametrize("gpu", GPUS)
def test_every_rate_of_a_gpu_has_its_source(gpu):
    profile = PROFILES[gpu]
    assert set(profile.sources) == set(RATES) and profile.unit == "s" and profile.element_bytes == 2
    assert all(getattr(profile, rate) for rate in RATES)
    for rate in ("flops_per_s", *(rate for rate in RATES if "bytes" in rate)):
        peak, share = re.fullmatch(r"(\S+) \(.+\) times (\S+) \(.+\)", profile.sources[rate]).groups()
        assert getattr(profile, rate) == pytest.approx(float(peak) * float(share), rel=1e-5), rate
        assert 0.5 < float(share) < 1


@pytest.mark.parametrize(
    "rate, rising",
    [
        ("flops_per_s", "a100 h100 b200"),
        ("memory_bytes_per_s", "a100 h100 h200 b200"),
        ("intra_node_bytes_per_s", "a100 h100 b200"),
        ("inter_node_bytes_per_s", "a100 h100"),
    ],
)
def test_newer_gpus_are_faster(rate, rising):
    rates = [getattr(PROFILES[name], rate) for name in rising.split()]
    assert rates == sorted(set(rates))
    h100, h200 = (getattr(PROFILES[name], rate) for name in ("h100", "h200"))
    assert h100 == h200 or rate == "memory_bytes_per_s", "an H200 is an H100 with more memory"


@pytest.mark.parametrize("gpu", GPUS)
def test_orders_of_magnitude(gpu):
    """A large expert runs near its peak, one row waits for weights, links are slower than memory, nodes than links."""
    profile, cost = PROFILES[gpu], CostModel(PROFILES[gpu], 4096)
    per_piece, per_width = cost.compute([8192, 1])
    times = per_piece + per_width * 4096
    assert 0.8 < training_flops(8192, 4096, 4096) / profile.flops_per_s / times[0] < 1
    assert times[1] > 20 * training_flops(1, 4096, 4096) / profile.flops_per_s
    assert profile.inter_node_bytes_per_s < profile.intra_node_bytes_per_s < profile.memory_bytes_per_s


@pytest.mark.parametrize("profile", [*PROFILES.values(), MEASURED], ids=lambda profile: profile.name)
def test_file_and_back(profile, tmp_path):
    file = tmp_path / "profile.json"
    file.write_text("what was there before")
    profile.save(file)
    again = profile_named(file)
    assert again == Profile.load(str(file)) == profile and again.sources == profile.sources
    assert again.to_json() == file.read_text() and os.listdir(tmp_path) == ["profile.json"]


def test_numpy_numbers_are_written_as_numbers():
    profile = Profile("numpy", np.float32(8), row_tile=np.int64(2), width_tile=np.int16(4))
    assert json.loads(profile.to_json())["profile"]["width_tile"] == 4
    assert Profile.from_json(profile.to_json()) == profile


def test_named():
    assert profile_named("h100") is PROFILES["h100"]
    with pytest.raises(ValueError, match="hardware profile h300: No such file.* flops, .*h100.*profile_hardware.py"):
        profile_named("h300")
    with pytest.raises(ValueError, match=r"hardware profile H100: .*; did you mean h100\?"):
        profile_named("H100")


def test_the_peak_of_a_device_is_found_by_its_name():
    names = {
        "NVIDIA H100 80GB HBM3": 989.5e12,
        "NVIDIA H800": 989.5e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "Tesla T4": None,
    }
    assert {name: peak_flops(name) for name in names} == names


def test_errors_list_all_problems():
    with pytest.raises(ValueError) as error:
        Profile(
            "",
            -1.0,
            unit="ms",
            launch_s=math.nan,
            memory_bytes_per_s="fast",
            row_tile=0,
            width_tile=2.5,
            intra_node_bytes_per_s=True,
            inter_node_bytes_per_s=math.inf,
            element_bytes=8,
            activation_bytes_per_s=1j,
            sources=["NVIDIA"],
        )
    assert str(error.value).count(";") == 11
    assert [name for name in BODY["profile"] if name not in str(error.value)] == []


def refused(call, *values) -> None:
    """ValueError, and nothing else, with a message fit for a terminal."""
    with pytest.raises(ValueError) as error:
        call(*values)
    assert type(error.value) is ValueError and str(error.value).isprintable() and len(str(error.value)) < MAX_MESSAGE


def with_field(name, text) -> str:
    return json.dumps({"schema": 1, "profile": BODY["profile"] | {name: "HERE"}}).replace('"HERE"', text)


HOSTILE = {
    "empty": "",
    "no object": "[]",
    "cut off": MEASURED.to_json()[:-9],
    "no JSON": "flops_per_s: 1",
    "other schema": json.dumps(BODY | {"schema": 2}),
    "true is no schema": json.dumps(BODY | {"schema": True}),
    "no schema": json.dumps({"profile": BODY["profile"]}),
    "more": json.dumps(BODY | {"more": 1}),
    "no profile": json.dumps(BODY | {"profile": None}),
    "unknown field": json.dumps({"schema": 1, "profile": BODY["profile"] | {"tflops": 1}}),
    "5000 unknown fields": json.dumps({"schema": 1, "profile": {f"\x1b[31m{n}": n for n in range(5000)}}),
    "twice": MEASURED.to_json().replace('"unit"', '"unit": "s", "unit"'),
    "nested": "[" * 100_000,
    "nested objects": '{"a":' * 100_000,
    "nested in a field": with_field("sources", '{"a":' * 20_000 + "1" + "}" * 20_000),
    "large": MEASURED.to_json() + " " * MAX_FILE_BYTES,
    "many sources": with_field("sources", json.dumps({str(n): "x" for n in range(65)})),
    "long source": with_field("sources", json.dumps({"flops_per_s": "x" * 1001})),
    "long name": with_field("name", json.dumps("x" * 100_000)),
    "number as source": with_field("sources", '{"flops_per_s": 1}'),
    "control characters": with_field("name", '"\\u001b[31m"'),
    "half a character": with_field("name", '"\\ud800"'),
    **{
        f"flops_per_s {text}": with_field("flops_per_s", text)
        for text in (
            "NaN",
            "Infinity",
            "-1",
            "0",
            "1e999",
            "1e31",
            "1" * 400,
            "1" * 5000,
            "null",
            "true",
            '"1"',
            "[1]",
            "{}",
        )
    },
    **{f"width_tile {text}": with_field("width_tile", text) for text in ("1.0", "0", "-1", "65537", "null", "1e400")},
    **{f"element_bytes {text}": with_field("element_bytes", text) for text in ("1", "2.0", "true", "null", "[2]")},
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts(text, tmp_path):
    refused(Profile.from_json, text)
    file = tmp_path / "profile.json"
    file.write_text(text)
    refused(Profile.load, file)
    refused(profile_named, file)


def test_paths_that_are_no_profile(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opened for reading, it would block for ever
    (tmp_path / "latin").write_bytes(MEASURED.to_json().encode().replace(b"CPU", b"CP\xdc"))
    (tmp_path / "circle").symlink_to("circle")
    for name in ("pipe", "latin", "circle", "missing", "missing/profile.json", "x" * 300, "."):
        refused(Profile.load, f"{tmp_path}/{name}")
    for name, why in {"pipe": "not a reg", "latin": "not UTF-8", ".": "not a reg", "missing": "No such"}.items():
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{name}: {why}")):
            Profile.load(f"{tmp_path}/{name}")
    refused(Profile.load, "/dev/zero")


def read(text) -> Profile | None:
    """The profile of a text; None where it is refused as it should be. What is read can be planned with."""
    try:
        profile = Profile.from_json(text)
    except ValueError as error:
        assert type(error) is ValueError and str(error).isprintable() and len(str(error)) < MAX_MESSAGE
        return None
    cost = CostModel(profile, 1 << 24, expert_data_parallel_size=1 << 24, live_micro_batches=1e6)
    per_piece, per_width = cost.compute([0, 1e-300, 1, 1e18])
    assert np.isfinite(per_piece).all() and np.isfinite(per_width).all() and (per_width[1:] > 0).all()
    assert Profile.from_json(profile.to_json()) == profile
    return profile


def test_no_field_may_miss():
    for name in BODY["profile"]:
        body = copy.deepcopy(BODY)
        del body["profile"][name]
        assert read(json.dumps(body)) is None, name


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text() | JSON.map(json.dumps))
def test_what_is_no_profile(text):
    assert read(text) is None


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.sampled_from(list(BODY["profile"])), JSON, min_size=1, max_size=3))
def test_any_json_in_any_field(changes):
    read(json.dumps({"schema": 1, "profile": BODY["profile"] | changes}))


@pytest.mark.parametrize("seed", range(4))
def test_altered_characters(seed):
    rng, kept = random.Random(seed), 0
    for _ in range(500):
        chars = list(MEASURED.to_json())
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(chars))
            chars[place : place + rng.choice((0, 1, 1, 2, 40))] = rng.choice(BYTES)
        kept += read("".join(chars)) is not None
    assert 5 < kept < 400
