# shellcheck shell=bash
# Shared by our scripts: find a Python that runs, make the virtual environment, say what it will cost.
# To be sourced; it does nothing by itself.
#
# Variables a user may set:
#   DISAGMOE_PYTHON   the Python to make the virtual environment with (default: searched on PATH and in pyenv)
#   DISAGMOE_VENV     where the virtual environment lies (default: .venv in the checkout)

PROJECT_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${DISAGMOE_VENV:-$PROJECT_ROOT/.venv}

# Python's minor versions in order of trust.
readonly PYTHON_MINORS="12 13 14" DISK_NEEDED_KB=9500000

say() { printf '%s\n' "$*" >&2; }
die() {
  say "${0##*/}: $*"
  exit 1
}

# Everything that may be a Python, best first, one path a line; a path may come twice.
python_candidates() {
  local minor name directory
  local -a path_entries pyenv_roots=("${PYENV_ROOT:-}" "${HOME:-}/.pyenv")
  IFS=: read -r -a path_entries <<<"$PATH"
  for directory in "${path_entries[@]}"; do
    # a pyenv elsewhere than in the home directory shows itself by its shims
    [ "${directory##*/}" = shims ] && pyenv_roots+=("${directory%/shims}")
  done
  for minor in $PYTHON_MINORS; do
    type -aP "python3.$minor" || true
    for directory in "${pyenv_roots[@]}"; do
      [ -z "$directory" ] || compgen -G "$directory/versions/3.$minor*/bin/python3.$minor" || true
    done
  done
  for name in python3 python; do type -aP "$name" || true; done
}

# Print the path of a Python >= 3.12 with venv and pip, or say what was tried and what to do, and fail.
# A candidate counts only if it runs: pyenv's shims exist for versions they then refuse to start.
find_python() {
  local probe candidate answer code last tried=""
  probe='import sys
if sys.version_info < (3, 12): sys.exit("it is %d.%d, older than 3.12" % sys.version_info[:2])
import ensurepip, venv
print(sys.executable)'
  while IFS= read -r candidate; do
    case $tried in *"  $candidate: "*) continue ;; esac
    if answer=$("$candidate" -c "$probe" 2>&1); then
      printf '%s\n' "${answer##*$'\n'}"
      return 0
    else
      code=$?
    fi
    last=$(printf '%s\n' "$answer" | grep -v '^[[:space:]]*$' | if [ "$code" = 127 ]; then head -n 1; else tail -n 1; fi || true)
    tried+="  $candidate: exit $code: $last"$'\n'
  done < <(if [ -n "${DISAGMOE_PYTHON:-}" ]; then printf '%s\n' "$DISAGMOE_PYTHON"; else python_candidates; fi)
  say "No Python >= 3.12 that runs was found. Tried:"
  say "${tried:-  (nothing called python on PATH, no pyenv)}"
  say "Any of these helps:
  Debian, Ubuntu:  sudo apt install python3.12 python3.12-venv
  pyenv:           pyenv install 3.12
  uv:              uv python install 3.12, then DISAGMOE_PYTHON=\$(uv python find 3.12) ${0}
  elsewhere:       DISAGMOE_PYTHON=/path/to/python3.12 ${0}"
  return 1
}

# What an installation depends on: our metadata, where we lie (it is an editable one), the Python, the extras.
environment_fingerprint() {  # EXTRAS
  (
    cd "$PROJECT_ROOT" || exit 1
    printf '%s\n' "$PROJECT_ROOT" "$1"
    "$VENV/bin/python" -V
    cat setup.py pyproject.toml constraints.txt
  ) | cksum
}

announce_download() {  # EXTRAS
  local free download=2.9 unpacked=5.8 # measured on Linux x86-64, where PyTorch from PyPI brings CUDA's libraries
  [ "$1" != dev ] || download=3.1 unpacked=6.4
  if [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; then
    say "Installing into $VENV: about $download GB to download (less what pip has in its cache), $unpacked GB on disk."
    say "Most of it is PyTorch with CUDA's libraries, as PyPI has it."
  else
    say "Installing into $VENV: up to $download GB to download, most of it PyTorch (measured on Linux x86-64 only)."
  fi
  free=$(df -Pk "$(dirname "$VENV")" | awk 'NR == 2 {print $4}')
  [ "$free" -ge "$DISK_NEEDED_KB" ] ||
    die "only $((free / 1000000)) GB free at $VENV, $((DISK_NEEDED_KB / 1000000)) GB needed; free some, or set DISAGMOE_VENV to a larger disk"
}

# Make $VENV hold this project with EXTRAS ("" or "dev"); quick where it does already.
ensure_environment() {  # EXTRAS
  local extras=$1 python stamp="$VENV/.disagmoe-installed${1:+-$1}"
  if "$VENV/bin/python" -c '' 2>/dev/null; then
    [ "$(cat "$stamp" 2>/dev/null)" != "$(environment_fingerprint "$extras")" ] || return 0
  else
    python=$(find_python) || exit 1
    if [ -e "$VENV" ]; then
      [ -f "$VENV/pyvenv.cfg" ] || die "$VENV exists and is no virtual environment; move it, or set DISAGMOE_VENV"
      rm -rf "$VENV"
    fi
    say "Virtual environment $VENV with $python"
  fi
  if [ ! -d "$VENV" ] || ! compgen -G "$VENV/.disagmoe-installed*" >/dev/null; then
    mkdir -p "$(dirname "$VENV")"
    announce_download "$extras"
    [ -d "$VENV" ] || "$python" -m venv "$VENV"
  fi
  "$VENV/bin/python" -m pip install --disable-pip-version-check \
    --constraint "$PROJECT_ROOT/constraints.txt" --editable "$PROJECT_ROOT${extras:+[$extras]}" >&2 ||
    die "pip could not install the dependencies (see above); run this again once that is mended"
  environment_fingerprint "$extras" >"$stamp"
  [ -z "$extras" ] || environment_fingerprint "" >"$VENV/.disagmoe-installed"
}
