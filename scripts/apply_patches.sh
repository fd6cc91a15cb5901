#!/usr/bin/env bash
# Patch a Megatron-LM checkout so that its own pretrain_gpt.py takes --af-pipe (docs/patches.md).
#   scripts/apply_patches.sh [--status|--check|--revert] CHECKOUT [--json]
# Thin over `disagmoe patch`: the one in our virtual environment, else the one on PATH.
set -euo pipefail

# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

action=apply
case ${1:-} in
  --status | --check | --revert)
    action=${1#--}
    shift
    ;;
esac
disagmoe=$VENV/bin/disagmoe
[ -x "$disagmoe" ] || disagmoe=$(type -P disagmoe) ||
  die "no disagmoe in $VENV nor on PATH: pip install $PROJECT_ROOT, or run scripts/quickstart.sh once"
exec "$disagmoe" patch "$action" "$@"
