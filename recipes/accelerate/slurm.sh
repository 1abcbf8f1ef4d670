#!/usr/bin/env bash
# Several machines under Slurm: sbatch recipes/accelerate/slurm.sh train.py --config recipes/quickstart.yaml
# Slurm starts one launcher on each machine, which starts a process for each of its GPUs.
#SBATCH --job-name=tweetdora
#SBATCH --nodes=2  # change: the number of machines
#SBATCH --ntasks-per-node=1  # one launcher on each
#SBATCH --gpus-per-node=8  # change: the GPUs of a machine
#SBATCH --cpus-per-task=32  # change: the cores of a machine
#SBATCH --time=01:00:00
#SBATCH --signal=TERM@120  # two minutes before the limit: train.py gets 30 seconds to finish its step and save
set -euo pipefail

# Processes on each machine: its GPUs, unless PROCESSES_PER_NODE says otherwise.
per_node=${PROCESSES_PER_NODE:-$SLURM_GPUS_ON_NODE}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Two jobs may share a machine, so the port depends on the job.
port=$((10000 + SLURM_JOB_ID % 50000))

# In single quotes, because each machine fills in its own SLURM_NODEID.
# shellcheck disable=SC2016
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=60 bash -c 'exec accelerate launch --config_file recipes/accelerate/multi_node.yaml \
	--num_machines "$SLURM_NNODES" --num_processes "$1" --machine_rank "$SLURM_NODEID" \
	--main_process_ip "$2" --main_process_port "$3" "${@:4}"' \
	_ "$((per_node * SLURM_NNODES))" "$head" "$port" "$@"
