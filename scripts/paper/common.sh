# shellcheck shell=bash
# Shared by the scripts of this folder. To be sourced.

# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

# Our command: the one in our virtual environment, else the one on PATH.
find_disagmoe() {
  local found=$VENV/bin/disagmoe
  [ -x "$found" ] || found=$(type -P disagmoe) ||
    die "no disagmoe in $VENV nor on PATH: pip install $PROJECT_ROOT, or run scripts/quickstart.sh once"
  printf '%s\n' "$found"
}

reproduce() {  # FIGURE [OPTIONS]
  local disagmoe figure=$1
  shift
  disagmoe=$(find_disagmoe)
  case " $* " in *" --out "*) ;; *) set -- --out "paper-output/$figure" "$@" ;; esac
  exec "$disagmoe" reproduce "$figure" "$@"
}
