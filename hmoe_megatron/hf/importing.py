"""A Hugging Face directory to a checkpoint of pretrain_hmoe.py, in one process that holds the whole model.

The checkpoint is by logical expert, so any layout and plan loads it: with --finetune, for it has no optimizer state.
"""

import contextlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from hmoe_megatron.files import atomic_directory, open_regular, read_text
from hmoe_megatron.hf.architectures import Native
from hmoe_megatron.hf.forms import form_of
from hmoe_megatron.hf.model_settings import megatron_flags
from hmoe_megatron.hf.one_process import ONE_PROCESS, build_model
from hmoe_megatron.hf.shards import INDEX_FILE
from hmoe_megatron.hf.tensors import Part, blocks, check_complete, listed
from hmoe_megatron.hf.tokenizer_files import COPIED, has_the_ids_of, megatron_tokenizer

MAX_JSON_BYTES = 64 << 20
ARGS_FILE = "model.args"
ITERATION = 1  # a checkpoint has a number of at least 1
_ROTARY_TABLE = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


class Header(NamedTuple):
    """What a file says of a tensor. dtype: as safetensors names it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


class HFDirectory:
    """Config and tensors of a directory, untrusted: files only of its own, nothing unpickled or run."""

    def __init__(self, folder: Path):
        """Raises ValueError for what is no such directory, and lists tensors that are missing, unused or of the wrong
        shape."""
        self.folder = Path(folder)
        self.config = self._json("config.json")
        self.form: Native = form_of(self.config)
        self._headers = self._read_headers()
        named, self.form = self.form, self.form.as_stored(self._headers)
        self.is_less = self.form is not named  # than config.json names
        self._check()

    def _json(self, name: str) -> dict:
        path = self.folder / name
        try:
            value = json.loads(read_text(path, MAX_JSON_BYTES))
            if not isinstance(value, dict):
                raise ValueError("no JSON object")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}; give a directory with safetensors of transformers") from None
        return value

    def _read_headers(self) -> dict[str, Header]:
        """Of every tensor, each file opened once."""
        named = None
        if (self.folder / INDEX_FILE).exists():
            named = self._json(INDEX_FILE).get("weight_map")
            if not isinstance(named, dict) or not all(type(n) is str and n == Path(n).name for n in named.values()):
                raise ValueError(f"{self.folder / INDEX_FILE}: its weight_map names no plain files of the directory")
        held = {}
        for name in sorted(set(named.values())) if named is not None else ["model.safetensors"]:
            try:
                open_regular(self.folder / name).close()
                with safe_open(self.folder / name, framework="pt") as file:
                    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  not a dict
                    held |= {
                        (key, name): Header(self.folder / name, tuple(part.get_shape()), part.get_dtype())
                        for key, part in slices.items()
                    }
            except (ValueError, SafetensorError) as error:
                raise ValueError(f"{self.folder / name}: {error}") from None
        if named is not None:
            missing, unused = named.items() - held.keys(), held.keys() - named.items()
            check_complete(sorted(key for key, _ in missing), sorted(key for key, _ in unused), INDEX_FILE)
        return {key: header for (key, _), header in held.items()}

    def _check(self) -> None:
        wanted = {}
        for part in self._parts():
            for name, shape in zip(part.names, part.hf_shapes(), strict=True):
                packed = self.form.pack(name, torch.empty(shape, device="meta"))
                wanted[self.form.name(name)] = tuple(packed.shape)
        self._drop_copies()
        self._drop_rotary_tables()
        check_complete(
            sorted(wanted.keys() - self._headers.keys()), sorted(self._headers.keys() - wanted.keys()), str(self.folder)
        )
        wrong = [
            f"{name} is {list(self._headers[name].shape)}, not {list(shape)}"
            for name, shape in wanted.items()
            if self._headers[name].shape != shape
        ]
        if wrong:
            raise ValueError(f"{self.folder}: {listed(wrong, '; ')}")

    def _parts(self) -> Iterator[Part]:
        return (part for _, parts in blocks(self.form.model) for part in parts)

    def _drop_copies(self) -> None:
        """One matrix under several names: of layers that predict a token, and some write a tied head too. Raises
        ValueError if two differ."""
        copies = {copy: part.names[0] for part in self._parts() for copy in part.copies}
        if self.form.model.tied:
            copies["lm_head.weight"] = "model.embed_tokens.weight"
        for copy, name in copies.items():
            if {copy, name} <= self._headers.keys():
                with self.opened(copy) as ours, self.opened(name) as theirs:
                    if not torch.equal(ours[:], theirs[:]):
                        raise ValueError(f"{self.folder}: {copy} is not {name}: Megatron's model has one of them")
                del self._headers[copy]

    def _drop_rotary_tables(self) -> None:
        """transformers wrote them until 2023, as Llama 2's files have them; the configuration says what they are.

        Raises ValueError for frequencies that it does not say.
        """
        model = self.form.model
        expected = model.rope_theta ** -(torch.arange(0, model.head_dim, 2) / model.head_dim)
        for name in [name for name in self._headers if _ROTARY_TABLE.fullmatch(name)]:
            if name.endswith("inv_freq"):
                with self.opened(name) as rows:
                    found = rows[:].float()
                if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2):  # of bf16
                    raise ValueError(f"{self.folder}: {name} is not that of rope_theta {model.rope_theta:g}")
            del self._headers[name]

    def tensors(self) -> Iterator[tuple[Part, torch.Tensor]]:
        """Every Megatron tensor, one at a time. Raises ValueError for one that is not finite."""
        for part in self._parts():
            read = []
            for name in part.names:
                read.append(self.read(name))
                if not read[-1].isfinite().all():
                    raise ValueError(f"{self.folder}: {self.form.name(name)} is not finite")
            yield part, part.join(read)

    def read(self, name: str) -> torch.Tensor:
        """The tensor that we call so."""
        with self.opened(self.form.name(name)) as rows:
            return self.form.unpack(name, rows[:])

    @contextlib.contextmanager
    def opened(self, name: str):
        """The tensor that the directory calls so; only what is sliced of it is read."""
        with safe_open(self._headers[name].path, framework="pt") as file:
            yield file.get_slice(name)

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 or float32, which holds every value of all tensors that have no dtype of their own. Raises
        ValueError if neither does."""
        held = {header.dtype for header in self._headers.values()}
        if not held <= {"F32", "F16", "BF16"}:
            raise ValueError(f"{self.folder}: tensors of {', '.join(sorted(held))}: only F32, F16 and BF16")
        fixed = {self.form.name(name) for part in self._parts() if part.dtype for name in part.names}
        held = {header.dtype for name, header in self._headers.items() if name not in fixed}
        return torch.bfloat16 if held == {"BF16"} else torch.float32


