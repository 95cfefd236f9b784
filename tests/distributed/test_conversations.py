"""--sft: conversations are read, kept apart and learned."""

import argparse
import json

import pytest
import torch

from hmoe_megatron.data.conversations import check_conversations, mask_of, read_conversations
from tests.distributed.pretrain_run import pretrain
from tests.distributed.ranks import run_ranks
from tests.distributed.test_resume import step_lines
from tests.unit.evaluation.tiny import VOCABULARY, write_tokenizer


def conversation(*texts):
    roles = ["system"] + ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def write(path, *lines):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    return path


@pytest.fixture
def flags(tmp_path):
    data = write(tmp_path / "talk.jsonl", *[conversation("be brief", f"say {n}", f"{n}") for n in range(40)])
    write_tokenizer(tmp_path / "tokenizer")
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    return (
        f"--sft --tokenizer-type SFTTokenizer --tokenizer-model {tmp_path / 'tokenizer'} --split 1,0,0 "
        f"--sft-tokenizer-prompt-format default --data-path {data} --train-iters 6 "
        f"--vocab-size {VOCABULARY} --seq-length 64 --max-position-embeddings 64"
    )


def train(ranks, flags):
    return run_ranks(ranks, pretrain, flags, without=("--mock-data",))


def test_a_model_learns_conversations(flags):
    ranks = train(2, f"{flags} --pipeline-model-parallel-size 2")
    assert {rank.code for rank in ranks} == {0}
    losses = [float(loss) for _, loss, _ in step_lines(ranks[-1].output)]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5


@pytest.mark.campaign
def test_the_losses_are_those_of_one_rank(flags):
    one, two = train(1, flags), train(2, f"{flags} --expert-model-parallel-size 2")
    losses, over_ranks = ([float(loss) for _, loss, _ in step_lines(run[-1].output)] for run in (one, two))
    assert over_ranks == pytest.approx(losses, rel=1e-5) and len(losses) == 6


def alone_and_packed():
    """Logits of two conversations, each alone and both in one sequence under `mask_of`."""
    from tests.distributed.training_run import TINY, build

    args, _, model = build([*TINY, "--hmoe-widths", "16,32,48,64"])
    model.eval()
    tokens_S = torch.randint(0, args.vocab_size, (16,), generator=torch.Generator().manual_seed(0))
    place_S = torch.cat((torch.arange(6), torch.arange(10)))
    ends_BN = torch.tensor([[0, 6, 16, 16]])

    def logits(first, last, mask):
        return model(tokens_S[None, first:last], place_S[None, first:last], mask).detach()[0]

    with torch.no_grad():
        return logits(0, 6, None), logits(6, 16, None), logits(0, 16, mask_of(ends_BN, 16)), logits(0, 16, None)


def test_a_conversation_sees_nothing_of_those_before_it():
    ((first, second, packed, unmasked),) = run_ranks(1, alone_and_packed)
    assert torch.allclose(packed[:6], first, atol=1e-5)
    assert not torch.allclose(unmasked[6:], packed[6:], atol=1e-3)
    # Rotary positions go on over the sequence: what counts is their difference, which is the same.
    assert torch.allclose(packed[6:], second, atol=1e-5)


def test_the_mask():
    mask_SS = mask_of(torch.tensor([[0, 2, 3, 4, 4]]), 4)[0, 0]
    assert (~mask_SS).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "1: give {"),
        (b"[1]\n", "1: give {"),
        (b'{"messages": []}\n', "1: give {"),
        (b'{"messages": "hello"}\n', "1: give {"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}\n', "roles of system, user, assistant, tool"),
        (b'{"messages": [{"role": "user", "content": 3}]}\n', "text as content"),
        (b'\n{"messages": [{"role": "assistant", "content": "x"}]}\n', "2: an answer of the assistant is empty, or"),
        (b"[" * 100_000 + b"\n", "1: give {"),
        (b"\xff\n", "1: give {"),
        (b"\n\n", "no conversation is in it"),
    ],
)
def test_a_file_that_can_not_be_read_is_refused_with_its_line(tmp_path, line, said):
    path = tmp_path / "talk.jsonl"
    path.write_bytes(line)
    with pytest.raises(ValueError) as refused:
        read_conversations(path)
    assert str(refused.value).startswith(f"{path}:") and said in str(refused.value)


def test_every_file_is_looked_at_before_anything_starts(tmp_path):
    good = write(tmp_path / "good.jsonl", conversation("", "a", "b"))
    args = argparse.Namespace(
        data_path=[str(good), str(tmp_path / "missing.jsonl")],
        data_args_path=None,
        per_split_data_args_path=None,
        train_data_path=None,
        valid_data_path=None,
        test_data_path=None,
    )
    with pytest.raises(ValueError, match="missing.jsonl: No such file or directory: give the .jsonl file"):
        check_conversations(args)
