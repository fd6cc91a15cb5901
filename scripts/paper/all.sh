#!/usr/bin/env bash
# Every figure of the paper by simulation. Thin over `disagmoe reproduce all`.
#   scripts/paper/all.sh [--out DIR] [--json]
set -euo pipefail

# shellcheck source=scripts/paper/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

reproduce all "$@"
