#!/bin/bash
# One run on a TPU slice, spot or not, asked for again until the run is finished.
#
#   MOEJAX_BUCKET=my-bucket MOEJAX_ZONE=us-east5-a MOEJAX_TYPE=v5p-256 \
#     experiments/launch/tpu_slice.sh t5_xl_upcycled --config=configs/paper/t5_xl_upcycled.py \
#     --config.init.parent=../moejax_bucket/runs/t5_xl \
#     --config.data.data_dir=../moejax_bucket/tfds \
#     --config.data.text.vocabulary=../moejax_bucket/sentencepiece.model
#
# is started from the root of the repository, on any machine with gcloud, and may be started again:
# what an earlier start left running is told to save, and ended. The first argument names the queued
# resource, its TPU node, and the workdir, gs://BUCKET/runs/NAME. What HEAD is at the start is what
# runs, on each host in ~/moejax, beside which the bucket is mounted as ~/moejax_bucket: so paths in
# it begin with ../moejax_bucket. Further:
#   MOEJAX_RUNTIME   version of the TPU VMs (default v2-alpha-tpuv5; v6e: v2-alpha-tpuv6e)
#   MOEJAX_TIER      --spot (default), or empty for on-demand
#   MOEJAX_POLL      seconds between looks at the queue (default 60)
#   MOEJAX_TRIES     how often in a row the slice may not be created or set up (default 5)
#
# When it is done the slice is deleted. On an error of the run, which the same command would meet
# again, and after MOEJAX_TRIES, it stays, to be looked at: delete it yourself.

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

# NONE if there is none; UNKNOWN if gcloud cannot say, which is no reason to ask for another.
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
again() {   # gives up when it was called MOEJAX_TRIES times in a row
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

# On every host: ends what an earlier start left, mounts the bucket, installs what is not there yet,
# trains. (The pattern is that of Python's own command line, not of the shell's that runs this.)
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
  wait='-o DPkg::Lock::Timeout=300'   # new machines update themselves at first
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
      # A host that freezes ends its connection, or the others would be waited for in vain.
      "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all \
        --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4 \
        --command="$remote" | tee "$code" || :
      if grep -Eq '^moejax ended with (1|2)$' "$code"; then   # the workdir may be of another run
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
    FAILED | SUSPENDED) delete ;;   # preempted, for one
  esac
  sleep "${MOEJAX_POLL:-60}"
done
