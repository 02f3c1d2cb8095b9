# wait.bash: waiting for what others do. Sourced.
# shellcheck shell=bash

# wait_until SECONDS COMMAND...: waits until the command succeeds; 1 if it has not by then.
wait_until() {
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.1
  done
}
