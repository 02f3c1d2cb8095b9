# cluster.bash: a real Slurm of two nodes on this machine, beside whatever is installed: its own configuration, key, sockets, ports, state and
# logs, all in one folder. Sourced. It needs root, since a node's daemon starts jobs as their users.
# shellcheck shell=bash
# shellcheck source=tests/wait.bash
. "$(dirname "${BASH_SOURCE[0]}")/../wait.bash"

cluster_folder=''  # without spaces: Slurm's configuration knows no quotes
cluster_daemons=() # process ids, in the order of their start

# Says what is missing for a cluster here; nothing if it can be started.
cluster_missing() {
  local command
  [ "$(id -u)" = 0 ] || { echo "not root" && return; }
  [ -n "$(hostname -I)" ] || { echo "no network interface, without which Slurm resolves no name" && return; }
  for command in munged mungekey slurmctld slurmd srun sbatch; do
    command -v "$command" >/dev/null || { echo "no $command: install the packages slurm-wlm and munge" && return; }
  done
}

# Prints a port that nobody listens on.
cluster_port() {
  local port
  for port in $(shuf -i 20000-32000 -n 100); do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port" && return; }
  done
}

# Two nodes of eight CPUs each, however many this machine has: nothing is bound, and the jobs mostly wait. TmpFS keeps apart what PMIx makes for
# the two. A job that is queued again starts once the credentials of its first start have expired: 2 minutes, unless AuthInfo says less.
# Jobs in `urgent` take the place of those in `spare`, which have GraceTime from SIGTERM on; `normal` is left alone.
cluster_configure() {
  local host
  host=$(hostname -s)
  cat >"$cluster_folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(cluster_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$cluster_folder/munge.socket,cred_expire=5
StateSaveLocation=$cluster_folder/state
SlurmctldPidFile=$cluster_folder/slurmctld.pid
SlurmctldLogFile=$cluster_folder/slurmctld.log
SlurmdSpoolDir=$cluster_folder/%n
SlurmdPidFile=$cluster_folder/%n.pid
SlurmdLogFile=$cluster_folder/%n.log
TmpFS=$cluster_folder/%n/tmp
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
MinJobAge=600
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(cluster_port) CPUs=8
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(cluster_port) CPUs=8
PartitionName=normal Nodes=n1,n2 PriorityTier=1 PreemptMode=OFF Default=YES
PartitionName=spare Nodes=n1,n2 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF
END
}

# cluster_daemon COMMAND...: started, its process id kept.
cluster_daemon() {
  "$@" >"$cluster_folder/daemon.log" 2>&1 </dev/null &
  cluster_daemons+=($!)
}

# Whether all daemons still run.
cluster_alive() {
  local daemon
  for daemon in "${cluster_daemons[@]}"; do kill -0 "$daemon" 2>/dev/null || return; done
}

cluster_idle() { [ "$(sinfo --noheader --partition=normal --states=idle --format=%D)" = 2 ]; }
cluster_empty() { [ -z "$(squeue --noheader)" ]; }

# cluster_start FOLDER: an empty folder, without spaces in its name. Both nodes are idle when this succeeds.
cluster_start() {
  cluster_folder=$1
  export SLURM_CONF=$cluster_folder/slurm.conf
  mkdir -p "$cluster_folder/state" "$cluster_folder"/n{1,2}/tmp
  cluster_configure
  mungekey --create --keyfile "$cluster_folder/munge.key" || return
  cluster_daemon munged --foreground --force --socket="$cluster_folder/munge.socket" --key-file="$cluster_folder/munge.key" \
    --pid-file="$cluster_folder/munge.pid" --seed-file="$cluster_folder/munge.seed" --log-file="$cluster_folder/munge.log"
  wait_until 20 munge --no-input --socket="$cluster_folder/munge.socket" || return
  cluster_daemon slurmctld -D
  cluster_daemon slurmd -D -N n1
  cluster_daemon slurmd -D -N n2
  wait_until 30 cluster_idle
}

# Process ids of what runs in this cluster, known by its configuration's name in their environment.
cluster_processes() {
  local process
  for process in /proc/[0-9]*; do
    if grep -qzxF "SLURM_CONF=$SLURM_CONF" "$process/environ" 2>/dev/null; then echo "${process#/proc/}"; fi
  done
}

# Jobs first, then the daemons, then what did not listen.
cluster_stop() {
  local i
  [ -n "$cluster_folder" ] || return 0
  timeout 10 scancel --user=root
  timeout 10 scancel --user=root --signal=KILL --full
  wait_until 15 cluster_empty
  for ((i = ${#cluster_daemons[@]} - 1; i >= 0; i--)); do
    kill "${cluster_daemons[i]}" 2>/dev/null
    wait "${cluster_daemons[i]}" 2>/dev/null
  done
  # shellcheck disable=SC2046 # numbers
  kill -KILL $(cluster_processes) 2>/dev/null
  cluster_daemons=() cluster_folder=''
}
