# Sourced by the SLURM scripts. SLURM sends USR1 to their shell (`--signal=B:`) when time is short.

# Runs a command and waits until it ends. The command gets TERM for TERM and USR1, and then has time
# to save. Sets `code` to its exit code, and `requeue` to yes after USR1: it should continue later.
until_saved() {
  requeue=
  "$@" &
  child=$!
  trap 'told=yes; kill -TERM "$child" || :' TERM
  trap 'told=yes; requeue=yes; kill -TERM "$child" || :' USR1
  while :; do
    told='' code=0
    wait "$child" || code=$?
    [[ $told ]] || break   # a signal ends `wait` before the command has saved: wait again
  done
}
