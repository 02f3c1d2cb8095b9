#!/bin/bash
# hosts.sh OMNIQUANT TEST_HELPER: the program over 2 and 4 hosts with a network between them, started as on a cluster: the codes of one host come out;
# and where a host is cut off in the middle, all ranks end and say which.
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"
# shellcheck source=tests/hosts/cluster.bash
. "$(dirname "$0")/hosts/cluster.bash"

! sanitized || skip "a build with sanitizers"
missing=$(hosts_missing)
[ -z "$missing" ] || skip "no hosts can be made here: $missing"
cd / || exit 1 # a folder that every host has

folder=$(mktemp -d /tmp/omniquant-hosts.XXXXXX) # mpirun's agent may have no spaces in its name
trap '! here || { hosts_stop; rm -rf "$work" "$folder"; }' EXIT
work=$folder/work # on h1 alone: no other rank reads or writes files
mkdir "$work"
built=$(dirname "$program")
hosts_start "$(dirname "$helper")/test_switch" 4 1e9 1e-4 "$folder" "$built" || {
  echo "the hosts do not start:"
  cat "$folder"/hosts.*/switch.log
  exit 1
}

blocks=12 hidden=64 ffn=128 group=8 samples=8 batch=4 epochs=2
"$helper" tokens "$work/tokens.h5" 2000 96 1 && "$helper" model "$work/model" $blocks $hidden 4 4 $ffn 96 F32 || exit 1

# calibrate RANKS NAME OPTION...: into $work/NAME, its output in $work/NAME.log.
calibrate() {
  local ranks=$1 name=$2
  shift 2
  hosts_mpirun "$ranks" "$@" -x OMNIQUANT_PROGRESS "$program" calibrate --model "$work/model" --tokens "$work/tokens.h5" --output "$work/$name" \
    --wbits 3 --group-size $group --samples $samples --batch $batch --seqlen 32 --epochs $epochs --backend cpu --threads 1 \
    </dev/null >"$work/$name.log" 2>&1
}

# finishes RANKS NAME
finishes() {
  calibrate "$@" && return
  cat "$work/$2.log"
  return 1
}

# Bytes that a host has sent to others.
sent() { hosts_enter "$1" sed -n "s/^ *eth0://p" /proc/net/dev | awk "{ print \$9 }"; }

# exceeds A B
exceeds() { [ "$1" -gt "$2" ] || { echo "$1 is not more than $2" && return 1; }; }

check "h1 is a host of its own" test "$(hosts_enter 1 hostname)" = h1
check "one host finishes" finishes 1 one
for ranks in 2 4; do
  before=$(sent 2)
  check "$ranks hosts finish" finishes $ranks "$ranks"
  check "$ranks hosts: the codes of one" "$helper" compare "$work/one" "$work/$ranks"
  # Two factors a group, of 4 bytes, summed in each step: of them each rank sends 2 (1 - 1 / ranks).
  weights=$((4 * hidden * hidden + 3 * hidden * ffn))
  exchanged=$((blocks * epochs * samples * 8 * weights * 2 * (ranks - 1) / (batch * group * ranks)))
  check "$ranks hosts: gradients went over the network" exceeds $(($(sent 2) - before)) $exchanged
done

# says NAME PATTERN: in the run's log, which is shown if it does not.
says() {
  grep -q "$2" "$work/$1.log" && return
  cat "$work/$1.log"
  return 1
}

# h3 is cut off, and the kernel there tells nobody: in one run, whose ranks notice; mpirun waits for its daemon on h3. And in one whose mpirun is told to
# notice too, and earlier: it ends the ranks.
keepalive=(--mca oob_tcp_keepalive_time 5 --mca oob_tcp_keepalive_intvl 5 --mca oob_tcp_keepalive_probes 3)
export OMNIQUANT_TEST_READ_SECONDS=4 # so that it is in their middle, on a slow machine too
calibrate 4 ranks -x OMNIQUANT_TEST_READ_SECONDS &
calibrate 4 mpirun "${keepalive[@]}" -x OMNIQUANT_TEST_READ_SECONDS &
noticing=$!
for name in ranks mpirun; do check "$name: stores blocks" wait_until 60 test -e "$work/$name/blocks/0001.h5"; done
check "h3 is cut off" hosts_enter 3 ip link set eth0 down
begin=$SECONDS
ended() { ! kill -0 "$noticing"; }
no_ranks() {
  local host process
  for host in 1 2 3 4; do
    for process in $(hosts_processes "$host"); do [ "$(readlink "/proc/$process/exe")" != "$program" ] || return; done
  done
}
check "mpirun: ends" wait_until 60 ended
echo "# after $((SECONDS - begin)) s"
check "mpirun: says which host" says mpirun 'h3'
check "ranks: all end" wait_until $((60 - SECONDS + begin)) no_ranks
echo "# after $((SECONDS - begin)) s"
check "ranks: says which rank on which host" says ranks 'rank 2 on host h3 is gone'
finish
