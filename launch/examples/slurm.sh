#!/usr/bin/env bash
#SBATCH --job-name=bam
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#
# A recipe on the GPUs of a Slurm cluster, one process a GPU; from a checkout on a disk that all
# nodes see, with an environment in .venv (pip install '.[cuda]'):
#   sbatch launch/examples/slurm.sh --config=configs/small_590m.py --workdir=/scratch/me/small
# Five minutes before its time is up the job saves its state, ends with 143, and queues again. Runs
# of one recipe train at the same time as jobs of their own: --runs=code here, --runs=law there.
set -euo pipefail

code=0
srun --kill-on-bad-exit=1 .venv/bin/python -m bam_jax.main --coordinator=auto "$@" || code=$?
if ((code == 143)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
