#!/bin/bash
# Writes the lists of exact versions with hashes from which the images are built:   deploy/docker/lock.sh
#
# They hold for Python 3.12 on Linux, x86-64 and arm64. torch is in none of them, nor what torch alone
# needs: worker.Dockerfile takes it from the index that its argument names, for CUDA or for CPUs.
# PIP_INDEX_URL and UV_INDEX_URL are heeded; the lists name no index.
set -euo pipefail
cd "$(dirname "$0")/../.."

compile() {
  uv pip compile --quiet --upgrade --generate-hashes --universal --python-version 3.12 --no-annotate \
    --custom-compile-command deploy/docker/lock.sh "$@"
}

torch_alone=(torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(compile pyproject.toml --extra worker --extra quantized 2>/dev/null | grep -oE '^nvidia-[a-z0-9-]+' | sort -u))
skip=("${torch_alone[@]/#/--no-emit-package=}")

compile pyproject.toml --extra postgres --extra s3 --extra tracing -o deploy/docker/api.lock
compile pyproject.toml --extra postgres --extra s3 --extra tracing --extra worker --extra quantized "${skip[@]}" \
  -o deploy/docker/worker.lock
echo 'hatchling>=1.33' | compile - -o deploy/docker/build.lock
echo 'vllm-router==0.1.17' | compile - -o deploy/docker/router.lock
echo 'cyclonedx-bom>=7' | compile - -o deploy/docker/sbom.lock
