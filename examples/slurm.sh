#!/bin/bash
# 16 GPUs on two nodes, which see the same files under the paths of run.toml: sbatch slurm.sh
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=32
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
     --rdzv-endpoint "$head:29500" -m pypar.cli train run.toml --mesh dp=4,tp=4 --resume
