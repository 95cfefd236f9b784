"""Models as evaluation and generation see them. Legend: B rows of a batch, T tokens of a row, V vocabulary."""

from pathlib import Path

import torch

from hmoe_megatron.tools.evaluation.inputs import Source


class Model:
    """context: most tokens of a row of `logits`. vocabulary: ids from here on are padding. end_of_document: the id
    between documents in training. facts: what the results say of the model.

    encode: text to token ids, no token added that the tokenizer does not add by itself. decode: the other way; special
    tokens have no text. logits: int64 [B, T] to float32 [B, T, V] on any device, at each token those of the next one.
    """

    context: int
    vocabulary: int
    end_of_document: int
    facts: dict

    def next_logits(self, tokens: list[int]) -> torch.Tensor:
        """float32 [V]: those of the token after these, of which the last `context` are seen."""
        return self.logits(torch.tensor([tokens[-self.context :]]))[0, -1]


class MegatronModel(Model):
    """The last checkpoint of a run, whole in this process; its tokenizer is the run's. One a process."""

    def __init__(self, source: Source):
        from hmoe_megatron import machine

        machine.prepare_environment()
        from megatron.training import get_args, get_tokenizer

        from hmoe_megatron import training
        from hmoe_megatron.checkpoint import directory
        from hmoe_megatron.exits import RunEnded
        from hmoe_megatron.hf import one_process

        training.prepare()
        try:
            self.module = one_process.load_model(Path(source.path), list(source.flags))
        except RunEnded as error:
            raise ValueError(str(error)) from None
        args, self.tokenizer = get_args(), get_tokenizer()
        self.context = min(args.seq_length, args.max_position_embeddings or args.seq_length)
        self.vocabulary, self.end_of_document = self.tokenizer.vocab_size, self.tokenizer.eod
        iteration, _ = directory.find(args.load, args.ckpt_step)
        self.facts = {"iteration": iteration, **_facts(self.module)}
        self.device = torch.cuda.current_device()

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.tokenize(text))

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.detokenize([token for token in tokens if token != self.end_of_document])

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        tokens_BT = tokens_BT.to(self.device)
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        return self.module(tokens_BT, positions_BT, None)[..., : self.vocabulary].float()


class HuggingFaceModel(Model):
    """A directory that transformers loads: safetensors only, nothing from the network."""

    def __init__(self, source: Source):
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ValueError(f"needs transformers ({error}): pip install 'hmoe-megatron[hf]'") from None
        ours = {"trust_remote_code": source.trust_remote_code, "local_files_only": True}
        try:
            module = AutoModelForCausalLM.from_pretrained(source.path, dtype="auto", use_safetensors=True, **ours)
            self.tokenizer = AutoTokenizer.from_pretrained(source.path, **ours)
        except Exception as error:  # of a directory that anybody may have written
            raise ValueError(f"{source.path}: {type(error).__name__}: {error}") from error
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.module = module.eval().to(self.device)
        # A model may be wider than its tokenizer (padding), hardly the other way round.
        self.vocabulary, self.context = len(self.tokenizer), module.config.max_position_embeddings
        ends = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id)
        self.end_of_document = next((token for token in ends if token is not None), None)
        if self.end_of_document is None:
            raise ValueError("its tokenizer has neither an eos nor a bos token: name one in tokenizer_config.json")
        self.facts = {"model_type": module.config.model_type, **_facts(module)}
        self._cache, self._seen = None, []

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False)["input_ids"]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        logits_BTV = self.module(input_ids=tokens_BT.to(self.device), use_cache=False).logits
        return logits_BTV[..., : self.vocabulary].float()

    def next_logits(self, tokens: list[int]) -> torch.Tensor:
        """Keys and values are kept from one call to the next, as long as each goes on from the one before."""
        if len(tokens) > self.context:
            return super().next_logits(tokens)
        goes_on = self._cache is not None and tokens[: len(self._seen)] == self._seen and len(tokens) > len(self._seen)
        cache, at = (self._cache, len(self._seen)) if goes_on else (None, 0)
        given_BT = torch.tensor([tokens[at:]], device=self.device)
        found = self.module(input_ids=given_BT, past_key_values=cache, use_cache=True)
        self._cache, self._seen = getattr(found, "past_key_values", None), list(tokens)
        return found.logits[0, -1, : self.vocabulary].float()


def _facts(module: torch.nn.Module) -> dict:
    parameters = list(module.parameters())
    return {"parameters": sum(p.numel() for p in parameters), "dtype": str(parameters[0].dtype).removeprefix("torch.")}


def open_model(source: Source) -> Model:
    """Load it. Raises ValueError."""
    return MegatronModel(source) if source.kind == "load" else HuggingFaceModel(source)