def from_hf(
    source: HFDirectory, root: Path, tokenizer_flags: list[str], check: Callable = lambda folder, flags: None
) -> int:
    """Write the checkpoint of iteration ITERATION to `root`, which must be new; returns the number of tensors.

    tokenizer_flags: of Megatron's tokenizer; [] takes the directory's. check: called at the end with the directory,
    which then gets its name, and flags of the run for it; what it raises undoes all. Beside the checkpoint is
    ARGS_FILE, the model's flags. Raises ValueError or RunEnded, and leaves nothing if it fails.
    """
    from hmoe_megatron import training
    from hmoe_megatron.checkpoint import directory

    if not any(source.form.model.widths):
        raise ValueError(f"{source.folder}: a dense model has no experts to bring back: use upcycle")
    root = Path(root).absolute()
    with atomic_directory(root, "--save") as folder:
        with contextlib.redirect_stdout(sys.stderr):  # Megatron's set-up talks
            training.prepare()
            here = tokenizer_flags or _tokenizer(source, folder)
            if "NullTokenizer" not in here:
                megatron_tokenizer(here)
            # Rows that only pad the vocabulary are there again, whatever the size of tensor parallelism.
            here += ["--padded-vocab-size", str(source.form.model.vocabulary_rows)]
            dtype = ["--bf16"] if source.dtype == torch.bfloat16 else []
            described = [*megatron_flags(source.form.model), *dtype, *here]
            argv = [*described, *_ALONE, "--save", str(folder)]
            described = [word.replace(str(folder), str(root)) for word in described]
            written = _build_and_save(source, argv, described)
        (folder / ARGS_FILE).write_text(_args_text(described), encoding="utf-8")
        assert directory.complete_iterations(folder) == [ITERATION]
        check(folder, [*described, *here])
    return written


def _args_text(flags: list[str]) -> str:
    """A flag and its value a line, as examples/run.py and tools/launch.py read it."""
    lines = "\n".join(word if word.startswith("--") else f"\t{shlex.quote(word)}" for word in flags)
    return lines.replace("\n\t", " ") + "\n"


_ALONE = [
    word for word in ONE_PROCESS if word not in ("--no-load-optim", "--no-load-rng", "--exit-on-missing-checkpoint")
]
_ALONE += ["--save-interval", "1", "--no-save-optim", "--no-save-rng", "--dist-ckpt-optim-fully-reshardable"]


def _tokenizer(source: HFDirectory, root: Path) -> list[str]:
    """Flags of the directory's tokenizer, its files copied beside the checkpoint."""
    files = [name for name in (*COPIED, "tokenizer.model") if (source.folder / name).is_file()]
    if not files:
        return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(source.form.model.vocabulary_rows)]
    copies = root / "tokenizer"
    copies.mkdir()
    for name in files:
        shutil.copyfile(source.folder / name, copies / name)
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(copies / "tokenizer.model")]
    if "tokenizer.model" in files and ("tokenizer.json" not in files or has_the_ids_of(copies, flags)):
        return flags
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(copies)]


def _build_and_save(source: HFDirectory, argv: list[str], described: list[str]) -> int:
    from megatron.training import checkpointing

    from hmoe_megatron import training

    args, layout, model = build_model(argv)
    written = _fill(model, source)
    training.write_run(layout, Path(args.save), described)
    checkpointing.save_checkpoint(ITERATION, [model], None, None, 0)
    return written


@torch.no_grad()
def _fill(model: torch.nn.Module, source: HFDirectory) -> int:
    """Put every tensor where the model's own checkpoint would read it from."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    held: Mapping[str, list] = {}
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor):
            held.setdefault(shard.key, []).append(shard)
    missing, count = [], 0
    for part, tensor in source.tensors():
        key = next((key for key in part.keys if key in held), None)
        if key is None:
            missing.append(part.keys[0])
            continue
        for shard in held.pop(key):
            own = tuple(slice(at, at + size) for at, size in zip(shard.global_offset, shard.local_shape, strict=True))
            shard.data.copy_(tensor[own])
        count += 1
    check_complete(missing, sorted(held), "Megatron's model")
    return count
