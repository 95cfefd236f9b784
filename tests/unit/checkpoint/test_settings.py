"""What of two runs' settings keeps the one from going on with the other's checkpoint."""

from argparse import Namespace

import pytest

from hmoe_megatron.checkpoint.settings import differences, model_settings, plain, tokenizer_sha256

ARGS = {
    "num_layers": 2,
    "hidden_size": 32,
    "vocab_size": 128,
    "tokenizer_type": "NullTokenizer",
    "rotary_base": 10000,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_z_loss_coeff": None,
    "moe_layer_freq": 1,
    "hmoe_router": "topk",
    "hmoe_top_p": None,
    "hmoe_p_penalty_coeff": 0.1,
    "hmoe_placement": "auto",
    "expert_model_parallel_size": 2,
    "lr": 1e-3,
    "min_lr": 0.0,
    "lr_decay_style": "cosine",
    "train_iters": 20,
    "global_batch_size": 8,
    "weight_decay": 0.01,
    "weight_decay_incr_style": "constant",
    "optimizer": "adam",
    "bf16": False,
    "use_distributed_optimizer": False,
    "no_save_optim": None,
    "tokenizer_model": None,
    "moe_router_score_function": "softmax",
}
WIDTHS = {0: (16, 32), 1: (24, 24)}


def settings(widths=WIDTHS, **changed):
    return model_settings(Namespace(**{**ARGS, **changed}), widths)


@pytest.mark.parametrize(
    ("changed", "phrase"),
    [
        ({"num_layers": 3}, "--num-layers: 2 in the checkpoint, 3 now"),
        ({"vocab_size": 300}, "--vocab-size: 128 in the checkpoint, 300 now"),
        ({"moe_router_topk": 1}, "--moe-router-topk: 2 in the checkpoint, 1 now"),
        ({"moe_router_score_function": "sigmoid"}, "--moe-router-score-function: softmax"),
        ({"hmoe_router": "topp"}, "--hmoe-router: topk"),
        ({"hmoe_top_p": 0.6}, "--hmoe-top-p: None in the checkpoint, 0.6 now"),
        ({"rotary_base": 500000}, "--rotary-base"),
        (
            {"widths": {0: (16, 32), 1: (16, 32)}},
            "expert_widths of layer 1 (--hmoe-widths): [24, 24] in the checkpoint, [16, 32] now",
        ),
        ({"widths": {0: (16, 32)}}, "expert-widths"),
    ],
)
def test_another_model_is_named(changed, phrase):
    found = differences(settings(), settings(**changed))
    assert len(found.model) == 1 and phrase in found.model[0] and [*found.optimizer, *found.reported] == []


@pytest.mark.parametrize(
    "changed",
    [{"moe_token_dispatcher_type": "allgather"}, {"hmoe_placement": "plan.json"}, {"expert_model_parallel_size": 4}],
)
def test_another_plan_or_layout_is_no_difference(changed):
    assert differences(settings(), settings(**changed)) == ([], [], [], [])


@pytest.mark.parametrize(
    ("changed", "phrase"),
    [
        ({"lr": 1.0}, "--lr: 0.001 in the checkpoint, 1.0 now"),
        ({"train_iters": 24}, "--lr-decay-iters: 20 x 8 samples in the checkpoint, 24 x 8 samples now"),
        ({"global_batch_size": 16}, "--train-iters: 20 x 8 samples in the checkpoint, 20 x 16 samples now"),
        ({"lr_warmup_fraction": 0.1}, "--lr-warmup-iters: 0 x 8 samples in the checkpoint, 2 x 8 samples now"),
        ({"weight_decay": 0.1}, "--weight-decay: 0.01 in the checkpoint, 0.1 now"),
        ({"train_iters": None, "train_samples": 160}, "--train-samples: None in the checkpoint, 160 samples now"),
    ],
)
def test_another_schedule_is_named_by_its_flags(changed, phrase):
    found = differences(settings(), settings(**changed))
    assert phrase in found.schedule and [*found.model, *found.optimizer, *found.reported] == []


@pytest.mark.parametrize(
    ("changed", "phrase"),
    [
        ({"bf16": True}, "--bf16: False in the checkpoint, True now"),
        ({"optimizer": "sgd"}, "--optimizer: adam in the checkpoint, sgd now"),
        ({"use_distributed_optimizer": True}, "--use-distributed-optimizer: False in the checkpoint, True now"),
    ],
)
def test_another_form_of_the_optimizer_state_is_named(changed, phrase):
    found = differences(settings(), settings(**changed))
    assert found.optimizer == [phrase] and [*found.model, *found.schedule, *found.reported] == []


def test_a_checkpoint_without_optimizer_state():
    found = differences(settings(no_save_optim=True), settings())
    assert found.optimizer == ["there is none in the checkpoint"] and found.model == []
    assert differences(settings(), settings(no_save_optim=True)) == ([], [], [], [])


def test_training_settings_are_told():
    found = differences(settings(), settings(hmoe_p_penalty_coeff=0.2, moe_z_loss_coeff=1e-3))
    assert found.model == []
    assert sorted(found.reported) == [
        "--hmoe-p-penalty-coeff: 0.1 in the checkpoint, 0.2 now",
        "--moe-z-loss-coeff: None in the checkpoint, 0.001 now",
    ]


def test_fine_tuning_may_change_what_the_weights_compute_but_not_what_they_are():
    found = differences(settings(), settings(moe_router_topk=1, num_layers=3), finetune=True)
    ((refused,), (told,)) = found.model, found.reported
    assert "--num-layers" in refused and "--moe-router-topk" in told


def test_all_differences_are_listed():
    assert len(differences(settings(), settings(num_layers=3, hidden_size=64, hmoe_router="topp")).model) == 3


def test_a_setting_that_one_side_does_not_know_is_none():
    saved = settings()
    del saved["moe_router_topk"]
    assert differences(saved, settings()) == ([], [], [], [])


def test_every_moe_and_hmoe_setting_is_kept():
    assert {name for name in ARGS if name.startswith(("moe_", "hmoe_"))} <= settings().keys()


def test_tokenizers(tmp_path):
    def sha256(**files):
        return tokenizer_sha256(Namespace(**{"tokenizer_model": None, "vocab_file": None, "merge_file": None} | files))

    model, folder = tmp_path / "a.model", tmp_path / "hf"
    model.write_text("one")
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    before = sha256(tokenizer_model=str(model)), sha256(tokenizer_model=str(folder)), sha256(vocab_file=str(model))
    assert before[0] == before[2] != before[1] and None not in before
    model.write_text("two")
    (folder / "tokenizer.json").write_text("{ }")
    assert sha256(tokenizer_model=str(model)) != before[0] and sha256(tokenizer_model=str(folder)) != before[1]
    assert sha256() is None and sha256(tokenizer_model="gpt2") is None
    refused = differences(settings(tokenizer_model=None), settings(tokenizer_model=str(model))).model
    assert len(refused) == 1 and refused[0].startswith("tokenizer: SHA-256 None in the checkpoint")


def test_values_are_made_plain():
    assert plain({1: (1, 2.5, None, True)}) == {"1": [1, 2.5, None, True]}
    assert plain(Namespace(a=1)) == "Namespace(a=1)"
