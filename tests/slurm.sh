#!/bin/bash
# slurm.sh OMNIQUANT TEST_HELPER: the batch scripts under a real Slurm of two nodes on this machine: a run over both, runs that are preempted,
# queued again, cancelled and stopped before their time limit and go on to the same codes, and a job array of two recipes.
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"
# shellcheck source=tests/slurm/cluster.bash
. "$(dirname "$0")/slurm/cluster.bash"

self=$(realpath "${BASH_SOURCE[0]}")
! sanitized || skip "a build with sanitizers"
missing=$(cluster_missing)
[ -z "$missing" ] || skip "no Slurm can be started here: $missing"
# shellcheck disable=SC2086 # names
unset ${!SLURM_*} ${!SBATCH_*} ${!OMPI_MCA_*}
cd "$(dirname "$0")/.." || exit 1

folder=$(mktemp -d /tmp/omniquant-slurm.XXXXXX)
trap '! here || { cluster_stop; rm -rf "$work" "$folder"; }' EXIT
cluster_start "$folder" || {
  echo "the cluster does not start:"
  tail -n 20 "$folder"/*.log
  exit 1
}
srun --mpi=list 2>&1 | grep -q pmix || skip "this Slurm knows no PMIx"

# ---- what is run ----

blocks=24
"$helper" tokens "$work/tokens.h5" 2000 96 1 && "$helper" model "$work/model" $blocks 64 4 2 128 96 F32 || exit 1
for bits in 3 4; do printf '%s\n' "wbits: $bits" group_size:\ 32 samples:\ 8 seqlen:\ 32 batch:\ 2 epochs:\ 2 >"$work/w$bits.yaml"; done

# The program, which in the first start of a job takes its time: $SLOW seconds a block.
cat >"$work/slow" <<END
#!/bin/sh
[ "\${SLURM_RESTART_COUNT:-0}" -gt 0 ] || export OMNIQUANT_TEST_READ_SECONDS=\$SLOW
exec "$program" "\$@"
END
chmod +x "$work/slow"
export MODEL=$work/model TOKENS=$work/tokens.h5 RECIPE=$work/w4.yaml BINDING=none INTERFACE=lo SLOW=0
temporary=${TMPDIR:-/tmp}
export TMPDIR=$folder # mpirun leaves folders there

# submit NAME OPTION... -- FLAG...: a job of two tasks on two nodes, if the options do not say otherwise. Its log is $work/NAME.log, its store
# $work/NAME. Prints its number.
submit() {
  local name=$1 options=()
  shift
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  OUTPUT=$work/$name PROGRAM=$work/slow sbatch --parsable --nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --time=30 --output="$work/$name.log" \
    "${options[@]}" slurm/omniquant.sbatch --backend cpu --threads 1 "${@:2}"
}

# field JOB NAME: what Slurm says of a job.
field() { scontrol --oneliner show job "$1" | grep -o " $2=[^ ]*" | cut -d = -f 2; }

has() { [ "$(field "$1" "$2")" = "$3" ]; }
stored() { find "$work/$1" -path '*/blocks/[0-9]*.h5' 2>/dev/null | wc -l; }
stores() { [ "$(stored "$1")" -ge "$2" ]; }
ended() { [[ $(field "$1" JobState) =~ COMPLETED|FAILED|CANCELLED|TIMEOUT|PREEMPTED|NODE_FAIL|OUT_OF_MEMORY ]]; }
sums() { (cd "$work/$1" && sha256sum blocks/*.h5); }

# within NAME SECONDS COMMAND...: waits until the command succeeds; says what the job did if it does not. All waits together end after 240 s.
within() {
  local name=$1 seconds=$(($2 < 240 - SECONDS ? $2 : 240 - SECONDS))
  shift 2
  wait_until "$seconds" "$@" && return
  cat "$work/$name.log"
  squeue
  return 1
}

# is NAME JOB FIELD VALUE: with the job's log if it is not.
is() {
  has "$2" "$3" "$4" && return
  echo "$3 is $(field "$2" "$3"), not $4"
  cat "$work/$1.log"
  return 1
}

# says NAME PATTERN: in the job's log, which is shown if it does not.
says() {
  grep -q "$2" "$work/$1.log" && return
  cat "$work/$1.log"
  return 1
}

# ends_well NAME JOB STARTS RECIPE [STORE]: the job completes, in that many starts (more: 2 or more, where a second one may be too short on a slow
# machine), and what is stored is what an undisturbed run stores.
ends_well() {
  check "$1: ends" within "$1" 90 ended "$2"
  check "$1: is completed" is "$1" "$2" JobState COMPLETED
  case $3 in
  more) check "$1: was queued again" test "$(field "$2" Restarts)" -gt 0 ;;
  *) check "$1: is started $3 times" is "$1" "$2" Restarts $(($3 - 1)) ;;
  esac
  check "$1: the codes of an undisturbed run" "$helper" compare "$work/$4" "$work/${5:-$1}"
}

# kill_rank JOB RANK
kill_rank() {
  local process
  for process in $(cluster_processes); do
    [ "$(readlink "/proc/$process/exe")" = "$(readlink -f "$program")" ] || continue
    if grep -qzxF "SLURM_JOB_ID=$1" "/proc/$process/environ" && grep -qzxF "SLURM_PROCID=$2" "/proc/$process/environ"; then
      kill -KILL "$process" && return
    fi
  done
  echo "job $1 has no rank $2"
  return 1
}

# What is there of blocks is not made again: the sums of their files are as in the file given.
kept() {
  (cd "$work/$1" && sha256sum --check --quiet "$work/$1.sums") && [ -s "$work/$1.sums" ]
}

for bits in 3 4; do
  check "undisturbed: $bits bits" launch 2 calibrate --model "$MODEL" --tokens "$TOKENS" --config "$work/w$bits.yaml" --output "$work/w$bits"
done

# Over two nodes.
nodes=$(submit nodes --)
ends_well nodes "$nodes" 1 w4
check "nodes: ran on both" is nodes "$nodes" NodeList 'n[1-2]'
check "nodes: two ranks" says nodes ' 2 ranks x 1 threads'

# Stopped before its time limit: Slurm warns the batch script, 10 to 40 s after the start (it looks twice a minute, and allows for that).
limited=$(SLOW=2 submit limited --time=1 --signal=B:USR1@20 --)

# Preempted: SIGTERM to the tasks, and GraceTime. The urgent job needs the CPU of the one in `spare`, and of no other.
spare=$(SLOW=1 submit spare --partition=spare -- --stream-checkpoint 1)
check "spare: stores blocks" within spare 30 stores spare 3
check "spare: both ranks keep their streams" test "$(find "$work/spare/streams" -name 'rank-*.safetensors' | wc -l)" -ge 2
sums spare >"$work/spare.sums"
check "spare: makes room for an urgent job" timeout 60 srun --partition=urgent --nodes=2 --ntasks=2 --cpus-per-task=7 true

# A job array of two recipes, under mpirun. Its last task, whose number is that of the whole array, is stopped and queued again, and no other.
printf '%s\n' '# cases' '' "w3 --config '$work/w3.yaml'" "w4 --config '$work/w4.yaml'" >"$work/cases.txt"
array=$(CASES=$work/cases.txt RECIPE='' OUTPUT=$work/array LAUNCHER=mpirun PROGRAM=$work/slow SLOW=1 sbatch --parsable --array=1-2 --nodes=1 \
  --ntasks-per-node=2 --cpus-per-task=1 --time=30 --output="$work/array_%a.log" slurm/array.sbatch --backend cpu --threads 1)

# In the middle queued again by somebody else, cancelled, one rank killed, and stopped where the job is not to come back. Each is slow enough for
# its turn below to come in its middle.
requeued=$(SLOW=4 submit requeued --)
cancelled=$(SLOW=4 submit cancelled --)
killed=$(SLOW=4 submit killed --)
bounded=$(RESTARTS=0 SLOW=4 submit bounded --)
check "array_2: stores blocks" within array_2 30 stores array/w4 2
check "array_2: is stopped" scancel --signal=USR1 --batch "${array}_2"
check "requeued: stores blocks" within requeued 30 stores requeued 2
sums requeued >"$work/requeued.sums"
check "requeued: is queued again" scontrol requeue "$requeued"
check "cancelled: stores blocks" within cancelled 30 stores cancelled 2
check "cancelled: is cancelled" scancel "$cancelled"
check "killed: stores blocks" within killed 30 stores killed 2
sums killed >"$work/killed.sums"
check "killed: rank 1 dies" kill_rank "$killed" 1
check "bounded: stores blocks" within bounded 30 stores bounded 2
check "bounded: is stopped" scancel --signal=USR1 --batch "$bounded"
empty=$(SLOW=20 submit empty --)
check "empty: begins" within empty 30 grep ' 2 ranks x 1 threads' "$work/empty.log"
check "empty: is stopped" scancel --signal=USR1 --batch "$empty"

# stays NAME JOB STATE EXIT: the job ends so and is not queued again.
stays() {
  check "$1: ends" within "$1" 60 ended "$2"
  check "$1: is $3" is "$1" "$2" JobState "$3"
  check "$1: with status $4" is "$1" "$2" ExitCode "$4:0"
  check "$1: is not queued again" is "$1" "$2" Restarts 0
}

stays empty "$empty" FAILED 75
check "empty: says why" says empty 'not queued again: no block was stored'
stays bounded "$bounded" FAILED 75
check "bounded: says why" says bounded 'not queued again: this was restart 0 of 0'

# Cancelled for good; the same submitted again goes on, on one rank.
stays cancelled "$cancelled" CANCELLED 75
check "cancelled: is not whole" test "$(stored cancelled)" -lt $blocks
check "cancelled: holds only blocks" test "$(find "$work/cancelled/blocks" -type f | wc -l)" = "$(stored cancelled)"
sums cancelled >"$work/cancelled.sums"
again=$(submit cancelled --nodes=1 --)
ends_well cancelled "$again" 1 w4
check "cancelled: what was stored stays" kept cancelled

ends_well requeued "$requeued" 2 w4
check "requeued: what was stored stays" kept requeued
ends_well killed "$killed" 2 w4
# The program does, unless srun, which names it too, is faster in ending the step.
check "killed: says which rank" says killed 'rank 1 on host .* is gone\|task 1: Killed'
check "killed: what was stored stays" kept killed
ends_well array_1 "${array}_1" 1 w3 array/w3
ends_well array_2 "${array}_2" 2 w4 array/w4
ends_well spare "$spare" 2 w4
check "spare: what was stored stays" kept spare
check "spare: the streams are gone" test ! -e "$work/spare/streams"
check "spare: ended with 75" says spare 'ended with status 75'
ends_well limited "$limited" more w4
check "limited: ended with 75" says limited 'ended with status 75'
echo "# $SECONDS s"

# ---- what is not ours ----

# Slurm 22.05 fails by itself at times: one of its daemons crashes, or its fence lets a rank out of MPI_Init before the other is ready for messages,
# which then jumps to address 0 there: a backtrace of one frame. A trial with that in it says nothing of what is tested, and is made again.
spoiled() {
  cluster_alive || { echo "a daemon of Slurm's has crashed" && return; }
  awk 'FNR == 1 { start = 0 } /Failing at address: \(nil\)/ { start = FNR }
    /End of error message/ && start && FNR == start + 2 { found = 1 } END { exit !found }' "$work"/*.log || return
  echo "a rank has crashed in MPI_Init"
}

trial=${SLURM_TEST_TRIAL:-1}
if [ $failures -gt 0 ] && [ "$trial" -lt 3 ] && reason=$(spoiled); then
  echo "# trial $trial does not count: $reason"
  cluster_stop
  rm -rf "$work" "$folder"
  SLURM_TEST_TRIAL=$((trial + 1)) TMPDIR=$temporary exec bash "$self" "$program" "$helper"
fi
finish
