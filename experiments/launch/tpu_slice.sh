#!/bin/bash
# One run on a TPU slice, spot or not, asked for again until the run is finished.
#
#   MOEJAX_BUCKET=my-bucket MOEJAX_ZONE=us-east5-a MOEJAX_TYPE=v5p-256 \
#     experiments/launch/tpu_slice.sh NAME --config=configs/paper/t5_xl_upcycled.py
#
# is started from the root of the repository, on any machine with gcloud, and may be started again.
# NAME names the queued resource, its TPU node, and the workdir, gs://BUCKET/runs/NAME, which each
# host sees mounted under ~/moejax_bucket. What HEAD is at the start is what runs. Further:
#   MOEJAX_RUNTIME   version of the TPU VMs (default v2-alpha-tpuv5; v6e: v2-alpha-tpuv6e)
#   MOEJAX_TIER      --spot (default), or empty for on-demand
#   MOEJAX_POLL      seconds between looks at the queue (default 60)
#
# When it is done the slice is deleted. On an error of the run, which the same command would meet
# again, it stays, to be looked at: delete it yourself.

set -euo pipefail
: "${MOEJAX_BUCKET:?set it to a bucket (without gs://), best one with a hierarchical namespace}"
: "${MOEJAX_ZONE:?set it to a zone with the TPUs}" "${MOEJAX_TYPE:?set it to their type, as v5p-256}"
name=${1:?usage: tpu_slice.sh NAME --config=...}
shift
flags=$(printf ' %q' "$@")
tpus=(gcloud compute tpus)
where=(--zone="$MOEJAX_ZONE" --quiet)
code=$(mktemp)
trap 'rm -f "$code"' EXIT

state() {
  "${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)' \
    2>/dev/null || echo NONE
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

# On every host: mounts the bucket, installs what is not there yet, trains.
remote="set -e
if ! command -v gcsfuse; then
  release=gcsfuse-\$(lsb_release -cs)
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null
  echo \"deb [signed-by=/usr/share/keyrings/cloud.google.asc]\" \
    \"https://packages.cloud.google.com/apt \$release main\" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list
  sudo apt-get update -qq && sudo apt-get install -qq gcsfuse
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
    NONE) create ;;
    ACTIVE)
      "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$remote" |
        tee "$code" || :
      if finished; then
        delete
        exit 0
      elif grep -Eq '^moejax ended with (1|2)$' "$code"; then
        echo "The run ended with an error; see above. The slice is still there: $name" >&2
        exit 1
      fi ;;
    FAILED | SUSPENDED) delete ;;   # preempted, for one
  esac
  sleep "${MOEJAX_POLL:-60}"
done
