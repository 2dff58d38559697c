#!/bin/bash
# Trains on several machines under Slurm: sbatch examples/cluster/slurm.sh --data flowers
# Arguments are those of train.py. All machines need this folder, the images and save_dir on a shared disk.
#
#SBATCH --job-name=thaw
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1    # one torchrun on each machine; it starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300    # a warning to this script, 300 s before the time is over
#SBATCH --requeue              # also after a machine has failed
#SBATCH --open-mode=append     # a restarted job continues its log

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
over=no

stop() { # all processes finish their step and save; the same command resumes
    over=yes
    kill -TERM "$step"
}
trap stop USR1

# Otherwise torchrun can't take in machines that come back.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29400" \
    train.py "$@" &
step=$!

wait "$step" # a signal ends this wait
status=$?
if [ "$over" = yes ]; then
    wait "$step"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
