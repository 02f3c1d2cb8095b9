#!/bin/bash
# resume.sh OMNIQUANT TEST_HELPER: a run that was stopped, killed, damaged or moved to other ranks ends with the codes of an undisturbed one.
# OMNIQUANT_KILL_RUNS=N: runs that are killed at random moments (20).
# shellcheck disable=SC2317 # functions are called through check
# shellcheck source=tests/common.bash
. "$(dirname "$0")/common.bash"
runs=${OMNIQUANT_KILL_RUNS:-20}
sanitized && runs=${OMNIQUANT_KILL_RUNS:-3}

"$helper" tokens "$work/tokens.h5" 2000 96 1 && "$helper" model "$work/model" 6 64 4 2 128 96 F32 && "$helper" model "$work/other" 6 64 4 2 128 96 F32 9 &&
  "$helper" tokens "$work/other.h5" 2000 96 2 || exit 1
base=(--model "$work/model" --tokens "$work/tokens.h5" --samples 6 --batch 4 --epochs 3 --seqlen 32)
recipe=("${base[@]}" --wbits 3 --group-size 16)

# calibrate RANKS NAME FLAG...: into $work/NAME, output in $work/log.
calibrate() {
  launch "$1" calibrate --output "$work/$2" "${@:3}" >"$work/log" 2>&1 || {
    cat "$work/log"
    return 1
  }
}

# begin RANKS NAME FLAG...: the same in the background; sets launcher to mpirun's process and waits until block 1 is stored.
begin() {
  local ranks=$1 name=$2
  shift 2
  # shellcheck disable=SC2086 # several words
  OMNIQUANT_TEST_READ_SECONDS=${read_seconds:-0.4} mpirun ${mpirun_flags:-} --bind-to none --oversubscribe -np "$ranks" "$program" calibrate \
    --output "$work/$name" "$@" --backend cpu --threads 1 >"$work/log" 2>&1 </dev/null &
  launcher=$!
  for _ in {1..600}; do
    if [ -e "$work/$name/blocks/0001.h5" ] || ! kill -0 $launcher 2>/dev/null; then break; fi
    sleep 0.05
  done
}

# Waits for mpirun, whose status it returns, and ends it where it has had no rank for half a minute: it may hang in its own end (PMIx_server_finalize).
wait_launcher() {
  local idle=0
  while kill -0 $launcher 2>/dev/null; do
    if [ -n "$(pgrep -P $launcher -r D,R,S)" ]; then idle=0; else idle=$((idle + 1)); fi
    [ $idle -lt 300 ] || kill -9 $launcher
    sleep 0.1
  done
  wait $launcher 2>/dev/null
}

# Process of a rank.
rank() { pgrep -P $launcher | sed -n "$(($1 + 1))p"; }
said() { grep -q -e "$1" "$work/log" 2>/dev/null || { cat "$work/log" && return 1; }; }
fails() { ! "$@" >"$work/other.log" 2>&1; }
also_said() { grep -q -e "$1" "$work/other.log" || { cat "$work/other.log" && return 1; }; }
# Blocks that are stored.
stored() { find "$work/$1/blocks" -name '*.h5' | wc -l; }
# Nothing but the store: no temporary file, no lock, no checkpoint of the streams.
tidy() {
  local names
  names=$(cd "$work/$1" && find . ! -name '000[0-9].h5' | sort | tr '\n' ' ')
  echo "$names"
  [ "$names" = ". ./blocks ./omniquant.h5 " ]
}
# Every block that is there is whole.
whole() { "$program" verify --json "$work/$1" 2>/dev/null | grep -q '"damaged": \[\]' || { "$program" verify "$work/$1" && return 1; }; }
same() { "$helper" compare "$work/$1" "$work/$2"; }

check "an undisturbed run" calibrate 2 reference "${recipe[@]}"
check "it is whole" "$program" verify "$work/reference"
check "the same command again" calibrate 2 reference "${recipe[@]}"
check "it has nothing to do" said 'nothing is left to do'

