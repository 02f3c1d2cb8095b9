#!/bin/bash
# ranks.bash RANKS PROGRAM...: a test program on that many ranks; its own exit status, which mpirun passes on. Each rank calls itself a node of
# its own to NCCL, so that several may share one device.
ranks=$1
shift
command -v mpirun >/dev/null || { echo "skipped: no mpirun" && exit 77; }
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# Open MPI unloads its plugins before leaks are looked for, which then have no names to be suppressed by.
export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0
unset OMPI_COMM_WORLD_RANK PMIX_RANK PMI_RANK PALS_RANKID SLURM_PROCID
# shellcheck disable=SC2016 # the ranks expand it
timeout 120 mpirun --bind-to none --oversubscribe -np "$ranks" bash -c 'NCCL_HOSTID=omniquant$OMPI_COMM_WORLD_RANK exec "$0" "$@"' "$@" </dev/null
