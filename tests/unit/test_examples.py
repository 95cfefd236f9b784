"""Every example parses, has the size it says, and repeats no other; the launcher prints what it would start."""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.training.vocab_utils import calculate_padded_vocab_size

from hmoe_megatron.launch.nodes import ranks_here
from hmoe_megatron.telemetry.accounting import parameter_counts
from hmoe_megatron.training import parse_arguments
from tests.distributed.pretrain_run import start
from tests.distributed.ranks import run_alone, run_ranks
from tests.rows import mostly_rarely, rarely

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.rglob("*.args"))
# A run is a variant of a model; the other files are its parts.
RUNS = [
    path
    for path in FILES
    if path.name in ("dense.args", "moe_topk.args", "moe_topp.args", "hmoe_topk.args", "hmoe_topp.args")
    and path.parent.name != "common"
]
BATCH_TOKENS = 640 * 4096
MOST_SHARED_LINES = 3  # the includes of one variant at two sizes

spec = importlib.util.spec_from_file_location("examples_run", EXAMPLES / "run.py")
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)


def name(path):
    return str(path.relative_to(EXAMPLES))


def parsed(run, monkeypatch, *flags, vocab_size=32_000):
    """(arguments, layout, parameter counts) of a run with mock data, as on enough ranks for it."""
    words = launcher.read_args(EXAMPLES / run)
    monkeypatch.setenv("WORLD_SIZE", "2" if "tiny_cpu" in run else "8")
    data = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab_size)]
    args, layout, _ = parse_arguments([*words, *data, *flags])
    args.padded_vocab_size = calculate_padded_vocab_size(vocab_size, args.make_vocab_size_divisible_by, 1)
    return args, layout, parameter_counts(args, layout.widths)


def top2_of_equal(counts):
    """Parameters a token uses with two of eight equal experts."""
    return counts.always_active + counts.experts * 2 // 8


@pytest.mark.parametrize("run", [name(path) for path in RUNS])
def test_every_run_parses_and_differs_from_the_others_in_what_its_name_says(run, monkeypatch):
    args, layout, _ = parsed(run, monkeypatch)
    variant, settings = Path(run).stem, layout.settings
    equal, topp = not variant.startswith("hmoe"), variant.endswith("topp")
    assert (settings.router, settings.top_p) == (("topp", 0.6) if topp else ("topk", None))
    assert settings.entropy_coeff == (0.03 if topp else 0)
    assert all((len(set(widths)) == 1) == equal for widths in layout.widths.values())
    if variant == "dense":
        assert (args.num_experts, args.moe_router_topk) == (1, 1)
        assert settings.p_penalty_coeff == settings.load_balance_coeff == 0
    else:
        assert (args.num_experts, args.moe_router_topk) == (8, 2)
        assert (settings.p_penalty_coeff, settings.load_balance_coeff) == ((0, 0.01) if equal else (0.1, 0))
    assert args.train_iters and args.eval_interval and args.eval_iters  # Megatron divides the first by the second


@pytest.mark.parametrize("run", [name(path) for path in RUNS if "tiny_cpu" not in name(path)])
def test_the_papers_runs_train_as_the_paper_says(run, monkeypatch):
    args, _, _ = parsed(run, monkeypatch)
    assert (args.optimizer, args.adam_beta1, args.adam_beta2, args.weight_decay) == ("adam", 0.9, 0.999, 1e-5)
    assert (args.lr, args.lr_warmup_iters, args.lr_warmup_init, args.lr_decay_style) == (1e-4, 1000, 0, "constant")
    assert (args.global_batch_size, args.seq_length, args.seed) == (640, 4096, 12345)
    assert args.bf16 and args.use_distributed_optimizer


