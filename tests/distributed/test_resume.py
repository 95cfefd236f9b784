"""What a run does with the checkpoint that --load names: goes on, or says in one line why it can't."""

import contextlib
import functools
import json
import re
import shutil

import pytest
import torch

from hmoe_megatron.checkpoint import directory, lock
from hmoe_megatron.checkpoint.run_flags import with_checkpoint_flags
from hmoe_megatron.files import PLAN_FILE, RUN_ARGUMENTS_FILE
from tests.distributed.plans import cut, save_plan
from tests.distributed.pretrain_run import pretrain, start
from tests.distributed.ranks import run_ranks
from tests.distributed.training_run import LAYERS, steps
from tests.rows import rarely

STEPS = "--save-interval 2 --override-opt_param-scheduler --train-iters"
WIDTHS = "--hmoe-widths 16,32,48,64"
EP2 = "--expert-model-parallel-size 2"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of 4 steps under EP 2 with cut experts, checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    pieces = cut(((3, 0, 24), (0, 0, 16), (2, 0, 16)), ((1, 0, 32), (2, 16, 48), (3, 24, 64)))
    plan = save_plan(folder / "plan.json", *[pieces] * LAYERS)
    root = folder / "run"
    ended = run_ranks(2, pretrain, f"{STEPS} 4 --save {root} --load {root} {EP2} --hmoe-placement {plan}")
    assert [rank.code for rank in ended] == [0, 0]
    return root


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def go_on(root, flags=EP2, ranks=2, steps=6):
    return run_ranks(ranks, pretrain, f"{STEPS} {steps} --load {root} {flags}")


def refused(ended, code=3):
    """The one line that a run which refused its checkpoint says; all ranks end alike, and no traceback is printed."""
    assert [rank.code for rank in ended] == [code] * len(ended)
    (line,) = [line for rank in ended for line in rank.errors()]
    assert not any("Traceback" in rank.output for rank in ended)
    return line


def test_a_resume_says_what_it_checked(copy):
    ended = go_on(copy)
    assert [rank.code for rank in ended] == [0, 0]
    assert f" {copy}/iter_0000004: SHA-256 of " in ended[0].output and "checked in " in ended[0].output
    assert "at iteration 4" in ended[0].output and "iteration        5/" in ended[1].output


@pytest.mark.parametrize(
    ("damage", "said"),
    [  # other damage: tests/faults
        pytest.param(
            lambda path: (path / "__1_0.distcp").unlink(), "__1_0.distcp: No such file", marks=pytest.mark.campaign
        ),
        (
            lambda path: alter(path / "__0_0.distcp", lambda text: text[:5000] + bytes(64) + text[5064:]),
            "__0_0.distcp is altered (SHA-256 does not match)",
        ),
        pytest.param(
            lambda path: alter(path / ".metadata", lambda text: text[:-1]), ".metadata has ", marks=pytest.mark.campaign
        ),
        (lambda path: (path / directory.MANIFEST_FILE).unlink(), "hmoe_manifest.json is missing: not a complete"),
        (lambda path: shutil.rmtree(path), "iter_0000004: missing, and latest_checkpointed_iteration.txt names it"),
    ],
    ids=["missing shard", "altered shard", "metadata", "manifest", "directory"],
)
def test_damage_is_named_and_the_checkpoint_before_it_loads(copy, damage, said):
    damage(directory.checkpoint_path(copy, 4))
    line = refused(go_on(copy))
    assert said in line and str(copy) in line and "--ckpt-step N" in line
    assert [rank.code for rank in go_on(copy, f"{EP2} --ckpt-step 2", steps=3)] == [0, 0]


def alter(path, change):
    path.write_bytes(change(path.read_bytes()))


