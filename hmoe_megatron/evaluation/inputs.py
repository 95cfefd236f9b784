"""What is evaluated, and on which text. Imports no torch."""

import json
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hmoe_megatron.data_prep.sources import find_sources
from hmoe_megatron.data_prep.tokenizer_training import texts_of
from hmoe_megatron.flag_files import run_arguments

OFFLINE = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")


def go_offline() -> None:
    """Before transformers, datasets or lm-eval is imported: they read this once."""
    os.environ.update(OFFLINE, TOKENIZERS_PARALLELISM="false")


@dataclass(frozen=True)
class Source:
    """What to evaluate. kind: "load", the --save directory of a run, or "hf", a Hugging Face directory."""

    kind: str
    path: str
    flags: tuple[str, ...] = ()
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raise ValueError for what can't be it, before anything is imported for it."""
        path = Path(self.path)
        if not path.is_dir():
            raise ValueError(f"--{self.kind} {path}: no such directory")
        if self.kind == "load":
            run_arguments(path)
        else:
            self._check_code(path)

    def _check_code(self, path: Path) -> None:
        try:
            settings = json.loads((path / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"--hf {path}: config.json can't be read ({error}): give a model's directory") from None
        if not isinstance(settings, dict):
            raise ValueError(f"--hf {path}: config.json is no JSON object: give a model's directory")
        if "auto_map" in settings and not self.trust_remote_code:
            raise ValueError(f"--hf {path}: its model is code in that directory, which would be run: read its "
                             "*.py files and give --trust-remote-code")  # fmt: skip


def read_documents(pattern: str, json_key: str, limit: int | None) -> list[str]:
    """The first `limit` documents of a file, or of the files of a pattern. Raises ValueError."""
    texts = list(islice(texts_of(find_sources([pattern]), json_key), limit))
    if not any(texts):
        raise ValueError(f"--input {pattern}: no text in it: give held-out text")
    return texts
