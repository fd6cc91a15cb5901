"""Bad input ends the whole job with one message and exit code 2, before Megatron is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_disagmoe import errors
from tests.cpu.runs import FLAGS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "pretrain_plain.py"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")


def start(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """One process as torchrun would start rank 0."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # nobody gets as far as using it
    return subprocess.run(
        [sys.executable, "-m", module, *words], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the first word must be a pretrain script\nusage: torchrun"),
        (["--num-layers", "2"], "the first word must be a pretrain script\nusage: torchrun"),
        (["no/such/script.py"], "there is no script no/such/script.py\nusage: torchrun"),
        ([str(SCRIPT), *FLAGS, "--distributed-backend", "nccl"], "--distributed-backend nccl needs a GPU"),
        ([str(SCRIPT), "--num-experts", "4"], "experts with biases need Transformer Engine"),
    ],
)
def test_the_launcher_says_what_is_wrong_and_exits_2(words: list[str], message: str) -> None:
    ended = start("megatron_disagmoe.launch", *words)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"disagmoe: {message}")
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_the_package_entry_sends_on_what_it_does_not_do() -> None:
    ended = start("megatron_disagmoe.pretrain_gpt", *FLAGS, "--mtp-num-layers", "1")
    assert ended.returncode == 2
    assert "disagmoe: --mtp-num-layers: this entry trains a plain GPT; for more, take a checkout" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_ranks_other_than_0_wait_for_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end, errors.bad_input_ends_the_job():
        raise ValueError("the numbers and the remedy")
    assert end.value.code == 2
    assert slept == [errors.GRACE_SECONDS]
    assert capsys.readouterr() == ("", "")
