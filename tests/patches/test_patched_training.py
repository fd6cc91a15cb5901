"""A patched checkout trains without our launcher: plain Megatron on a CPU, and with ``--af-pipe``."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_disagmoe import patching
from megatron_disagmoe.free_port import free_port
from megatron_disagmoe.training_log import Step, TrainingLog

ROOT = Path(__file__).parents[2]
STEPS = 3
TIMEOUT_SECONDS = 150.0

# Imports Megatron first, and bits of it by name, as a pretrain script does; says which one it got.
SCRIPT = """
from megatron.core import mpu
from megatron.training import pretrain
import megatron.core
from megatron_disagmoe import gpt_task

if __name__ == "__main__":
    assert megatron.core.mpu is mpu and gpt_task.pretrain is pretrain
    print("megatron.core is", megatron.core.__file__, flush=True)
    gpt_task.train()
"""

FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant --clip-grad 1.0 "
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-token-dispatcher-type alltoall "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 63 --position-embedding-type rope --disable-bias-linear "
    f"--train-iters {STEPS} --log-interval 1 --eval-interval 1000 --eval-iters 1"
).split()


@pytest.fixture(scope="module")
def patched(pristine_checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole patched checkout, with a script of its own beside ``megatron/``."""
    root = tmp_path_factory.mktemp("patched") / "Megatron-LM"
    shutil.copytree(pristine_checkout, root)
    (root / "pretrain_gpt.py").write_text(SCRIPT)
    assert patching.apply(root).state == "patched"
    return root


def test_plain_megatron_on_a_cpu(patched: Path) -> None:
    codes, outputs = run_ranks(1, [str(patched / "pretrain_gpt.py"), *FLAGS])
    assert codes == [0], outputs[0][-3000:]
    assert f"megatron.core is {patched}" in outputs[0]
    assert outputs[0].count("disagmoe: no CUDA device, so Megatron runs on the CPU") == 1
    log = steps(outputs)
    assert len(log) == STEPS
    assert all(3 < (step.loss or 0) < 5 for step in log)  # ln 64 = 4.2: nothing learnt yet


def test_af_pipe_trains_as_with_the_launcher(patched: Path) -> None:
    """The launcher on the same patched checkout: the hook stands down, and the losses are the same."""
    flags = [*FLAGS, "--af-pipe"]
    by_hook, by_launcher = [
        run_ranks(2, command)
        for command in (
            [str(patched / "pretrain_gpt.py"), *flags],
            ["-m", "megatron_disagmoe.launch", str(patched / "pretrain_gpt.py"), *flags],
        )
    ]
    for codes, outputs in (by_hook, by_launcher):
        assert codes == [0, 0], "\n".join(output[-3000:] for output in outputs)
        assert all(f"megatron.core is {patched}" in output for output in outputs)
        assert sum(output.count("disagmoe: no CUDA device") for output in outputs) == 1
    hook_steps, launcher_steps = steps(by_hook[1]), steps(by_launcher[1])
    assert len(hook_steps) == STEPS
    assert [step.loss for step in hook_steps] == [step.loss for step in launcher_steps]
    assert [step.grad_norm for step in hook_steps] == [step.grad_norm for step in launcher_steps]


def test_bad_flag_is_refused_before_megatron_is_imported(patched: Path) -> None:
    (code,), (output,) = run_ranks(
        1, [str(patched / "pretrain_gpt.py"), *FLAGS, "--af-pipe", "--distributed-backend", "nccl"]
    )
    assert code == 2
    assert "disagmoe: --distributed-backend nccl needs a GPU" in output
    assert "Traceback" not in output
    assert "megatron.core is" not in output


def steps(outputs: list[str]) -> list[Step]:
    """What the one rank that logs has logged."""
    log = TrainingLog()
    for output in outputs:
        for line in output.splitlines():
            log.add(line)
    return log.steps


def run_ranks(world_size: int, command: list[str]) -> tuple[list[int], list[str]]:
    """Exit code and output of ``python COMMAND`` on every rank, as torchrun would start them; leaves no process."""
    port = free_port()
    common = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),  # as if installed
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(command[0]).parent if not command[0].startswith("-") else ROOT.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(world_size)
    ]
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        outputs = [process.communicate(timeout=deadline - time.monotonic())[0] for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return [process.returncode for process in processes], outputs
