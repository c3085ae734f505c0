#!/usr/bin/env bash
# Makes the virtual environment if there is none, then runs one of:
#   bash tools/dev.sh train [flags of moe.train]     the main job
#   bash tools/dev.sh test  [flags of pytest]        the fast tests; with `--slow` all of them
#   bash tools/dev.sh tpu   [flags of pytest]        the compile tests for TPU (Python >= 3.12)
#   bash tools/dev.sh faults [flags of pytest]       whole jobs with faults; MOE_TURN=n/4 takes every fourth from n on
#   bash tools/dev.sh parity [flags of pytest]       the Hugging Face tests beside torch and transformers (CPU builds), and lm-eval
#   bash tools/dev.sh run   COMMAND ...              any command within the environment
set -euo pipefail
cd "$(dirname "$0")/.."

python_of() {  # the first interpreter of at least version 3.$1
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, $1))" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  for candidate in "$HOME"/.pyenv/versions/3.1[1-9]*/bin/python3; do
    if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, $1))" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python >= 3.$1 found; install one, or set PYTHON" >&2
  return 1
}

environment() {  # folder, least minor version, packages ...
  local folder=$1 minor=$2 python
  shift 2
  local wanted
  wanted=$(cat requirements.txt tools/requirements_test.txt; printf '%s\n' "$@")
  if [ ! -x "$folder/bin/python" ] || [ "$(cat "$folder/wanted" 2>/dev/null)" != "$wanted" ]; then
    python=$(python_of "$minor")
    echo "making $folder with $python (once, a minute or two)" >&2
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt "$@" >&2
    printf '%s\n' "$wanted" > "$folder/wanted"
  fi
}

verb=${1:-help}
shift || true
case "$verb" in
  train) environment .venv 11; exec .venv/bin/python -m moe.train "$@" ;;
  test)
    environment .venv-test 11 -r tools/requirements_test.txt
    if [ "${1:-}" = --slow ]; then shift; exec .venv-test/bin/python -m pytest "$@"; fi
    exec .venv-test/bin/python -m pytest -m "not slow" "$@" ;;
  tpu)
    # One pinned pair: every figure of the compiler belongs to it.
    environment .venv-tpu 12 -r tools/requirements_test.txt "jax[tpu]==0.12.0.1"
    TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 exec .venv-tpu/bin/python -m pytest -n 0 -m tpu "$@" ;;
  faults)
    environment .venv-test 11 -r tools/requirements_test.txt
    exec .venv-test/bin/python -m pytest -n 0 tests/faults_test.py tests/network_test.py "$@" ;;
  parity)
    environment .venv-parity 11 -r tools/requirements_test.txt "torch==2.13.0+cpu" "transformers==5.23.0" "lm-eval[hf]==0.4.13"
    exec .venv-parity/bin/python -m pytest -n 0 tests/hugging_face_test.py tests/lm_harness_test.py "$@" ;;
  run) environment .venv 11; PATH="$PWD/.venv/bin:$PATH" exec "$@" ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0"; [ "$verb" = help ] ;;
esac
