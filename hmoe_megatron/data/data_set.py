"""A data set on disk, .bin, .idx and the sidecar of tools/preprocess_data.py: what it says, whether it holds.

Imports no torch. All of it is untrusted: sizes are compared before anything is read by them.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hmoe_megatron.files import read_text, sha256_file
from hmoe_megatron.untrusted import near

HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, document borders: megatron's indexed_dataset
MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
MAX_SIDECAR_BYTES = 64 << 20  # it lists the inputs
AGAIN = "make or fetch it again"
SCHEMA = 2  # of the sidecar


def smallest_dtype(vocab_size: int) -> type:
    """What Megatron holds ids of such a vocabulary in."""
    return np.uint16 if vocab_size < 65500 else np.int32


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_texts(value) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _maps(holds: Callable) -> Callable:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


def _holds(found, path: list[str], holds: Callable) -> bool:
    """Whether the value under the keys of `path` is there and `holds`."""
    for name in path:
        if not isinstance(found, dict) or name not in found:
            return False
        found = found[name]
    return holds(found)


# What is read of a sidecar -> what it must be.
SIDECAR = {
    "outputs": _maps(lambda value: isinstance(value, dict)),
    "vocab_size": _is_count,
    "request.inputs": lambda value: isinstance(value, list),
    "request.tokenizer.type": _is_text,
    "request.tokenizer.model": lambda value: value is None or _is_text(value),
    "request.tokenizer.other_flags": _is_texts,
    "request.tokenizer.sha256": _maps(_is_text),
    "counts.records": _is_count,
    "counts.documents": _is_count,
    "counts.tokens": _is_count,
    "counts.bad_records": _maps(_is_count),
}


@dataclass(frozen=True)
class DataSet:
    """prefix: what --data-path takes. Raises ValueError, by every method, for files that do not hold together."""

    prefix: str

    @property
    def bin(self) -> Path:
        return Path(f"{self.prefix}.bin")

    @property
    def idx(self) -> Path:
        return Path(f"{self.prefix}.idx")

    def sidecar(self) -> dict | None:
        """What the sidecar says; None without one, or if another program wrote a file of that name."""
        path = Path(f"{self.prefix}.json")
        if not path.exists():
            return None
        try:
            found = json.loads(read_text(path, MAX_SIDECAR_BYTES))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}; {AGAIN}, or remove it to do without its checks") from None
        if not isinstance(found, dict) or not {"schema", "outputs", "request"} <= found.keys():
            return None
        wrong = [name for name, holds in SIDECAR.items() if not _holds(found, name.split("."), holds)]
        if found["schema"] != SCHEMA or wrong:
            what = f"its {', '.join(wrong)} can't be read" if wrong else f"is of version {found['schema']!s:.20}"
            raise ValueError(f"{path}: {what}; {AGAIN}, or remove it to do without its checks")
        return found

    def header(self) -> tuple[type, int, int]:
        """(dtype, sequences, document borders) of the index, whose size fits them."""
        try:
            with open(self.idx, "rb") as file:
                data = file.read(HEADER.size)
        except OSError as error:
            raise ValueError(
                f"{self.idx}: {error.strerror}{self._near()}; --data-path takes the name without .idx"
            ) from None
        if len(data) < HEADER.size or data[:9] != MAGIC:
            raise ValueError(f"{self.idx}: is no index of Megatron's; {AGAIN}")
        _, version, code, sequences, borders = HEADER.unpack(data)
        if version != VERSION or code not in DTYPES:
            raise ValueError(f"{self.idx}: version {version}, dtype {code}: of another version or damaged; {AGAIN}")
        expected = HEADER.size + 12 * sequences + 8 * borders
        actual = self.idx.stat().st_size
        if actual not in (expected, expected + sequences):  # multimodal ones hold a byte a sequence more
            raise ValueError(f"{self.idx}: has {actual} bytes, with {sequences} sequences it has {expected}; {AGAIN}")
        return DTYPES[code], sequences, borders

    def _near(self) -> str:
        """; did you mean NAME? where the folder holds one: tools/preprocess_data.py adds the key to a name."""
        folder, name = self.idx.parent, Path(self.prefix).name
        held = [path.stem for path in sorted(folder.glob("*.idx"))] if folder.is_dir() else []
        longer = [other for other in held if other.startswith(f"{name}_")]
        return f"; did you mean {folder / longer[0]}?" if longer else near(name, held, f"{folder}/")

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lengths, offsets in bytes, document borders), mapped from the index."""
        _, sequences, borders = self.header()
        whole = np.memmap(self.idx, mode="r")
        at = HEADER.size
        lengths = whole[at : at + 4 * sequences].view(np.int32)
        offsets = whole[at + 4 * sequences : at + 12 * sequences].view(np.int64)
        return lengths, offsets, whole[at + 12 * sequences : at + 12 * sequences + 8 * borders].view(np.int64)

    def check_lengths(self) -> dict | None:
        """Sizes of both files against each other and the sidecar, which is returned."""
        dtype, sequences, _ = self.header()
        lengths, offsets, _ = self.arrays()
        expected = int(offsets[-1]) + int(lengths[-1]) * np.dtype(dtype).itemsize if sequences else 0
        try:
            actual = self.bin.stat().st_size
        except OSError as error:
            raise ValueError(f"{self.bin}: {error.strerror}; {AGAIN}") from None
        if actual != expected:
            raise ValueError(f"{self.bin}: has {actual} bytes, its index says {expected}; {AGAIN}")
        sidecar = self.sidecar()
        for path in (self.bin, self.idx) if sidecar else ():
            said = self._output(sidecar, path, "bytes", _is_count)
            if path.stat().st_size != said:
                raise ValueError(f"{path}: has {path.stat().st_size} bytes, its sidecar says {said}; {AGAIN}")
        return sidecar

    def check_hashes(self) -> None:
        """Reads all of both files. Raises ValueError also without a sidecar to compare with."""
        sidecar = self.check_lengths()
        if sidecar is None:
            raise ValueError(
                f"{self.prefix}.json: missing or not of tools/preprocess_data.py: there is no hash to "
                "compare with; make the data again or leave --hmoe-verify-data out"
            )
        for path in (self.bin, self.idx):
            if sha256_file(path) != self._output(sidecar, path, "sha256", _is_text):
                raise ValueError(f"{path}: is altered (SHA-256 does not match its sidecar); {AGAIN}")

    def _output(self, sidecar: dict, path: Path, fact: str, holds: Callable) -> int | str:
        if not _holds(sidecar["outputs"], [path.name, fact], holds):
            raise ValueError(
                f"{self.prefix}.json: says nothing of {path.name}: is of another data set or damaged; {AGAIN}"
            )
        return sidecar["outputs"][path.name][fact]

    def check_structure(self) -> None:
        """Every number of the index: no length is negative, sequences stand behind each other, borders ascend."""
        dtype, sequences, _ = self.header()
        lengths, offsets, borders = self.arrays()
        sizes = lengths.astype(np.int64) * np.dtype(dtype).itemsize
        if (lengths < 0).any() or (offsets != np.cumsum(sizes) - sizes).any():
            raise ValueError(f"{self.idx}: its sequences do not stand behind each other; {AGAIN}")
        if not len(borders) or borders[0] != 0 or borders[-1] != sequences or (np.diff(borders) < 0).any():
            raise ValueError(f"{self.idx}: its document borders do not ascend from 0 to {sequences}; {AGAIN}")

    def check_tokenizer(self, sidecar: dict, kind: str, hashes: list[str], flags: str) -> None:
        """The data's tokenizer against that of a run: its type, the hashes of its files. flags: of the run's."""
        tokenizer = sidecar["request"]["tokenizer"]
        made_by, made_with = tokenizer["type"], sorted(tokenizer["sha256"].values())
        if (made_by, made_with) != (kind, sorted(hashes)):
            named = f"--tokenizer-type {made_by} --tokenizer-model {tokenizer['model']}"
            raise ValueError(
                f"{self.prefix}: was made with {named}, SHA-256 {_short(made_with)}, and this run has "
                f"{flags}, SHA-256 {_short(hashes)}: give the data's tokenizer, or prepare the data with "
                "the run's"
            )


def _short(hashes: list[str]) -> str:
    return ", ".join(sorted(sha256[:12] for sha256 in hashes)) or "of no file"
