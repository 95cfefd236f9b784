"""tiktoken's merging by ranks, without what it does around it."""

from collections.abc import Callable, Mapping

import numpy as np


def rank_encoder(pattern: str, ranks: Mapping[bytes, int]) -> Callable[[str], np.ndarray]:
    """Text -> uint32 ranks. What `pattern` does not match is dropped. Raises ImportError without tiktoken."""
    import tiktoken

    # Without a special token tiktoken's search for one matches before every character: half of its time. This one is
    # never allowed, so where the text has it, it is text.
    unused = {"<|unused|>": max(ranks.values()) + 1}
    encoding = tiktoken.Encoding("ranks", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=unused)
    buffer, none = encoding._core_bpe.encode_to_tiktoken_buffer, set()
    return lambda text: np.frombuffer(buffer(text, none), dtype=np.uint32)
