# syntax=docker/dockerfile:1
# vLLM's own router, for more than one replica of the teacher on Kubernetes.
# Build from the repository's root: docker build -f deploy/docker/router.Dockerfile -t recoup-router .

FROM python:3.12.14-slim-trixie AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY deploy/docker/router.lock ./
RUN python -m venv /opt/router && /opt/router/bin/pip install --require-hashes -r router.lock

FROM python:3.12.14-slim-trixie AS image
ENV PATH=/opt/router/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1
RUN groupadd --gid 10001 router \
    && useradd --uid 10001 --gid router --home-dir /tmp --no-create-home --shell /usr/sbin/nologin router
COPY --from=build /opt/router /opt/router
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["vllm-router"]
