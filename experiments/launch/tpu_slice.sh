#!/bin/bash
# Trains one run on a TPU slice, spot or not; requests a new slice until the run is finished.
#
#   MOEJAX_BUCKET=my-bucket MOEJAX_ZONE=us-east5-a MOEJAX_TYPE=v5p-256 \
#     experiments/launch/tpu_slice.sh t5_xl_upcycled --config=configs/paper/t5_xl_upcycled.py \
#     --config.init.parent=../moejax_bucket/runs/t5_xl \
#     --config.data.data_dir=../moejax_bucket/tfds \
#     --config.data.text.vocabulary=../moejax_bucket/sentencepiece.model
#
# Start it from the root of the repository, on any machine with gcloud. You may start it again:
# processes of an earlier start get a signal to save, and end. The first argument names the queued
# resource, its TPU node, and the workdir gs://BUCKET/runs/NAME. The script copies the current HEAD
# to ~/moejax on each host and mounts the bucket as ~/moejax_bucket beside it, so paths in the
# bucket begin with ../moejax_bucket. Other variables:
#   MOEJAX_RUNTIME   version of the TPU VMs (default v2-alpha-tpuv5; v6e: v2-alpha-tpuv6e)
#   MOEJAX_TIER      --spot (default), or empty for on-demand
#   MOEJAX_POLL      seconds between two queries of the queue (default 60)
#   MOEJAX_TRIES     failures in a row to create or set up the slice, after which the script gives
#                    up (default 5)
#
# The script deletes the slice when the run is finished. After an error of the run, which the same
# command would meet again, and after MOEJAX_TRIES failures, the slice stays so that you can inspect
# it: delete it yourself.

set -euo pipefail
: "${MOEJAX_BUCKET:?set it to a bucket (without gs://), best one with a hierarchical namespace}"
: "${MOEJAX_ZONE:?set it to a zone with the TPUs}" "${MOEJAX_TYPE:?set it to their type, as v5p-256}"
name=${1:?usage: tpu_slice.sh NAME --config=...}
shift
flags=$(printf ' %q' "$@")
tpus=(gcloud compute tpus)
where=(--zone="$MOEJAX_ZONE" --quiet)
code=$(mktemp) said=$(mktemp)
trap 'rm -f "$code" "$said"' EXIT

# Prints the state of the slice. NONE: there is none; UNKNOWN: gcloud failed, so create no other.
state() {
  "${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)' \
    2>"$said" && return
  if grep -Eqi 'NOT_FOUND|not found' "$said"; then
    echo NONE
  else
    cat "$said" >&2
    echo UNKNOWN
  fi
}

failed=0
again() {   # gives up when it is called MOEJAX_TRIES times in a row
  failed=$((failed + 1))
  if [ "$failed" -ge "${MOEJAX_TRIES:-5}" ]; then
    echo "$1, $failed times in a row. If there is a slice it is still there: $name" >&2
    exit 1
  fi
  echo "$1; again"
}

create() {
  # shellcheck disable=SC2086  # an empty tier is no argument
  "${tpus[@]}" queued-resources create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="$MOEJAX_TYPE" --runtime-version="${MOEJAX_RUNTIME:-v2-alpha-tpuv5}" \
    ${MOEJAX_TIER---spot}
}

delete() {
  "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force
}

# Runs on every host: ends processes of an earlier start, mounts the bucket, installs what is
# missing, trains. (The pattern matches Python's own command line, not that of the shell.)
remote="set -e
old='^[^ ]*venv/bin/python -m moejax'
if pkill -TERM -f \"\$old\"; then
  for _ in \$(seq 60); do pgrep -f \"\$old\" > /dev/null || break; sleep 2; done
  pkill -KILL -f \"\$old\" || :
fi
if ! command -v gcsfuse; then
  release=gcsfuse-\$(lsb_release -cs)
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null
  echo \"deb [signed-by=/usr/share/keyrings/cloud.google.asc]\" \
    \"https://packages.cloud.google.com/apt \$release main\" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list
  wait='-o DPkg::Lock::Timeout=300'   # a new machine first updates itself
  sudo apt-get \$wait update -qq && sudo apt-get \$wait install -qq gcsfuse
fi
bucket=\$HOME/moejax_bucket
mkdir -p \$bucket
mountpoint -q \$bucket || gcsfuse --implicit-dirs --rename-dir-limit=100000 $MOEJAX_BUCKET \$bucket
rm -rf ~/moejax && mkdir ~/moejax && cd ~/moejax
tar xzf \$bucket/source/$name.tar.gz
command -v ~/.local/bin/uv || curl -fsSL https://astral.sh/uv/install.sh | sh
[ -d ~/venv ] || ~/.local/bin/uv venv -q --python 3.11 ~/venv
~/.local/bin/uv pip install -q --python ~/venv/bin/python -c constraints.txt -e '.[tpu]'
code=0
~/venv/bin/python -m moejax.main --distributed=tpu --workdir=\$bucket/runs/$name$flags || code=\$?
echo moejax ended with \$code"

finished() {
  gcloud storage cat "gs://$MOEJAX_BUCKET/runs/$name/status.json" 2>/dev/null |
    grep -q '"phase": "finished"'
}

git archive --format=tar.gz HEAD | gcloud storage cp - "gs://$MOEJAX_BUCKET/source/$name.tar.gz"
while :; do
  now=$(state)
  echo "$(date '+%F %T') $name: $now"
  case $now in
    NONE) create || again 'The slice was not created' ;;
    ACTIVE)
      # The keep-alive ends the connection of a frozen host; otherwise ssh would wait for ever.
      "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all \
        --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4 \
        --command="$remote" | tee "$code" || :
      if grep -Eq '^moejax ended with (1|2)$' "$code"; then   # the workdir may be another run's
        echo "The run ended with an error; see above. The slice is still there: $name" >&2
        exit 1
      elif finished; then
        delete
        exit 0
      elif grep -q '^moejax ended with ' "$code"; then
        failed=0
      else
        again 'The run was not set up, or its hosts were lost'
      fi ;;
    FAILED | SUSPENDED) delete ;;   # preempted, for example
  esac
  sleep "${MOEJAX_POLL:-60}"
done