def test_a_start_that_fails_leaves_the_files_of_the_run(copy):
    def files():
        return {name: (copy / name).read_bytes() for name in (PLAN_FILE, RUN_ARGUMENTS_FILE, directory.TRACKER_FILE)}

    before, path = files(), directory.checkpoint_path(copy, 4) / "__0_0.distcp"
    whole = path.read_bytes()
    flags = f"{EP2} --save {copy} --hmoe-placement contiguous"
    path.write_bytes(whole[:5000] + bytes(64) + whole[5064:])
    assert "altered" in refused(go_on(copy, flags)) and files() == before
    path.write_bytes(whole)
    assert [rank.code for rank in go_on(copy, f"{flags} --data-cache-path /dev/null --train-data-path no")] != [0, 0]
    assert files() == before
    assert [rank.code for rank in go_on(copy, flags)] == [0, 0]
    assert all(files()[name] != before[name] for name in before)


def test_the_impatient_load_it_unchecked(copy):
    path = directory.checkpoint_path(copy, 4)
    (path / directory.MANIFEST_FILE).unlink()
    ended = go_on(copy, f"{EP2} --hmoe-skip-integrity", steps=5)
    assert [rank.code for rank in ended] == [0, 0] and "SHA-256" not in ended[0].output
    alter(path / "__1_0.distcp", lambda text: text[: len(text) // 2])
    said = [line for rank in go_on(copy, f"{EP2} --hmoe-skip-integrity") for line in rank.errors()]
    assert said and "beyond the end of __1_0.distcp" in said[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--vocab-size 300", "--vocab-size: 128 in the checkpoint, 300 now"),
        ("--hmoe-widths 16,32,64,48", "expert_widths of layer 0 (--hmoe-widths): [16, 32, 48, 64] in the checkpoint"),
        ("--moe-router-topk 1 --moe-router-pre-softmax", "--moe-router-topk: 2 in the checkpoint, 1 now"),
        ("--hmoe-router topp --hmoe-top-p 0.6", "--hmoe-top-p: None in the checkpoint, 0.6 now"),
        ("--num-layers 3", "--num-layers: 2 in the checkpoint, 3 now"),
    ],
)
def test_another_model_is_refused_before_anything_starts(saved, flags, said):
    (ended,) = go_on(saved, flags, ranks=1)
    line = refused([ended])
    assert said in line and "is of another model" in line
    assert "initialize" not in ended.output and "setting random seeds" not in ended.output


def test_all_differences_are_listed_at_once(saved):
    line = refused(go_on(saved, "--num-layers 3 --vocab-size 300", ranks=1))
    assert "--num-layers" in line and "--vocab-size" in line


@pytest.mark.parametrize("world", [1, 2])
def test_another_layout_and_plan_is_no_difference(saved, world):
    ended = go_on(saved, "--hmoe-p-penalty-coeff 0.2", ranks=world)  # EP 1, whole experts
    assert [rank.code for rank in ended] == [0] * world
    assert " goes on with other settings: --hmoe-p-penalty-coeff: 0.1 in the checkpoint, 0.2 now" in ended[0].output


def test_the_vocabulary_keeps_its_rows_under_tensor_parallelism(saved):
    """Megatron pads it by the tensor-parallel size: the new rows would be random, and in the softmax."""
    loss = r"iteration +5/.* lm loss: (\S+) "
    alone, divided = go_on(saved, "", 1, 5), go_on(saved, "--tensor-model-parallel-size 2 --sequence-parallel", 2, 5)
    losses = [float(re.search(loss, ranks[-1].output)[1]) for ranks in (alone, divided)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_another_schedule_is_refused_with_the_flag_that_takes_it(saved):
    (ended,) = run_ranks(1, pretrain, f"--train-iters 6 --load {saved}")
    line = refused([ended])
    assert "--lr-decay-iters: 4 x 8 samples in the checkpoint, 6 x 8 samples now" in line
    assert "--override-opt_param-scheduler to go on with the new one" in line


FORMS = ["", "--bf16", "--use-distributed-optimizer", "--bf16 --use-distributed-optimizer"]


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3], *rarely(*FORMS[1:3])])
def test_the_learning_rate_changes_at_a_resume_and_the_moments_stay(tmp_path, form):
    flags = f"{WIDTHS} {form} --lr 2e-3 --min-lr 1e-3 --lr-decay-style cosine --adam-beta2 0.99"
    (before,) = run_ranks(1, steps, f"{flags} --save {tmp_path} --save-interval 1000", 2, save=True)
    new = "--lr 5e-4 --min-lr 5e-4 --lr-decay-style linear --adam-beta2 0.9"
    for choice, rates in (("override", [5e-4]), ("use-checkpoint", before["learning_rates"])):
        given = f"{flags} {new} --{choice}-opt_param-scheduler --load {tmp_path}"
        (after,) = run_ranks(1, steps, given, 1, skip=2)
        assert same_states(after["loaded"]["optimizer"], before["optimizer"])
        assert after["loaded"]["learning_rates"] == pytest.approx(rates, rel=1e-12)
        assert max(after["adam_steps"]) == 3.0 and after["losses"][0] < before["losses"][0]


