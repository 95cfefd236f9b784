"""What is evaluated, and on which text. Imports no torch."""

import json
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hmoe_megatron.flag_files import run_arguments


def go_offline() -> None:
    """Before transformers, datasets or lm-eval is imported: they read this once."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    os.environ.update(offline, TOKENIZERS_PARALLELISM="false")


@dataclass(frozen=True)
class Source:
    """What to evaluate. kind: "load", the --save directory of a run, or "hf", a Hugging Face directory."""

    kind: str
    path: str
    flags: tuple[str, ...] = ()
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raise ValueError for what can't be it, before anything is imported for it."""
        if not Path(self.path).is_dir():
            raise ValueError(f"--{self.kind} {self.path}: no such directory")
        if self.kind == "load":
            run_arguments(Path(self.path))
        else:
            self._check_code()

    def _check_code(self) -> None:
        try:
            settings = json.loads(Path(self.path, "config.json").read_bytes())
            if not isinstance(settings, dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError) as error:
            message = f"--hf {self.path}: config.json can't be read ({error}): give a model's directory"
            raise ValueError(message) from None
        if "auto_map" in settings and not self.trust_remote_code:
            code = "its model is code in that directory, which would be run"
            raise ValueError(f"--hf {self.path}: {code}: read its *.py files and give --trust-remote-code")


def read_documents(pattern: str, json_key: str, limit: int | None) -> list[str]:
    """The first `limit` documents of a file, or of the files of a pattern. Raises ValueError."""
    from hmoe_megatron.tools.data_prep.sources import find_sources
    from hmoe_megatron.tools.data_prep.tokenizer_training import texts_of

    texts = list(islice(texts_of(find_sources([pattern]), json_key), limit))
    if not any(texts):
        raise ValueError(f"--input {pattern}: no text in it: give held-out text")
    return texts