@pytest.mark.parametrize(
    ("run", "total", "active", "narrowest", "widest"),
    [
        ("hmoe_0.4b/moe_topk.args", 417_295_104, 162_491_136, 1536, 1536),
        ("hmoe_0.4b/hmoe_topp.args", 417_295_104, 162_491_136, 864, 2208),
        ("hmoe_3b/as_printed_width_32768/moe_topk.args", 1_323_951_104, 417_981_440, 4096, 4096),
        ("hmoe_3b/as_printed_width_32768/hmoe_topp.args", 1_323_951_104, 417_981_440, 2304, 5888),
        ("hmoe_3b/2.5b_width_65536/moe_topk.args", 2_531_910_656, 719_971_328, 8192, 8192),
        ("hmoe_3b/2.5b_width_65536/hmoe_topp.args", 2_531_910_656, 719_971_328, 4608, 11776),
        ("tiny_cpu/hmoe_topp.args", 9_447_680, 4_729_088, 144, 368),
    ],
)
def test_parameter_counts(run, total, active, narrowest, widest, monkeypatch):
    vocab_size = 4096 if "tiny_cpu" in run else 32_000
    _, layout, counts = parsed(run, monkeypatch, vocab_size=vocab_size)
    assert (counts.total, top2_of_equal(counts)) == (total, active)
    assert {(min(widths), max(widths)) for widths in layout.widths.values()} == {(narrowest, widest)}


def test_the_dense_models_are_the_papers_and_a_router_of_one_expert(monkeypatch):
    """The router adds 12 layers x hidden size weights to 417,221,376 and 1,323,852,800."""
    for run, total in (("hmoe_0.4b", 417_221_376), ("hmoe_3b/as_printed_width_32768", 1_323_852_800)):
        args, _, counts = parsed(f"{run}/dense.args", monkeypatch)
        assert counts.total == total + 12 * args.hidden_size


def test_the_papers_163_million_active_parameters_of_the_04b_model(monkeypatch):
    """162.49 M rounds to 162; the paper prints 163: see examples/hmoe_0.4b/README.md."""
    _, _, counts = parsed("hmoe_0.4b/moe_topk.args", monkeypatch)
    assert counts.always_active == 28_311_552 + 49_152_000 + 92_928
    assert counts.experts == 339_738_624
    assert round(counts.total / 1e6) == 417
    assert round(top2_of_equal(counts) / 1e6) == 162
    # Any one of these gives the printed 163 and leaves 417.
    _, _, with_norm_biases = parsed("hmoe_0.4b/moe_topk.args", monkeypatch, "--normalization", "LayerNorm")
    _, _, one_more_token = parsed("hmoe_0.4b/moe_topk.args", monkeypatch, vocab_size=32_001)  # padded to 32,128
    for other, more in ((with_norm_biases, 25 * 768), (one_more_token, 2 * 128 * 768)):
        assert other.total == counts.total + more
        assert (round(other.total / 1e6), round(top2_of_equal(other) / 1e6)) == (417, 163)


def test_24_layers_of_the_printed_width_have_the_papers_active_and_nearly_its_total_parameters(monkeypatch):
    """The third reading in examples/hmoe_3b/README.md. The paper prints 0.77 B and 2.55 B."""
    _, _, counts = parsed("hmoe_3b/as_printed_width_32768/moe_topk.args", monkeypatch, "--num-layers", "24")
    assert (counts.total, top2_of_equal(counts)) == (2_582_365_184, 770_425_856)


@pytest.mark.parametrize(
    ("folder", "budget_flops", "active_millions"),
    [
        ("hmoe_0.4b", 7e19, {"dense": 417, "moe_topk": 163, "moe_topp": 173, "hmoe_topk": 153, "hmoe_topp": 173}),
        ("hmoe_3b/2.5b_width_65536", 2.6e20, {"moe_topk": 770, "moe_topp": 1230, "hmoe_topk": 700, "hmoe_topp": 680}),
        (
            "hmoe_3b/as_printed_width_32768",
            2.6e20,
            {"dense": 1320, **dict.fromkeys(("moe_topk", "moe_topp", "hmoe_topk", "hmoe_topp"), 417.98144)},
        ),
    ],
)
def test_steps_spend_the_budget_at_6_flops_a_parameter_and_token(folder, budget_flops, active_millions):
    for variant, millions in active_millions.items():
        words = launcher.read_args(EXAMPLES / folder / f"{variant}.args")
        steps = int([value for flag, value in itertools.pairwise(words) if flag == "--train-iters"][-1])
        step_flops = 6 * millions * 1e6 * BATCH_TOKENS
        assert steps * step_flops <= budget_flops < (steps + 2) * step_flops, variant


LIKE = ("deepseek_v3_like", "qwen3_30b_a3b_like")
ON_NO_MACHINE = "--mock-data --tokenizer-type NullTokenizer --vocab-size 127"


