"""Flags that Megatron 0.19.2 parses and nothing of a run reads. A user who gives one expects something of it."""

from collections.abc import Iterator, Sequence

_REMEDIES = {
    "--rampup-batch-size": "use --step-batch-size-schedule",
    "--use-flash-attn": "the kernel of attention is chosen by --attention-backend",
    "--head-lr-mult": "use --decoupled-lr",
    "--dataloader-inter-document-masking": "use --reset-attention-mask and --reset-position-ids",
    "--exit-signal-handler-for-dataloader": "workers of a data loader end with their rank",
    "--per-dataset-sequences-path": "the index of a data set holds its length",
    "--iter-per-epoch": "give --train-iters",
}
# Of other models, or of programs that are not here. A name stands for all flags that begin with it.
_OTHERS = (
    "--bert- --biencoder- --block-data-path --classes-fraction --data-per-class-fraction --dino- --embedding-path "
    "--evidence-data-path --fim- --grpo- --ict- --indexer- --langrl-env-config --logits-load- --mask- --mtp-hybrid- "
    "--num-channels --num-classes --onnx-safe --output-bert-embeddings --perform-rl-step --query-in-block-prob "
    "--retriever- --rl- --short-seq-prob --swin- --titles-data-path --use-legacy-static-engine --use-one-sent-docs "
    "--vision- --vocab-extra-ids --inference-batch-times-seqlen-threshold --inference-dynamic-batching "
    "--inference-max-requests --inference-shards --inference-text-gen-server-logging --inference-wandb-logging "
    "--max-tokens-to-oom"
).split()


def unread_problems(argv: Sequence[str]) -> Iterator[str]:
    """A phrase for each of them that the user gave."""
    for word in argv:
        flag = word.partition("=")[0]
        plain = flag.replace("--no-", "--", 1)
        if remedy := _REMEDIES.get(flag):
            yield f"{flag} is read by nothing: {remedy}"
        elif any(plain == name or (name.endswith("-") and plain.startswith(name)) for name in _OTHERS):
            yield f"{flag} is read by nothing here, it is of another model or program: remove it"
