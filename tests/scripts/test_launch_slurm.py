"""The script for several nodes, with stand-ins for SLURM's commands that note how they were called."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

SCRIPT = Path(__file__).parents[2] / "scripts" / "launch_slurm.sh"
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$CALLS/srun"
[ -z "$SRUN_WAITS" ] && exit "$SRUN_CODE"
trap 'echo TERM > "$CALLS/signal"; exit 143' TERM
touch "$CALLS/started"
for _ in $(seq 600); do sleep 0.1; done
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf '%s\\n' node-a node-b; else echo "$@" >> "$CALLS/scontrol"; fi
"""


@pytest.fixture
def job(tmp_path):
    """Starts the script as SLURM would; the second value is the folder with the calls."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(*arguments: str, waits: bool = False, code: int = 0, **variables: str) -> subprocess.Popen:
        environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path)}
        environment |= {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]"}
        environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_GPUS_ON_NODE": "8"}
        environment |= {"SRUN_WAITS": "yes" if waits else "", "SRUN_CODE": str(code)} | variables
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    return start, tmp_path


def words(calls: Path) -> list[str]:
    return (calls / "srun").read_text().splitlines()


def test_the_command_line(job):
    start, calls = job
    assert start("my.yaml", "--data.init_args.seed", "7").wait() == 0
    assert words(calls) == [
        "--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1",
        ".venv/bin/torchrun", "--nnodes", "2", "--nproc-per-node", "8", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "node-a:21234", "--rdzv-id", "41234", "--shutdown-timeout", "240",
        ".venv/bin/tpcompress", "fit", "--config", "my.yaml", "--trainer.default_root_dir", "runs/slurm-41234",
        "--trainer.num_nodes", "2", "--trainer.devices", "8", "--data.init_args.seed", "7",
    ]  # fmt: skip
    assert not (calls / "scontrol").exists()
    known = get_args_parser().parse_args(words(calls)[words(calls).index("--nnodes") :])  # torchrun knows them all
    assert (known.rdzv_endpoint, known.shutdown_timeout) == ("node-a:21234", 240)
    assert known.training_script == ".venv/bin/tpcompress"


def test_a_requeued_job_goes_on_from_its_last_checkpoint(job):
    start, calls = job
    (calls / "mine/checkpoints").mkdir(parents=True)
    (calls / "mine/checkpoints/last.ckpt").touch()
    assert start("my.yaml", RUN_DIR="mine", GPUS="4", BIN="/opt/bin", GRACE="60").wait() == 0
    line = " ".join(words(calls))
    assert "/opt/bin/torchrun --nnodes 2 --nproc-per-node 4 " in line
    assert "--shutdown-timeout 60 /opt/bin/tpcompress fit --config my.yaml --trainer.default_root_dir mine " in line
    assert line.endswith("--trainer.devices 4 --ckpt_path last")


@pytest.mark.parametrize(
    ("number", "code", "requeued"), [(signal.SIGUSR1, 0, ["requeue 41234"]), (signal.SIGTERM, 143, [])]
)
def test_a_signal_reaches_the_run_before_the_job_ends(number, code, requeued, job):
    start, calls = job
    process = start("my.yaml", waits=True)
    for _ in range(600):
        if (calls / "started").exists():
            break
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == code
    assert (calls / "signal").read_text() == "TERM\n"
    done = (calls / "scontrol").read_text().splitlines() if (calls / "scontrol").exists() else []
    assert done == requeued


def test_a_failing_run_is_not_requeued(job):
    start, calls = job
    assert start("my.yaml", code=3).wait() == 3
    assert not (calls / "scontrol").exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [((), {}, "No recipe given. Usage: sbatch"), (("my.yaml",), {"SLURM_JOB_ID": ""}, "Not under SLURM: submit")],
)
def test_errors_are_one_line(arguments, variables, message, job):
    start, calls = job
    process = start(*arguments, **variables)
    text, _ = process.communicate()
    assert process.returncode == 2
    assert text.startswith(message)
    assert text.count("\n") == 1
    assert not (calls / "srun").exists()


def test_it_is_clean():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    assert os.access(SCRIPT, os.X_OK)
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", SCRIPT]).returncode == 0
