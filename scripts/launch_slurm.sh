#!/usr/bin/env bash
# Train a recipe on several nodes under SLURM; requeue and resume at the time limit.
#
#   sbatch --nodes 4 --gpus-per-node 8 --time 12:00:00 scripts/launch_slurm.sh recipes/llava15_7b/pool_lora.yaml
#   sbatch --nodes 2 --gpus-per-node 4 scripts/launch_slurm.sh my.yaml --data.init_args.num_workers 8
#
# Usage: launch_slurm.sh RECIPE [ARGUMENTS OF tpcompress fit]. Submit from the folder that contains .venv; pass further
# options of the cluster (partition, account) to sbatch. One torchrun per node, one process per GPU. Environment:
#   RUN_DIR  run directory on a file system shared by all nodes (default: runs/slurm-JOBID; unchanged after a requeue)
#   BIN      directory of torchrun and tpcompress (default: .venv/bin)
#   GPUS     processes per node (default: number of GPUs allocated by SLURM)
#   GRACE    seconds to save a checkpoint after a signal (default: 240; keep it below the 300 of --signal)
#
# SIGUSR1, sent by SLURM 300 seconds before the time limit: a checkpoint is saved, the job is requeued and resumes from
# it. SIGTERM: a checkpoint is saved; SLURM requeues a preempted job, but not a cancelled one.
#
# Without SLURM, on every node (HEAD: host name of the first node):
#   torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500 --rdzv-id RUN \
#     .venv/bin/tpcompress fit --config RECIPE --trainer.num_nodes 4 --trainer.devices 8
#SBATCH --job-name=tpcompress
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -uo pipefail

fail() { echo "$*" >&2; exit 2; }
[ $# -ge 1 ] || fail "No recipe given. Usage: sbatch --nodes N --gpus-per-node G scripts/launch_slurm.sh RECIPE [ARGUMENTS]"
[ -n "${SLURM_JOB_ID:-}" ] || fail "Not under SLURM: submit with sbatch, or use the torchrun command in the header of this script."
cd "${SLURM_SUBMIT_DIR:-.}" || fail "No folder $SLURM_SUBMIT_DIR on this node; submit from a file system shared by all nodes."

recipe=$1
shift
run_dir=${RUN_DIR:-runs/slurm-$SLURM_JOB_ID}
gpus=${GPUS:-${SLURM_GPUS_ON_NODE:-1}}
bin=${BIN:-.venv/bin}
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || fail "scontrol names no node of $SLURM_JOB_NODELIST."
port=$((20000 + SLURM_JOB_ID % 20000)) # differs between jobs that share a node

command=("$bin/torchrun" --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$gpus"
  --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID" --shutdown-timeout "${GRACE:-240}"
  "$bin/tpcompress" fit --config "$recipe" --trainer.default_root_dir "$run_dir"
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$gpus" "$@")
if [ -e "$run_dir/checkpoints/last.ckpt" ]; then command+=(--ckpt_path last); fi

came="" step=""
# shellcheck disable=SC2329 # called by the traps
stop() {
  came=$1
  [ -z "$step" ] || kill -TERM "$step" 2>/dev/null # srun forwards it to its tasks, torchrun to its processes
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

srun --nodes "$SLURM_JOB_NUM_NODES" --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 --kill-on-bad-exit=1 \
  "${command[@]}" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a signal interrupts `wait` before the step ends
  code=0
  wait "$step" || code=$?
done

if [ "$came" = USR1 ] && [ "$code" -ne 0 ]; then
  echo "Time limit reached: requeued, resumes from $run_dir."
  scontrol requeue "$SLURM_JOB_ID"
  exit
fi
exit "$code"
