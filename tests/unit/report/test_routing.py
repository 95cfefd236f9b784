"""What is collected from a real checkpoint, on one rank: the model's own losses and routing, token by token."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hmoe_megatron.tools.report import routing as collect
from hmoe_megatron.tools.report.statistics import Routing
from tests.distributed.pretrain_run import pretrain
from tests.distributed.ranks import run_ranks
from tests.distributed.training_run import EXPERTS, HIDDEN, LAYERS, SEQUENCE, VOCABULARY

TOP_P = 0.6
TOP_P_FLAGS = f"--hmoe-router topp --hmoe-top-p {TOP_P}"
LENGTHS = (SEQUENCE, 3, 3, 3, 1, SEQUENCE - 1, 7)
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # fp32 sums of other shapes, through two layers


def windows():
    random = np.random.default_rng(7)
    return [random.integers(0, VOCABULARY - 1, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "a"
    (ended,) = run_ranks(1, pretrain, f"--train-iters 4 --save-interval 4 --save {root} {TOP_P_FLAGS}")
    assert ended.code == 0, ended.output[-3000:]
    return root


def on_rank(root):
    """(Model, Routing of a batch, Routings of each window alone, losses from logits of each window, weights)."""
    from hmoe_megatron.hf.one_process import load_model
    from hmoe_megatron.training import prepare

    prepare()
    model = load_model(Path(root))
    batch = collect.collect(model, windows())
    alone = [collect.collect(model, [window]) for window in windows()]
    losses, hooks = [], [len(router._forward_hooks) for router in collect.routers(model)]
    with torch.no_grad():
        for window in windows():
            token_BS = torch.tensor([window])
            logits_SV = model(token_BS, torch.arange(len(window))[None], None)[0]
            loss = torch.nn.functional.cross_entropy(logits_SV[:-1].float(), token_BS[0, 1:], reduction="none")
            losses.append(loss.numpy())
    return collect.facts(model), batch, alone, losses, hooks, collect.run_tokenizer(root)[1]


@pytest.fixture(scope="module")
def found(run):
    return run_ranks(1, on_rank, str(run))[0]


def test_the_facts_are_those_of_the_flags(found):
    model, *_, hooks, context = found
    assert model.layer_L.tolist() == list(range(LAYERS)) and model.hidden_size == HIDDEN and context == SEQUENCE
    assert model.width_LE.tolist() == [[16, 32, 48, 64]] * LAYERS
    assert hooks == [0] * LAYERS, "hooks stay on the model"


def test_tokens_and_windows_are_those_given(found):
    routing = found[1]
    assert routing.token_T.tolist() == sum(windows(), [])
    assert np.bincount(routing.window_T).tolist() == list(LENGTHS)
    assert routing.chosen_TLE.shape == routing.log_probs_TLE.shape == (sum(LENGTHS), LAYERS, EXPERTS)


def test_losses_are_those_of_the_logits_on_the_token_itself(found):
    _, routing, _, losses, *_ = found
    for number, expected in enumerate(losses):
        loss = routing.loss_T[routing.window_T == number]
        assert np.isnan(loss[0])
        np.testing.assert_allclose(loss[1:], expected, **ROUNDING)


def test_no_window_of_a_batch_sees_another(found):
    _, routing, alone, *_ = found
    for number, one in enumerate(alone):
        mine = routing.window_T == number
        np.testing.assert_allclose(routing.log_probs_TLE[mine], one.log_probs_TLE, **ROUNDING)
        np.testing.assert_array_equal(routing.chosen_TLE[mine], one.chosen_TLE)
        np.testing.assert_allclose(routing.loss_T[mine], one.loss_T, **ROUNDING)


def test_the_choice_is_top_p_of_the_probabilities(found):
    from hmoe_megatron.moe.router import top_p_routing

    routing = found[1]
    probs_TLE = np.exp(routing.log_probs_TLE)
    np.testing.assert_allclose(probs_TLE.sum(-1), 1, rtol=1e-5)
    _, chosen_XE = top_p_routing(torch.from_numpy(probs_TLE).reshape(-1, EXPERTS), TOP_P)
    np.testing.assert_array_equal(chosen_XE.numpy().reshape(routing.chosen_TLE.shape), routing.chosen_TLE)
    assert 1 < routing.chosen_TLE.sum(-1).mean() < EXPERTS, "a choice that is always the same shows nothing"


def test_too_many_numbers_are_refused_before_a_forward_pass(monkeypatch):
    monkeypatch.setattr(collect, "facts", lambda model: SimpleNamespace(width_LE=np.ones((2, 4))))
    monkeypatch.setattr(collect, "MAX_NUMBERS", 80)
    with pytest.raises(ValueError, match="11 tokens x 8 experts are too many: --tokens 10"):
        collect.collect(None, [[1] * 11])


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="no layer with HMoE experts"):
        collect.facts(torch.nn.Linear(2, 2))


def test_token_texts_keep_the_space_of_sentencepiece():
    pieces = ["\u2581the", "re", "<0x0A>"]
    library = SimpleNamespace(ids_to_tokens=lambda ids: [pieces[i] for i in ids])
    tokenizer = SimpleNamespace(library="sentencepiece", _tokenizer=library)
    assert collect.token_texts(tokenizer, [0, 2]) == [" the", "<0x0A>"]
    other = SimpleNamespace(library="huggingface", detokenize=lambda ids: f" {ids[0]}")
    assert collect.token_texts(other, np.array([5, 6])) == [" 5", " 6"]


def test_the_reports_routing_is_what_statistics_take(found):
    assert isinstance(found[1], Routing) and found[1].chosen_TLE.dtype == bool
    assert found[1].log_probs_TLE.dtype == found[1].loss_T.dtype == np.float32