echo "# signals"
for signal in TERM INT USR1; do
  begin 2 $signal "${recipe[@]}" --stream-checkpoint 2
  kill -$signal "$(rank 1)"
  wait_launcher
  check "$signal to one rank: status 75" test $? = 75
  check "$signal: said once" test "$(grep -c "^omniquant: stopped by SIG$signal" "$work/log")" = 1
  check "$signal: some blocks are stored" test "$(stored $signal)" -ge 2 -a "$(stored $signal)" -lt 6
  check "$signal: they are whole" whole $signal
  check "$signal: the run goes on" calibrate 2 $signal "${recipe[@]}"
  check "$signal: the same codes" same reference $signal
  check "$signal: tidy" tidy $signal
done
begin 1 twice "${recipe[@]}"
kill -STOP "$(rank 0)" # both come before it can act on the first
kill -TERM "$(rank 0)" && sleep 0.1
kill -CONT "$(rank 0)"
wait_launcher
check "a stop is not forgotten" test $? = 75
rm "$work/log" # in which is what is waited for below
OMNIQUANT_TEST_READ_SECONDS=20 "$program" calibrate --output "$work/slow" "${recipe[@]}" --backend cpu --threads 1 >"$work/log" 2>&1 &
slow=$!
for _ in {1..200}; do # until it works
  if said '^llama' >/dev/null 2>&1; then break; fi
  sleep 0.05
done
kill -TERM $slow && sleep 1
check "the first signal lets what is being read end" kill -0 $slow
kill -TERM $slow
wait $slow
check "a second signal ends it at once" test $? = $((128 + 15))

echo "# dead ranks, without the launcher's help"
for victim in 0 3; do
  mpirun_flags=--enable-recovery begin 4 "dead $victim" "${recipe[@]}"
  began=$SECONDS
  kill -9 "$(rank $victim)"
  wait_launcher
  check "rank $victim: all end within a minute" test $((SECONDS - began)) -le 60
  check "rank $victim: it is named with its host" said "^omniquant: rank $victim on host $(hostname) is gone"
  check "rank $victim: whole" whole "dead $victim"
done
check "the run goes on without one of them" calibrate 2 "dead 3" "${recipe[@]}"
check "with the same codes" same reference "dead 3"

echo "# another run in the folder"
refused() {
  local message=$1
  ! launch 2 calibrate --output "$work/reference" "${@:2}" >"$work/log" 2>&1 && said "$message"
}
before=$(cd "$work/reference" && find . -type f -exec sha256sum {} + | sort)
check "another recipe" refused 'reference: holds another run: recipe: wbits is 3 there and 4 here' "${recipe[@]}" --wbits 4
check "another model" refused 'holds another run: model: it was made from other weights' "${recipe[@]}" --model "$work/other"
check "other tokens" refused 'holds another run: tokens' "${recipe[@]}" --tokens "$work/other.h5"
check "other first blocks" refused 'holds another run: --blocks: it begins with 0 there and with 1 here' "${recipe[@]}" --blocks 1:6
check "nothing of it has changed" test "$before" = "$(cd "$work/reference" && find . -type f -exec sha256sum {} + | sort)"
read_seconds=2 begin 1 busy "${recipe[@]}"
check "a run in work" fails "$program" calibrate --output "$work/busy" "${recipe[@]}" --backend cpu --threads 1
check "a run in work: said" also_said 'busy: another omniquant is writing here'
kill -9 "$(rank 0)"
wait_launcher

# half NAME: the first three blocks of the reference.
half() {
  rm -rf "${work:?}/$1"
  cp -R "$work/reference" "$work/$1"
  rm "$work/$1"/blocks/000[345].h5
}

echo "# where it goes on"
for ranks in 1 2 4; do
  half "half $ranks"
  check "$ranks ranks go on" calibrate $ranks "half $ranks" "${recipe[@]}"
  check "$ranks ranks: three blocks" said 'blocks 0 to 2 of 6 are stored, the run goes on behind them'
  check "$ranks ranks: the same codes" same reference "half $ranks"
