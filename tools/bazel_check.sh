#!/usr/bin/env bash
# `bazel test` offline, with Debian's bazel-bootstrap 4.2.3, on a scratch copy of the tree; packages come from a virtual
# environment. Needs `apt-get install bazel-bootstrap`.
#   VENV=.venv-test bash tools/bazel_check.sh [arguments of bazel test; none: every target but the slow tests]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(cd "${VENV:-.venv-test}" && pwd)
scratch=$(mktemp -d)
trap 'chmod -R u+w "$scratch"; rm -rf "$scratch"' EXIT

mkdir "$scratch/tree"
git ls-files -z -co --exclude-standard | tar -c --null -T - | tar -x -C "$scratch/tree"
cd "$scratch/tree"
cat > WORKSPACE <<'END'
load("//:tools/bazel_offline.bzl", "offline")

offline(requirements = "//:requirements.txt")
END
[ $# -gt 0 ] || set -- --test_tag_filters=-slow //...
bazel --batch --output_user_root="$scratch/cache" test --nosandbox_debug --experimental_repository_disable_download \
  --test_env=PATH="$venv/bin:/usr/bin:/bin" --test_env=MOE_CACHE="$scratch/moe" --test_output=errors --jobs=2 "$@"
