#!/usr/bin/env bash
# Install steerserve, editable, with the CPU build of vLLM into .venv.
#   scripts/install.sh EXTRAS      for example: scripts/install.sh cpu,train,dev
# Needs Python 3.11 or newer and nothing else. Tested versions come from constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:?which extras? for example: scripts/install.sh cpu,train,dev}
venv=.venv
pins=(--constraints constraints.txt --build-constraints constraints.txt --overrides overrides.txt)

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# The first Python that will do: $PYTHON, where it is set, is the only one asked.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14 python}; do
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  die "expected Python 3.11 or newer with its venv module, got $(python_found)." \
    "Install one (on Debian and Ubuntu: apt-get install python3 python3-venv), or name one: PYTHON=python3.11 make install"
}

python_found() {
  "${PYTHON:-python3}" -c '
import sys
try:
    import ensurepip, venv
    lacks = ""
except ImportError as error:
    lacks = " without " + str(error).split()[-1].strip("\x27")
print("Python %d.%d%s (%s)" % (sys.version_info[0], sys.version_info[1], lacks, sys.executable))' 2>/dev/null \
    || echo "no ${PYTHON:-python3} that runs"
}

# One of pip's settings, from pip's environment variable or else its configuration files.
pip_setting() {
  local variable
  variable=PIP_$(tr 'a-z-' 'A-Z_' <<<"$1")
  if [ -n "${!variable:-}" ]; then
    echo "${!variable}"
  else
    "$venv/bin/python" -m pip config get "global.$1" 2>/dev/null || true
  fi
}

# uv reads neither pip's variables nor its files; an index or a folder of wheels named there is meant for us too.
tell_uv_what_pip_knows() {
  local links index
  links=$(pip_setting find-links | xargs | tr ' ' ',')
  index=$(pip_setting index-url)
  if [ -z "${UV_FIND_LINKS:-}" ] && [ -n "$links" ]; then export UV_FIND_LINKS=$links; fi
  if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ] && [ -n "$index" ]; then export UV_DEFAULT_INDEX=$index; fi
}

uv_install() { "$venv/bin/uv" pip install --python "$venv/bin/python" "$@"; }

# Is PyTorch installed, or to be had so? Only asks, installs nothing.
torch_comes_from() { uv_install --dry-run --no-deps --constraints constraints.txt "$@" torch; }

main() {
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    local python
    python=$(find_python)
    say "creating $venv with $("$python" --version)"
    "$python" -m venv "$venv"
  fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
  tell_uv_what_pip_knows

  local torch_source=()
  if torch_comes_from --no-index >/dev/null 2>&1; then
    say "PyTorch: from ${UV_FIND_LINKS:-$venv, where it is already}"
  else
    torch_source=(--torch-backend cpu)
    say "PyTorch: the CPU build, from PyTorch's own package index"
    torch_comes_from "${torch_source[@]}" >/dev/null || die "PyTorch's CPU build is not to be had here:" \
      "no folder of wheels that the environment names holds it (UV_FIND_LINKS is '${UV_FIND_LINKS:-}')," \
      "and PyTorch's package index did not give it (above). Do one of two things: let this machine reach that index;" \
      "or put a wheel of $(grep '^torch==' constraints.txt)+cpu for $("$venv/bin/python" --version) in a folder," \
      "and run again with that folder named: PIP_FIND_LINKS=path/to/wheels"
  fi
  uv_install "${torch_source[@]}" "${pins[@]}" --editable ".[$extras]"
}

main