done
half "own recipe"
check "--resume without a recipe" calibrate 2 "own recipe" --model "$work/model" --tokens "$work/tokens.h5" --resume
check "--resume: the same codes" same reference "own recipe"
check "--resume where nothing is" calibrate 2 "nothing yet" "${recipe[@]}" --resume
check "--resume where nothing was: the same codes" same reference "nothing yet"
check "half of the blocks" calibrate 2 "two halves" "${recipe[@]}" --blocks 0:3
check "and the rest" calibrate 2 "two halves" "${recipe[@]}"
check "two halves are the whole" same reference "two halves"

echo "# damage"
half damaged
printf '\377' | dd of="$work/damaged/blocks/0001.h5" bs=1 seek=6000 conv=notrunc 2>/dev/null
check "a damaged block: verify fails" fails "$program" verify "$work/damaged"
check "a damaged block: verify says which" also_said '^block 1 is damaged'
check "a damaged block is made again" calibrate 2 damaged "${recipe[@]}"
check "it is said" said 'block 1 is calibrated again'
check "damaged: the same codes" same reference damaged
half headless
rm "$work/headless/omniquant.h5"
check "without its master file" calibrate 2 headless "${recipe[@]}"
check "headless: the same codes" same reference headless
truncate -s 1000 "$work/headless/omniquant.h5"
check "a damaged master: verify fails" fails "$program" verify "$work/headless"
check "a damaged master: verify says what mends it" also_said 'verify --repair'
check "a damaged master: verify --repair" "$program" verify --repair "$work/headless"
check "repaired" same reference headless

echo "# checkpoints of the streams"
"$helper" model "$work/deep" 8 64 4 2 128 96 F32 || exit 1
long=("${base[@]}" --model "$work/deep" --wbits 4 --group-size 0 --lwc-init search --optimizer sign --let --abits 8)
check "a long run" calibrate 2 long "${long[@]}"
begin 2 streams "${long[@]}" --stream-checkpoint 1
for _ in {1..600}; do
  if [ "$(stored streams)" -ge 5 ]; then break; fi
  sleep 0.05
done
kill -USR1 $launcher
wait_launcher
check "stopped" test $? = 75
last=$(find "$work/streams/streams" -mindepth 1 -maxdepth 1 | sort | tail -n 1)
check "there is a checkpoint, one file a rank" test "$(find "$last" -name 'rank-*.safetensors' | wc -l)" = 2
for ranks in 1 2 4; do
  rm -rf "$work/streams $ranks" && cp -R "$work/streams" "$work/streams $ranks"
  check "$ranks ranks go on" calibrate $ranks "streams $ranks" "${long[@]}"
  check "$ranks ranks: from the checkpoint" said '^hidden states are read from the checkpoint at block [1-9]'
  check "$ranks ranks: the same codes" same long "streams $ranks"
  check "$ranks ranks: tidy" tidy "streams $ranks"
done
find "$work/streams/streams" -name '*.safetensors' | while read -r file; do printf '\377' | dd of="$file" bs=1 seek=9000 conv=notrunc 2>/dev/null; done
check "damaged checkpoints are passed over" calibrate 2 streams "${long[@]}"
check "damaged checkpoints: not read" fails said 'are read from the checkpoint'
check "damaged checkpoints: the same codes" same long streams

echo "# several recipes, stopped apart"
printf 'wbits: 3\ngroup_size: 16\n' >"$work/three.yaml"
printf 'wbits: 4\nlet: true\nabits: 8\n' >"$work/four.yaml"
several=("${base[@]}" --config "$work/three.yaml" --config "$work/four.yaml")
check "two recipes" calibrate 2 several "${several[@]}"
for ranks in 2 8; do # on 8 in teams
  rm -rf "$work/apart" && cp -R "$work/several" "$work/apart"
  rm "$work"/apart/three/blocks/000[2345].h5 "$work"/apart/four/blocks/000[45].h5
  check "$ranks ranks go on" calibrate $ranks apart "${several[@]}"
  check "$ranks ranks: the same codes of the first" same several/three apart/three
  check "$ranks ranks: the same codes of the second" same several/four apart/four
done