def counted(example, monkeypatch):
    """Parameters of the model at full size, as on 64 ranks."""
    monkeypatch.setenv("WORLD_SIZE", "64")
    words = [*launcher.read_args(EXAMPLES / example / "full.args"), *ON_NO_MACHINE.split(), "--no-rope-fusion"]
    args, layout, _ = parse_arguments(words)
    return parameter_counts(args, layout.widths), args, layout


def test_qwen3_30b_a3b_has_its_parameters(monkeypatch):
    """Its config.json: 48 layers, hidden size 2048, 32 heads of 128, 4 groups, 128 experts of 768, 151,936 tokens."""
    counts, args, layout = counted("qwen3_30b_a3b_like", monkeypatch)
    attention = 2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 128
    layer = attention + 2 * 2048 + 128 * 2048 + 3 * 2048 * 128 * 768
    assert counts.total == 2 * 151_936 * 2048 + 48 * layer + 2048 == 30_532_122_624
    assert all(sum(widths) == 128 * 768 and len(set(widths)) > 20 for widths in layout.widths.values())


def test_deepseek_v3_has_its_parameters(monkeypatch):
    """arXiv 2412.19437, section 4.2: 671 B, and without a second embedding and output layer 11.6 B to predict one."""
    counts, args, layout = counted("deepseek_v3_like", monkeypatch)
    down, up = 7168 * (1536 + 512 + 64), 1536 * 128 * 192 + 512 * 128 * 256
    attention = down + 1536 + 512 + up + 128 * 128 * 7168
    moe = 3 * 7168 * 2048 * 257 + 256 * 7168
    model = 2 * 129_280 * 7168 + 61 * (attention + 2 * 7168) + 3 * 3 * 7168 * 18_432 + 58 * moe + 7168
    prediction = attention + 2 * 7168 + moe + 3 * 7168 + 2 * 7168 * 7168
    assert round(model / 1e9) == 671 and counts.total == model + prediction
    assert layout.layers == list(range(3, 62)) and args.mtp_num_layers == 1


@pytest.mark.parametrize(
    ("example", "ranks", "more"),
    [
        ("deepseek_v3_like", 2048, "--expert-model-parallel-size 64"),
        *rarely(
            ("deepseek_v3_like", 64, ""),
            ("qwen3_30b_a3b_like", 64, ""),
            ("qwen3_30b_a3b_like", 2048, "--expert-model-parallel-size 64"),
        ),
    ],
)
def test_full_sizes_are_checked_on_no_gpu(example, ranks, more):
    words = [*launcher.read_args(EXAMPLES / example / "full.args"), *more.split(), "--hmoe-check-only"]
    words += f"--world-size {ranks} --data-path /not/here --split 98,1,1 --tokenizer-model /not/here".split()
    code, said = run_alone(start, words, timeout_s=200)
    assert code == 0, said
    assert f"{ranks} ranks: all that can be checked without them is in order" in said
    assert re.search(r"memory of the fullest rank, [\d.]+ GiB", said) and "max over mean of FLOPs 1.00" in said


def trained(words):
    """(exit code, {step: loss}, last value of the loss of one more token or None) of a run."""
    code, said = start([*words, "--num-workers", "0", "--hmoe-console", "megatron"])
    steps = re.findall(r" iteration +(\d+)/.*? lm loss: (\S+) ", said)
    more = re.findall(r"mtp_1 loss: (\S+) ", said)
    return code, {int(step): float(loss) for step, loss in steps}, float(more[-1]) if more else None


