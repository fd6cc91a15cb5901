#!/usr/bin/env bash
# Set up and pass the tests: linters, type checker, then pytest.
#   scripts/test.sh [PYTEST ARGUMENTS]     e.g. scripts/test.sh tests/schedules -k verify
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
ensure_environment dev
cd "$PROJECT_ROOT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # several ranks share the cores

failed=()
check() {  # NAME COMMAND...
  say "== $1"
  "${@:2}" || failed+=("$1")
}
check ruff "$VENV/bin/ruff" check .
check mypy "$VENV/bin/mypy"
check shellcheck find scripts .ci patches -type f \( -name '*.sh' -o -path .ci/run \) -exec "$VENV/bin/shellcheck" -x {} +
check pytest "$VENV/bin/python" -m pytest "$@"

if [ ${#failed[@]} -gt 0 ]; then die "failed: ${failed[*]}"; fi
say "All checks passed."