echo "# files that change, and disks"
begin 2 changed "${recipe[@]}"
touch "$work/model/model.safetensors"
wait_launcher
check "a model that changes: status 2" test $? = 2
check "a model that changes: said" said "model.safetensors: was changed while it was in use"
check "a model that changes: whole" whole changed
check "a model that has only been touched goes on" calibrate 2 changed "${recipe[@]}"
begin 2 vanished "${recipe[@]}"
mv "$work/vanished" "$work/hidden"
wait_launcher
check "a folder that vanishes: status 1" test $? = 1
check "a folder that vanishes: said" said '^omniquant: .*/vanished/.*: cannot be written.*: No such file or directory'
check "a folder that vanishes: whole" whole hidden
if mkdir "$work/disk" && mount -t tmpfs -o size=200k none "$work/disk" 2>/dev/null; then
  trap '! here || { umount -l "$work/disk"; rm -rf "$work"; }' EXIT
  check "a small disk" fails "$program" calibrate --output "$work/disk/out" "${recipe[@]}" --backend cpu --threads 1
  check "a small disk: told before the start" also_said 'make room or choose another --output'
  figured=$(sed -n 's/.*stored takes \([0-9.]*\) MiB.*/\1/p' "$work/other.log")
  taken=$(cat "$work"/reference/blocks/*.h5 | wc -c)
  check "what is figured is what it takes" near "$(awk "BEGIN { print $taken / 1048576 }")" "$figured" 0.1
  check "a small disk: nothing is begun" test ! -e "$work/disk/out"
  mount -o remount,size=450k "$work/disk"
  begin 2 disk/out "${recipe[@]}"
  dd if=/dev/zero of="$work/disk/filler" bs=1k 2>/dev/null
  wait_launcher
  check "a disk that fills up: status 1" test $? = 1
  check "a disk that fills up: said" said '^omniquant: .*: cannot be written: No space left on device'
  check "a disk that fills up: whole" whole disk/out
  rm "$work/disk/filler"
  check "with room the run goes on" calibrate 2 disk/out "${recipe[@]}"
  check "with room: the same codes" same reference disk/out
  umount -l "$work/disk"
  trap '! here || rm -rf "$work"' EXIT
else
  echo "# disks not tried: nothing can be mounted here"
fi

echo "# kill -9 at random moments, $runs runs"
RANDOM=${OMNIQUANT_KILL_SEED:-$$}
echo "# OMNIQUANT_KILL_SEED=$RANDOM"

# One attempt that is killed after a while; its status. Victims: either rank, both, or mpirun too.
attempt() {
  OMNIQUANT_TEST_READ_SECONDS=0.15 mpirun --bind-to none --oversubscribe -np 2 "$program" calibrate --output "$work/killed" "${recipe[@]}" \
    --stream-checkpoint $((RANDOM % 3)) --backend cpu --threads 1 >"$work/log" 2>&1 </dev/null &
  launcher=$!
  sleep "$((RANDOM % 2)).$((RANDOM % 900 + 100))"
  case $((RANDOM % 4)) in
  0) kill -9 "$(rank 0)" 2>/dev/null ;;
  1) kill -9 "$(rank 1)" 2>/dev/null ;;
  2) pkill -9 -P $launcher ;;
  3)
    pkill -9 -P $launcher
    kill -9 $launcher 2>/dev/null
    ;;
  esac
  wait_launcher
}

killed_run() {
  local attempts=0
  rm -rf "$work/killed"
  until attempt; do
    attempts=$((attempts + 1))
    kills=$((kills + 1))
    [ ! -e "$work/killed/omniquant.h5" ] || whole killed || return 1
    [ $attempts -lt 200 ] || { cat "$work/log" && return 1; }
  done
  same reference killed && tidy killed
}

kills=0 good=0
for ((run = 1; run <= runs; run++)); do
  if killed_run >"$work/run.log" 2>&1; then
    good=$((good + 1))
  else
    echo "# run $run:" && cat "$work/run.log" "$work/log"
  fi
done
check "$good of $runs runs end with the same codes, after $kills deaths" test "$good" = "$runs"
finish