# The other is trained and goes on in tests/unit/hf/test_deepseek.py too.
@pytest.mark.parametrize("example", mostly_rarely(LIKE, ("qwen3_30b_a3b_like",)))
def test_the_small_ones_train_and_go_on_under_another_layout(example, tmp_path):
    words = [*launcher.read_args(EXAMPLES / example / "tiny_cpu.args"), *ON_NO_MACHINE.split(), "--eval-iters", "0"]
    words += f"--log-interval 1 --save {tmp_path} --save-interval 2".split()
    first = run_ranks(2, trained, [*words, "--train-iters", "6"], timeout_s=120)
    code, losses, more = first[-1]  # the last rank prints them
    assert code == 0 and list(losses) == [1, 2, 3, 4, 5, 6]
    assert (more is not None) == (example == "deepseek_v3_like")
    for later in ("iter_0000004", "iter_0000006"):
        shutil.rmtree(tmp_path / later)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    other = "--expert-model-parallel-size 1 --tensor-model-parallel-size 2 --sequence-parallel"
    other += f" --expert-tensor-parallel-size 1 --train-iters 6 --load {tmp_path}"
    resumed = run_ranks(2, trained, [*words, *other.split()], timeout_s=120)
    code, again, _ = resumed[-1]
    assert code == 0 and list(again) == [3, 4, 5, 6]
    for step in (3, 5, 6):  # a start prints in its second step the mean of the first two
        assert again[step] == pytest.approx(losses[step], rel=1e-5)


def test_no_two_files_repeat_each_other():
    for one, other in itertools.combinations(FILES, 2):
        shared = set(one.read_text().splitlines()) & set(other.read_text().splitlines()) - {""}
        flags = {line for line in shared if line.startswith("--")}
        assert len(shared) <= MOST_SHARED_LINES, (name(one), name(other), shared)
        assert len(flags) <= 1 or "common/dense.args" in (name(one), name(other)), (name(one), name(other), flags)


def test_read_args_expands_includes_where_they_stand(tmp_path):
    (tmp_path / "part.args").write_text("--b 2 3\n")
    (tmp_path / "run.args").write_text("# title\n--a 1  # why\n\ninclude part.args\n--c\n--d 'x y'\n")
    assert launcher.read_args(tmp_path / "run.args") == ["--a", "1", "--b", "2", "3", "--c", "--d", "x y"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--a 1\nlr 3\n", "run.args:2: 'lr 3': give '--flag value', 'include FILE.args' or '# comment'"),
        ("--a 'x\n", "run.args:1: No closing quotation"),
        ("include run.args\n", "which includes it: remove one of the two"),
        ("include\n", "run.args:1: 'include': give"),
    ],
)
def test_read_args_refuses(tmp_path, text, message):
    (tmp_path / "run.args").write_text(text)
    with pytest.raises(ValueError) as refused:
        launcher.read_args(tmp_path / "run.args")
    assert message in str(refused.value)


def test_one_node():
    command = launcher.torchrun_command(["--lr", "1"], {"NPROC_PER_NODE": "4"})
    assert command[1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
        str(EXAMPLES.parent / "pretrain_hmoe.py"),
        "--lr",
        "1",
    ]


def test_what_is_only_checked_needs_no_torchrun():
    command = launcher.torchrun_command(["--hmoe-check-only", "--world-size", "64"], {"NNODES": "8"})
    assert command[1:] == [str(EXAMPLES.parent / "pretrain_hmoe.py"), "--hmoe-check-only", "--world-size", "64"]
    here = launcher.torchrun_command(["--hmoe-check-only"], {"NPROC_PER_NODE": "2"})
    assert "--nproc-per-node" in here, "this machine's own ranks are meant"


def test_without_a_gpu_a_node_starts_as_many_ranks_as_experts_are_spread_over(monkeypatch):
    monkeypatch.setattr("hmoe_megatron.launch.nodes.gpus_here", lambda: 0)
    assert ranks_here(["--lr", "1", "--expert-model-parallel-size", "2"]) == 2
    assert ranks_here([]) == 1
    monkeypatch.setattr("hmoe_megatron.launch.nodes.gpus_here", lambda: 8)
    assert ranks_here(["--expert-model-parallel-size", "2"]) == 8


def test_many_nodes_need_to_know_which_they_are_and_where_the_first_is():
    many = {"NPROC_PER_NODE": "8", "NNODES": "2"}
    command = launcher.torchrun_command([], many | {"NODE_RANK": "1", "MASTER_ADDR": "node0"})
    assert " ".join(command[3:-1]) == (
        "--nnodes 2 --node-rank 1 --master-addr node0 --master-port 29500 --nproc-per-node 8"
    )
    with pytest.raises(ValueError, match="NNODES=2: NODE_RANK and MASTER_ADDR missing"):
        launcher.torchrun_command([], many)


