# syntax=docker/dockerfile:1
# vLLM's CPU build, for a laptop: the same steps as without containers (deploy/vllm/environment.sh).
# Build from the repository's root: docker build -f deploy/docker/teacher-cpu.Dockerfile -t recoup-teacher-cpu .

FROM python:3.12.14-slim-trixie AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Where pip shall look for torch's CPU build beside its usual index.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY deploy/vllm deploy/vllm
RUN PIP_EXTRA_INDEX_URL="$PIP_EXTRA_INDEX_URL" deploy/vllm/environment.sh /opt/vllm python3

FROM python:3.12.14-slim-trixie AS image
# The user has no name in many hosts' lists: what asks for one is told.
ENV PATH=/opt/vllm/bin:$PATH HOME=/tmp USER=vllm PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=2
RUN groupadd --gid 10001 vllm \
    && useradd --uid 10001 --gid vllm --home-dir /tmp --no-create-home --shell /usr/sbin/nologin vllm
COPY --from=build /opt/vllm /opt/vllm
USER 10001:10001
EXPOSE 8000
# Not `vllm serve`: it looks for a package of the name vllm, and the CPU build's is vllm-cpu.
ENTRYPOINT ["python", "-m", "vllm.entrypoints.openai.api_server"]
