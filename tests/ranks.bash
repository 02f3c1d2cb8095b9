#!/bin/bash
# ranks.bash RANKS PROGRAM...: a test program on that many ranks; its own exit status, which mpirun passes on. Where there are fewer GPUs than ranks,
# each rank calls itself a node of its own to NCCL, which would refuse several on one GPU, and goes over sockets then.
ranks=$1
shift
command -v mpirun >/dev/null || { echo "skipped: no mpirun" && exit 77; }
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# Open MPI unloads its plugins before leaks are looked for, which then have no names to be suppressed by.
export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0
unset OMPI_COMM_WORLD_RANK PMIX_RANK PMI_RANK PALS_RANKID SLURM_PROCID
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU')
[ -z "${CUDA_VISIBLE_DEVICES:-}" ] || gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
own=
# shellcheck disable=SC2016 # the ranks expand it
[ "$gpus" -ge "$ranks" ] || own='NCCL_HOSTID=omniquant$OMPI_COMM_WORLD_RANK'
# shellcheck disable=SC2016
timeout 120 mpirun --bind-to none --oversubscribe -np "$ranks" bash -c "$own"' exec "$0" "$@"' "$@" </dev/null