def run_launcher(*words, **environment):
    command = [sys.executable, str(EXAMPLES / "run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)


def test_dry_run_prints_the_line_with_the_users_flags_last():
    done = run_launcher("--dry-run", str(EXAMPLES / "tiny_cpu/hmoe_topp.args"), "--lr", "3e-3", NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    assert "--standalone --nproc-per-node 2" in done.stdout
    assert done.stdout.index("--lr 2e-3") < done.stdout.index("--hmoe-top-p 0.6") < done.stdout.index("--lr 3e-3\n")


def test_a_missing_file_is_one_line_and_exit_code_2():
    done = run_launcher("--dry-run", "nowhere.args")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("run.py: error:") and "nowhere.args" in done.stderr and done.stderr.count("\n") == 1


# What Slurm's commands do, as far as the batch script sees it. srun here waits for a signal where it is told to.
FAKE_SLURM = {
    "scontrol": 'if [ "$1" = show ]; then echo first; echo second; else echo "scontrol $*"; fi',
    "scancel": 'echo "scancel $*"; touch "$FAKE_STOP"',
    "srun": 'while [ -n "${FAKE_WAIT:-}" ] && [ ! -e "$FAKE_STOP" ]; do sleep 0.05; done; shift\n'
    'for node in 0 1; do SLURM_NODEID=$node "$@"; done; exit "${FAKE_CODE:-0}"',
}


@pytest.fixture
def slurm(tmp_path):
    for command, script in FAKE_SLURM.items():
        (tmp_path / command).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / command).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "x",
        "NPROC_PER_NODE": "8",
        "PYTHON": sys.executable,
        "FAKE_STOP": str(tmp_path / "stop"),
    }

    def start(*words, **environment):
        command = ["bash", str(EXAMPLES / "slurm.sbatch"), *words]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=EXAMPLES.parent,
            env=os.environ | variables | environment,
        )

    return start


RUN_WORDS = ("--dry-run", "examples/hmoe_0.4b/hmoe_topp.args", "--save", "a dir", "--load", "a dir")


def test_sbatch_starts_every_node_with_its_rank_and_passes_words_whole(slurm):
    out, err = (job := slurm(*RUN_WORDS, FAKE_CODE="3", LAUNCH_FLAGS="--restarts 4")).communicate(timeout=60)
    lines = out.splitlines()
    assert job.returncode == 3 and len(lines) == 2, (out, err)  # what the launcher gave up is not queued again
    for rank, line in enumerate(lines):
        assert line.startswith(f"launch: node {rank} of 2, meets at first:29500, 8 ranks:")
        assert line.endswith("--save 'a dir' --load 'a dir'")


@pytest.mark.parametrize(("code", "queued"), [(143, True), (1, True), (137, True), (0, False), (2, False), (3, False)])
def test_sbatch_stops_the_run_before_the_time_limit_and_queues_it_again(slurm, code, queued):
    """Not where it is done, or where another start would be refused again."""
    job = slurm(*RUN_WORDS, FAKE_WAIT="1", FAKE_CODE=str(code))
    with pytest.raises(subprocess.TimeoutExpired):
        job.communicate(timeout=2)
    job.send_signal(subprocess.signal.SIGUSR1)
    out, err = job.communicate(timeout=60)
    assert out.splitlines()[0] == "scancel --signal=TERM 7", err
    assert job.returncode == code and (out.splitlines()[-1] == "scontrol requeue 7") == queued, (out, err)


def test_sbatch_needs_a_place_to_go_on_from(slurm):
    """Said by the launcher of each node. (srun's stand-in ends with the code of the last.)"""
    out, err = slurm(*RUN_WORDS[:4]).communicate(timeout=60)
    assert out == "" and err.count("no --load: a restart would begin anew") == 2


def test_readmes_name_files_that_exist_and_counts_that_are_tested():
    tested = Path(__file__).read_text()
    for readme in EXAMPLES.rglob("README.md"):
        text = readme.read_text()
        for path in re.findall(r"examples/[\w./-]+\.(?:args|py|sbatch)|tools/\w+\.py", text):
            assert (EXAMPLES.parent / path).is_file(), (name(readme), path)
        for count in re.findall(r"\b\d{1,3}(?:,\d{3}){2,}\b", text):
            assert count.replace(",", "_") in tested, (name(readme), count)
