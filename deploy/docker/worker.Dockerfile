# syntax=docker/dockerfile:1
# The worker: takes recoveries from the queue and runs each in a process of its own.
# Build from the repository's root:
#   docker build -f deploy/docker/worker.Dockerfile -t recoup-worker .
#   docker build -f deploy/docker/worker.Dockerfile --target sbom --output type=local,dest=. .   # worker.cdx.json
#
# The index decides which torch: the default brings the CUDA libraries along, PyTorch's own index for CPUs
# an image of a few hundred MB. The driver comes from the host, by the NVIDIA container toolkit.

FROM python:3.12.14-slim-trixie AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# The largest part and what changes rarely come first: a change of the code installs nothing anew.
COPY deploy/docker/build.lock deploy/docker/worker.lock ./
RUN python -m venv /opt/build && /opt/build/bin/pip install --require-hashes -r build.lock
# --no-deps: the list is whole but for torch, which others ask for and which comes next.
RUN python -m venv /opt/recoup && /opt/recoup/bin/pip install --no-deps --require-hashes -r worker.lock
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
RUN /opt/recoup/bin/pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
# A vLLM beside the worker, in an environment of its own, where the two share one GPU in turns: cuda, cpu or none.
ARG VLLM=
COPY deploy/vllm deploy/vllm
RUN mkdir -p /opt/vllm && if [ -n "$VLLM" ]; then deploy/vllm/environment.sh /opt/vllm python "$VLLM"; fi
COPY pyproject.toml README.md LICENSE ./
COPY clients clients
COPY service service
COPY workers workers
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/recoup/bin/pip install --no-deps /wheels/*.whl \
    && /opt/recoup/bin/pip check

FROM build AS inventory
COPY deploy/docker/sbom.lock ./
RUN python -m venv /opt/sbom && /opt/sbom/bin/pip install --require-hashes -r sbom.lock
RUN /opt/sbom/bin/cyclonedx-py environment --output-file /worker.cdx.json /opt/recoup/bin/python

FROM scratch AS sbom
COPY --from=inventory /worker.cdx.json /

FROM python:3.12.14-slim-trixie AS image
# What libraries write beside Recoup's own files (caches, configuration) goes to /tmp.
ENV PATH=/opt/recoup/bin:$PATH HOME=/tmp RECOUP_HOME=/var/lib/recoup PYTHONUNBUFFERED=1
RUN groupadd --gid 10001 recoup \
    && useradd --uid 10001 --gid recoup --home-dir /tmp --no-create-home --shell /usr/sbin/nologin recoup \
    && install --directory --owner recoup --group recoup --mode 0700 /var/lib/recoup
# vLLM compiles kernels when it starts.
ARG VLLM=
# hadolint ignore=DL3008
RUN if [ -n "$VLLM" ]; then apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*; fi
COPY --from=build /opt/vllm /opt/vllm
COPY --from=build /opt/recoup /opt/recoup
USER 10001:10001
EXPOSE 9464
# SIGTERM gives a running job back to the queue.
CMD ["recoup-server", "worker"]