def same_states(states, others):
    assert states.keys() == others.keys() and states["exp_avg"]["experts"]
    return all(
        torch.equal(value.nan_to_num(), others[kind][part][name].nan_to_num())
        for kind, parts in states.items()
        for part in ("dense", "experts")
        for name, value in parts[part].items()
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--bf16", "--bf16: False in the checkpoint, True now"),
        ("--use-distributed-optimizer", "--use-distributed-optimizer: False in the checkpoint, True now"),
        ("--optimizer sgd", "--optimizer: adam in the checkpoint, sgd now"),
    ],
)
def test_another_form_of_optimizer_is_named_and_the_weights_can_be_taken(saved, flags, said):
    line = refused(go_on(saved, flags, ranks=1))
    assert said in line and "or --no-load-optim to go on with its weights" in line
    (ended,) = go_on(saved, f"{flags} --no-load-optim", ranks=1)
    assert ended.code == 0 and "iteration        5/" in ended.output, ended.output[-3000:]
    assert f" goes on with other settings: {said}" in ended.output


def test_a_checkpoint_without_optimizer_state(tmp_path):
    (ended,) = run_ranks(1, pretrain, f"--train-iters 2 --save-interval 2 --no-save-optim --save {tmp_path}")
    assert ended.code == 0
    line = refused(go_on(tmp_path, "", ranks=1))
    assert "its optimizer state can't be read: there is none in the checkpoint" in line and "--no-load-optim" in line
    assert go_on(tmp_path, "--no-load-optim", ranks=1)[0].code == 0


def test_the_plan_of_the_checkpoint(saved):
    ended = go_on(saved, f"{EP2} --hmoe-placement checkpoint")
    assert [rank.code for rank in ended] == [0, 0] and "3[24:64)" in ended[0].output
    line = refused(go_on(saved, "--hmoe-placement checkpoint", ranks=1), code=2)
    assert "made for 2 ranks" in line
    (alone,) = run_ranks(1, pretrain, "--train-iters 1 --hmoe-placement checkpoint")
    assert "needs --load" in refused([alone], code=2)


def test_nothing_to_load(tmp_path):
    line = refused(go_on(tmp_path / "nowhere", "", ranks=1))
    assert f"--load {tmp_path}/nowhere does not exist: give the directory" in line
    line = refused(go_on(tmp_path, "", ranks=1))
    assert f"--load {tmp_path}: no checkpoint is there" in line
    (tmp_path / "iter_0000024").mkdir()
    (tmp_path / "iter_0000024" / directory.MANIFEST_FILE).touch()
    line = refused(go_on(tmp_path / "iter_0000024", "", ranks=1))
    assert f"is one checkpoint: give its run, --load {tmp_path} --ckpt-step 24" in line
    (tmp_path / directory.TRACKER_FILE).write_text("")
    line = refused(go_on(tmp_path, f"--save {tmp_path}", ranks=1))
    assert "latest_checkpointed_iteration.txt is empty: write the number" in line


def test_a_run_that_loads_where_it_saves_starts_anew_in_an_empty_directory(tmp_path):
    root = tmp_path / "new" / "run"
    (ended,) = go_on(root, f"--save {root}", ranks=1, steps=2)
    assert ended.code == 0 and directory.find(root)[0] == 2
    (ended,) = go_on(tmp_path / "other", f"--save {tmp_path / 'other'} --exit-on-missing-checkpoint", ranks=1)
    assert "other does not exist" in refused([ended]) and not (tmp_path / "other").exists()


