#!/usr/bin/env bash
# Set up, then train a small mixture-of-experts GPT with attention and experts in different processes.
#   scripts/quickstart.sh [--compare] [--steps N] [--out FOLDER]
# --compare also trains it with plain Megatron-LM on the same data and shows both curves and the largest difference.
# The first run downloads PyTorch (its size is told before it starts); a re-run goes straight to training.
set -euo pipefail
case " $* " in
*" -h "* | *" --help "*)
  sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit 0
  ;;
esac
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
ensure_environment ""
exec "$VENV/bin/python" -m megatron_disagmoe.quickstart "$@"
