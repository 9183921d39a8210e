#!/bin/bash
# Four nodes of eight GPUs under Slurm:   sbatch clusters/slurm.sh
#
# One task for each GPU: jax gives every task the GPU of its local number, so that fewer tasks would
# leave GPUs idle.

#SBATCH --job-name=asa_1b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Before the time limit and before preemption: time to save.
#SBATCH --signal=TERM@300
#SBATCH --requeue

srun --kill-on-bad-exit=1 \
  .venv/bin/python train.py --config=configs/asa_1b.py --workdir=/shared/runs/asa_1b
code=$?

# 2 is a mistake in the command; from anything else the same command goes on.
if ((code != 0 && code != 2 && ${SLURM_RESTART_COUNT:-0} < 20)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
