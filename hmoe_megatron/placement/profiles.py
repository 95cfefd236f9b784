"""What the planner knows of the hardware: FLOPs alone, GPUs by published figures, or a measured profile's file."""

import json
import os
from dataclasses import dataclass, field

from hmoe_megatron.files import atomic_write, read_text
from hmoe_megatron.untrusted import checked_fields, is_text, names_of, near, parsed, plain, range_problems, shown

SCHEMA = 1
UNITS = ("s", "FLOPs")
ELEMENT_BYTES = (2, 4)
MAX_FILE_BYTES = 1 << 20
MAX_NAME_CHARS = 200
MAX_SOURCE_CHARS = 1000
MAX_SOURCES = 64
_RATE = (1e-3, 1e30)
_RANGES = {
    "flops_per_s": _RATE,
    "launch_s": (0.0, 1e6),
    "memory_bytes_per_s": _RATE,
    "activation_bytes_per_s": _RATE,
    "row_tile": (1, 1 << 20),
    "width_tile": (1, 1 << 16),
    "intra_node_bytes_per_s": _RATE,
    "inter_node_bytes_per_s": _RATE,
}


@dataclass(frozen=True)
class Profile:
    """Sustained rates of one rank at speed 1; None for a rate that is not known, which costs nothing.

    launch_s: fixed time of a piece, forward and backward. memory_bytes_per_s: at which weights are read and their
    gradients written; activation_bytes_per_s: at which activations pass between products. row_tile: a product of m
    rows takes the time of half a tile more; width_tile: widths count in whole tiles. intra_node_bytes_per_s and
    inter_node_bytes_per_s: what a rank receives from its own node and from others. element_bytes: 2 for bf16 with
    fp32 gradients, 4 for fp32. sources: where each number comes from.
    Raises ValueError that lists every field out of range.
    """

    name: str
    flops_per_s: float
    unit: str = "s"
    launch_s: float = 0.0
    memory_bytes_per_s: float | None = None
    row_tile: float = 1.0
    width_tile: int = 1
    intra_node_bytes_per_s: float | None = None
    inter_node_bytes_per_s: float | None = None
    element_bytes: int = 2
    activation_bytes_per_s: float | None = None
    sources: dict[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        problems = range_problems(self, _RANGES)
        if self.unit not in UNITS:
            problems.append(f"unit {shown(self.unit)} is not one of {', '.join(UNITS)}")
        if type(self.element_bytes) is not int or self.element_bytes not in ELEMENT_BYTES:
            problems.append(f"element_bytes {shown(self.element_bytes)} is not 2 (bf16) or 4 (fp32)")
        if not is_text(self.name, MAX_NAME_CHARS):
            problems.append(f"name {shown(self.name)} is not printable text of 1 to {MAX_NAME_CHARS} characters")
        if not (
            type(self.sources) is dict
            and len(self.sources) <= MAX_SOURCES
            and all(
                is_text(key, MAX_NAME_CHARS) and is_text(text, MAX_SOURCE_CHARS) for key, text in self.sources.items()
            )
        ):
            problems.append(
                f"sources is not an object of at most {MAX_SOURCES} printable texts of at most "
                f"{MAX_SOURCE_CHARS} characters"
            )
        if problems:
            raise ValueError("profile: " + "; ".join(problems))

    def to_dict(self) -> dict:
        return plain(self) | {"sources": dict(self.sources)}

    @classmethod
    def from_dict(cls, value) -> "Profile":
        """The profile of parsed JSON by `to_dict`. Raises ValueError that lists every problem found."""
        return cls(**checked_fields("profile", names_of(cls), value))

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, "profile": self.to_dict()}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Profile":
        """The profile of a text by `to_json`. Raises ValueError, and nothing else, whatever the text is."""
        body = checked_fields("profile", ("schema", "profile"), parsed("profile", text, MAX_FILE_BYTES))
        if type(body["schema"]) is not int or body["schema"] != SCHEMA:
            raise ValueError(f"profile: schema {shown(body['schema'])}: this version reads {SCHEMA}; measure again")
        return cls.from_dict(body["profile"])

    def save(self, path: str | os.PathLike) -> None:
        """Write the profile atomically."""
        atomic_write(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Profile":
        """The profile in a file. Raises ValueError with the path and what is wrong."""
        try:
            return cls.from_json(read_text(path, MAX_FILE_BYTES))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def profile_named(name_or_path: str | os.PathLike) -> Profile:
    """The profile of that name (`PROFILES`), else the one in that file. ValueError if there is neither."""
    if name_or_path in PROFILES:
        return PROFILES[name_or_path]
    try:
        return Profile.load(name_or_path)
    except ValueError as error:
        raise ValueError(
            f"hardware profile {error}{near(str(name_or_path), PROFILES)}; give {', '.join(PROFILES)}, or a file by "
            "tools/profile_hardware.py"
        ) from None


FLOPS = Profile("flops", flops_per_s=1.0, unit="FLOPs")

# Published figures. One is (number, where it comes from); rates are of one GPU and one direction of its links.
_ML_ENGINEERING = "ML Engineering, github.com/stas00/ml-engineering at 744d01e"
_NVLINK_SHARE = (0.80, f"{_ML_ENGINEERING}, network: all-gather 80 %, reduce-scatter 81 % on 8 H200")
_NIC_SHARE = (0.86, "DeepEP V1, docs/legacy.md: 43 of 50 GB/s between 16 H800 with ConnectX-7")
# What openxla/xla measured of 45 products in bf16 (256 to 4096 rows, 1024 to 4096 wide and deep) is 7.1 us and their
# FLOPs / 832e12, off by 4 % in the median.
_PRODUCT_S = (7.1e-6, "fixed part of our fit to times in openxla/xla, matmul_interpolator_data.h, sm_90")
_PRODUCTS = 6  # of a piece: 2 forward, 4 backward
_MEMORY_SHARE = (0.90, "an assumption")
_TILE = (128, "an assumption: the side that the largest tiles of cuBLAS share, 256 x 128 and 128 x 256")


# Of one GPU a second, in bf16 without sparsity; H800 and A800 compute as H100 and A100.
_PEAK_FLOPS = {"h100": 989.5e12, "h200": 989.5e12, "a100": 312e12, "b200": 2250e12}
_AS = {"h800": "h100", "a800": "a100"}


def peak_flops(device_name: str) -> float | None:
    """Of the GPU that calls itself so; None for one that is not known."""
    names = {name: name for name in _PEAK_FLOPS} | _AS
    return next((_PEAK_FLOPS[name] for known, name in names.items() if known in device_name.lower()), None)


def _gpu(name: str, flops, matmul_share, memory, nvlink, nic) -> Profile:
    """Peak rates and the share of `flops` that products reach; other shares, fixed times and tiles are one for all."""

    def sustained(peak, share):
        return peak[0] * share[0], f"{peak[0]:g} ({peak[1]}) times {share[0]:g} ({share[1]})"

    figures = {
        "flops_per_s": sustained(flops, matmul_share),
        "launch_s": (_PRODUCTS * _PRODUCT_S[0], f"{_PRODUCTS} products of {_PRODUCT_S[0]:g} s ({_PRODUCT_S[1]})"),
        "memory_bytes_per_s": sustained(memory, _MEMORY_SHARE),
        "activation_bytes_per_s": sustained(memory, _MEMORY_SHARE),
        "row_tile": _TILE,
        "width_tile": _TILE,
        "intra_node_bytes_per_s": sustained(nvlink, _NVLINK_SHARE),
        "inter_node_bytes_per_s": sustained(nic, _NIC_SHARE),
    }
    return Profile(
        name,
        **{rate: number for rate, (number, _) in figures.items()},
        sources={rate: source for rate, (_, source) in figures.items()},
    )


def _matmul_share(share: float, gpu: str) -> tuple[float, str]:
    return share, f"{_ML_ENGINEERING}, Maximum Achievable Matmul FLOPS: bf16, {gpu}"


_GPUS = (
    _gpu(
        "h100",
        flops=(
            _PEAK_FLOPS["h100"],
            "NVIDIA H100 datasheet, SXM: 1,979 TFLOP/s in bf16 with sparsity, half of it without",
        ),
        matmul_share=_matmul_share(0.803, "H100 SXM"),
        memory=(3.35e12, "NVIDIA H100 datasheet, SXM"),
        nvlink=(450e9, "NVIDIA H100 datasheet, SXM: 900 GB/s in both directions"),
        nic=(50e9, "NVIDIA DGX H100 user guide: one ConnectX-7 of 400 Gb/s for each GPU"),
    ),
    _gpu(
        "h200",
        flops=(
            _PEAK_FLOPS["h200"],
            "NVIDIA H200 datasheet, SXM: 1,979 TFLOP/s in bf16 with sparsity, half of it without",
        ),
        matmul_share=_matmul_share(0.803, "H100 SXM, H200 the same"),
        memory=(4.8e12, "NVIDIA H200 datasheet, SXM"),
        nvlink=(450e9, "NVIDIA H200 datasheet, SXM: 900 GB/s in both directions"),
        nic=(50e9, "NVIDIA DGX H100/H200 user guide: one ConnectX-7 of 400 Gb/s for each GPU"),
    ),
    _gpu(
        "a100",
        flops=(_PEAK_FLOPS["a100"], "NVIDIA A100 datasheet: bf16 without sparsity"),
        matmul_share=_matmul_share(0.869, "A100 SXM"),
        memory=(2.039e12, "NVIDIA A100 datasheet, SXM, 80 GB"),
        nvlink=(300e9, "NVIDIA A100 datasheet, SXM: 600 GB/s in both directions"),
        nic=(25e9, "NVIDIA DGX A100 datasheet: one ConnectX of 200 Gb/s for each GPU"),
    ),
    _gpu(
        "b200",
        flops=(
            _PEAK_FLOPS["b200"],
            "NVIDIA DGX B200 datasheet: 8 GPUs 72 PFLOP/s in FP8 with sparsity, a quarter in bf16 without",
        ),
        matmul_share=_matmul_share(0.776, "B200 SXM"),
        memory=(8e12, "NVIDIA DGX B200 datasheet: 8 GPUs 64 TB/s"),
        nvlink=(900e9, "NVIDIA DGX B200 datasheet: 8 GPUs 14.4 TB/s in both directions"),
        nic=(50e9, "NVIDIA DGX B200 datasheet: one ConnectX-7 of 400 Gb/s for each GPU"),
    ),
)
PROFILES = {profile.name: profile for profile in (FLOPS, *_GPUS)}
