#!/usr/bin/env bash
# Train at paper scale: 16 nodes x 8 GPUs. Makes a plan where there is none, verifies it, starts this node's processes.
#   scripts/paper/run_16x8.sh --dry-run                     every rank's role and command; needs no GPU
#   scripts/paper/run_16x8.sh --node I --master HOST        on every node, I = 0 .. 15, HOST = name of node 0
# More options: --model NAME, --seq-length S, --plan FILE (default paper-output/MODEL-S.yaml), --script pretrain_gpt.py;
# after -- come Megatron flags of your own (data, tokenizer, learning rate, --train-iters ...).
set -euo pipefail

# shellcheck source=scripts/paper/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

model=qwen3-235b-a22b cluster=h800-16x8 seq_length=4096 plan=
launch=()
while [ $# -gt 0 ]; do
  case $1 in
    --model) model=$2 && shift 2 ;;
    --cluster) cluster=$2 && shift 2 ;;
    --seq-length) seq_length=$2 && shift 2 ;;
    --plan) plan=$2 && shift 2 ;;
    --node | --master | --port | --script) launch+=("$1" "$2") && shift 2 ;;
    --dry-run) launch+=("$1") && shift ;;
    -h | --help) sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}" && exit 0 ;;
    --) break ;;
    *) say "${0##*/}: unknown option $1" && exit 2 ;;
  esac
done
disagmoe=$(find_disagmoe)
plan=${plan:-paper-output/$model-$seq_length.yaml}
if [ ! -f "$plan" ]; then
  mkdir -p "$(dirname "$plan")"
  say "Planning $model at $seq_length tokens on $cluster: $plan"
  "$disagmoe" plan --model "$model" --cluster "$cluster" --seq-length "$seq_length" --executable --keep 2 \
    --no-reasons --no-sensitivity --out "$plan" >&2
fi
"$disagmoe" plan verify "$plan" --model "$model" --cluster "$cluster" >&2
python=$(dirname "$disagmoe")/python
[ -x "$python" ] || python=python3
exec "$python" -m megatron_disagmoe.plan_launch "$plan" "${launch[@]}" "$@"
