# Sourced by the SLURM scripts, whose shell is sent USR1 (`--signal=B:`) when its time is up.

# Runs a command and waits for it. TERM and USR1 reach it as TERM, and it may take its time to save.
# Leaves its exit code in `code`; `requeue` is yes if it was USR1, so that it should go on later.
until_saved() {
  requeue=
  "$@" &
  child=$!
  trap 'told=yes; kill -TERM "$child" || :' TERM
  trap 'told=yes; requeue=yes; kill -TERM "$child" || :' USR1
  while :; do
    told='' code=0
    wait "$child" || code=$?
    [[ $told ]] || break   # a signal ends a wait before the command has saved: wait again
  done
}