def test_the_checkpoints_of_another_run_are_not_overwritten(saved):
    (ended,) = run_ranks(1, pretrain, f"{STEPS} 4 --save {saved}")
    assert "holds the checkpoints of a run (the last: iteration 4)" in refused([ended], code=2)


def wait_a_second():
    """And not ten for a run that may be about to end."""
    lock.hold = functools.partial(lock.hold, wait_s=1.0)


def test_a_second_run_into_one_directory_is_refused(copy):
    held = lock.hold(copy)
    with contextlib.closing(held):
        (ended,) = run_ranks(1, pretrain, f"{STEPS} 6 --load {copy} --save {copy}", wait_a_second)
    assert f"--save {copy} is in use by process" in refused([ended], code=5)
    assert [rank.code for rank in go_on(copy, f"--save {copy}", ranks=1)] == [0]


def save_whatever_it_is():
    """Let weights be saved that are no numbers, from the third step on."""
    from hmoe_megatron.checkpoint import saving
    from tests.distributed.test_saving import not_a_number

    saving.not_finite = lambda models: []
    not_a_number()


def test_weights_that_are_no_numbers_are_not_loaded(tmp_path):
    flags = f"--train-iters 3 --save-interval 3 --save {tmp_path}"
    assert [rank.code for rank in run_ranks(1, pretrain, flags, save_whatever_it_is)] == [0]
    line = refused(go_on(tmp_path, "", ranks=1))
    assert "iter_0000003: not finite on rank 0: layer 0 expert 3 [0:64) linear_fc2_weight" in line


TRAINING = (
    f"{STEPS} 6 --micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --min-lr 1e-2 --lr-decay-style constant "
    "--clip-grad 1.0 --seed 1234 --mock-data --log-interval 1 --eval-interval 1000 --eval-iters 0 --num-workers 0 "
    "--hmoe-console megatron --dist-ckpt-optim-fully-reshardable --init-method-std 0.1"
)


@pytest.mark.parametrize("layout", [*rarely(""), "--use-mp-args-from-checkpoint-args"])
def test_the_flags_of_the_model_are_taken_from_the_checkpoint(copy, layout):
    expected = go_on(copy, "", 1) if not layout else go_on(copy)
    flags = f"{TRAINING} --use-checkpoint-args {layout} --load {copy}".split()
    found = run_ranks(2 if layout else 1, start, flags)
    assert [code for code, _ in found] == [0] * len(found)
    assert step_lines(found[-1][1]) == step_lines(expected[-1].output) and len(step_lines(found[-1][1])) == 2


def step_lines(output):
    """(step, loss, gradient norm) of each logged step."""
    return re.findall(r" iteration +(\d+)/ .* lm loss: ([0-9.E+-]+) .* grad norm: ([0-9.]+)", output)


def test_flags_of_a_run_that_are_not_the_models_are_not_taken(copy, tmp_path):
    hostile = ["--hidden-size", "32", "--save", "elsewhere", "--trust-remote-code", "--hmoe-run-dir=x", "--lr=9"]
    hostile += ["--hmoe-widths=16,32,48,64", "--moe-router-topk", "2", "--pipeline-model-parallel-size", "2"]
    (copy / RUN_ARGUMENTS_FILE).write_text(json.dumps(hostile))
    argv = ["--use-checkpoint-args", "--load", str(copy), "--hidden-size", "64"]
    taken = ["--hidden-size", "32", "--hmoe-widths", "16,32,48,64", "--moe-router-topk", "2"]
    assert with_checkpoint_flags(argv) == [*taken, *argv[1:]]
    both = with_checkpoint_flags([*argv, "--use-mp-args-from-checkpoint-args"])
    assert both == [*taken, "--pipeline-model-parallel-size", "2", *argv[1:]]
    assert with_checkpoint_flags(argv[1:]) == argv[1:]
    with pytest.raises(ValueError, match="--use-checkpoint-args: give --load or --pretrained-checkpoint"):
        with_checkpoint_flags(argv[:1])
    with pytest.raises(ValueError, match="run_arguments.json is missing"):
        with_checkpoint_flags(["--use-checkpoint-args", "--load", str(tmp_path)])
