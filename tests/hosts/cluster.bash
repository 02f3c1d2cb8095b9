# cluster.bash: several hosts on this machine, joined by a switch (switch.c). Each has its own network, host name, shared memory and /tmp, so that MPI
# takes it for a machine of its own; processes are started there as ssh would. Sourced. It needs root.
# shellcheck shell=bash
# shellcheck source=tests/wait.bash
. "$(dirname "${BASH_SOURCE[0]}")/../wait.bash"

hosts_folder=''   # the cluster's own files
hosts_switch=''   # process id
hosts_sleepers=() # host i is where hosts_sleepers[i - 1] sleeps
hosts_networks=() # and its network is hosts_networks[i - 1], as /proc names it
hosts_rate=0      # bits a second of every link; 0: as fast as it goes
hosts_frame_bytes=65000

# Says what is missing for hosts here; nothing if they can be made.
hosts_missing() {
  local command
  [ "$(id -u)" = 0 ] || { echo "not root" && return; }
  [ -c /dev/net/tun ] || { echo "no /dev/net/tun" && return; }
  for command in ip tc unshare nsenter setpriv; do
    command -v "$command" >/dev/null || { echo "no $command: install the packages iproute2 and util-linux" && return; }
  done
  unshare --net --uts --ipc --mount true 2>/dev/null || echo "no namespaces can be made"
}

# hosts_enter HOST COMMAND...: runs it there.
hosts_enter() {
  local host=$1
  shift
  nsenter --target "${hosts_sleepers[host - 1]}" --net --uts --ipc --mount -- "$@"
}

# hosts_furnish HOST FOLDER...: in a host's fresh namespaces. Its /tmp and /dev/shm are empty but for these folders.
hosts_furnish() {
  local name=h$1 descriptor opened=() i=0
  shift
  hostname "$name" && mount --make-rprivate / && mount --bind "$hosts_folder/hosts" /etc/hosts || return
  for folder; do exec {descriptor}<"$folder" && opened+=("$descriptor"); done
  mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm || return
  for folder; do
    mkdir -p "$folder" && mount --no-canonicalize --bind "/proc/self/fd/${opened[i]}" "$folder" || return
    i=$((i + 1))
  done
  touch "$hosts_folder/$name"
}

# hosts_make HOST FOLDER...: its sleeper ends with this shell.
hosts_make() {
  local sleeper host=$1
  setpriv --pdeathsig KILL unshare --net --uts --ipc --mount bash -c 'hosts_furnish "$@" && exec sleep infinity' furnish "$@" &
  sleeper=$!
  hosts_sleepers+=("$sleeper")
  wait_until 10 test -e "$hosts_folder/h$host" || return
  hosts_networks+=("$(readlink "/proc/$sleeper/ns/net")")
  ip link set "oq$$-$host" netns "$sleeper" name eth0 || return
  hosts_enter "$host" ip link set eth0 gso_max_size "$hosts_frame_bytes"
  # The switch keeps the rate; this keeps what waits for it with its socket, where TCP sees it, so that acknowledgements do not wait behind.
  [ "$hosts_rate" = 0 ] || hosts_enter "$host" tc qdisc add dev eth0 root tbf rate "${hosts_rate}bit" burst $((2 * hosts_frame_bytes)) latency 100ms || return
  hosts_enter "$host" sh -c "ip link set lo up && ip link set eth0 up && ip address add 10.77.0.$host/24 dev eth0"
}

# hosts_start SWITCH COUNT BITS_A_SECOND SECONDS OWN SHARED...: hosts h1, h2, ... with links of that rate and delay. What is in the folder OWN is kept
# on h1 alone, and the cluster's files are there too; SHARED folders are kept on every host.
hosts_start() {
  local switch=$1 count=$2 rate=$3 delay=$4 own=$5 host devices=()
  shift 5
  hosts_folder=$(mktemp -d "$own/hosts.XXXXXX") || return
  for ((host = 1; host <= count; host++)); do
    devices+=("oq$$-$host")
    echo "10.77.0.$host h$host" >>"$hosts_folder/hosts"
    echo "h$host slots=1" >>"$hosts_folder/hostfile"
  done
  echo "127.0.0.1 localhost" >>"$hosts_folder/hosts"
  hosts_rate=$(awk -v rate="$rate" 'BEGIN { printf "%.0f", rate }')
  # Large frames save work, but one is to hold up others for no more than 200 us.
  hosts_frame_bytes=$(awk -v rate="$rate" 'BEGIN { most = rate / 8 * 200e-6; print (rate == 0 || most > 65000 ? 65000 : most < 3000 ? 3000 : int(most)) }')
  setpriv --pdeathsig KILL "$switch" "$rate" "$delay" "${devices[@]}" >"$hosts_folder/switch.log" 2>&1 &
  hosts_switch=$!
  chrt --fifo --pid 50 "$hosts_switch" 2>/dev/null # a real one waits for no rank
  wait_until 10 grep -q ready "$hosts_folder/switch.log" || return
  export -f hosts_furnish
  export hosts_folder
  hosts_make 1 "$own" "$@" || return
  for ((host = 2; host <= count; host++)); do hosts_make "$host" "$hosts_folder" "$@" || return; done
  cat >"$hosts_folder/agent" <<END
#!/bin/sh
# agent HOST COMMAND...: what ssh is to mpirun
sleepers="${hosts_sleepers[*]}"
host=\${1#h}
shift
target=\$(echo "\$sleepers" | cut -d ' ' -f "\$host")
exec nsenter --target "\$target" --net --uts --ipc --mount -- sh -c "\$*"
END
  chmod +x "$hosts_folder/agent"
}

# hosts_mpirun RANKS OPTION... PROGRAM ARGUMENT...: on h1, a rank a host. They share this machine's cores: who waits yields.
hosts_mpirun() {
  local ranks=$1
  shift
  hosts_enter 1 timeout 300 mpirun -np "$ranks" --hostfile "$hosts_folder/hostfile" --map-by node --bind-to none --mca mpi_yield_when_idle 1 \
    --mca plm_rsh_agent "$hosts_folder/agent" "$@"
}

# Process ids of what runs on a host, known by its network.
hosts_processes() {
  local process
  [ -n "${hosts_networks[$1 - 1]}" ] || return # it was never there
  for process in /proc/[0-9]*; do
    if [ "$(readlink "$process/ns/net" 2>/dev/null)" = "${hosts_networks[$1 - 1]}" ]; then echo "${process#/proc/}"; fi
  done
}

# Sleepers may be gone already: a signal to this shell's group ends them.
hosts_stop() {
  local host
  for ((host = 1; host <= ${#hosts_networks[@]}; host++)); do
    # shellcheck disable=SC2046 # numbers
    kill -KILL $(hosts_processes "$host") 2>/dev/null
    wait "${hosts_sleepers[host - 1]}" 2>/dev/null
  done
  [ -z "$hosts_switch" ] || { kill "$hosts_switch" && wait "$hosts_switch"; } 2>/dev/null
  hosts_sleepers=() hosts_networks=() hosts_switch=''
}
