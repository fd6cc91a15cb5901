#!/usr/bin/env bash
# Figure 11 of the paper by simulation: rows, table and pictures. Thin over `disagmoe reproduce`.
#   scripts/paper/fig11.sh [--out DIR] [--json]
set -euo pipefail

# shellcheck source=scripts/paper/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

reproduce fig11 "$@"
