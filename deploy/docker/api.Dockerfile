# syntax=docker/dockerfile:1
# The REST service, and `recoup-server migrate`: no torch, no model is ever loaded here.
# Build from the repository's root:
#   docker build -f deploy/docker/api.Dockerfile -t recoup-api .
#   docker build -f deploy/docker/api.Dockerfile --target sbom --output type=local,dest=. .   # api.cdx.json

FROM python:3.12.14-slim-trixie AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# What changes rarely comes first: a change of the code installs nothing anew.
COPY deploy/docker/build.lock deploy/docker/api.lock ./
RUN python -m venv /opt/build && /opt/build/bin/pip install --require-hashes -r build.lock
RUN python -m venv /opt/recoup && /opt/recoup/bin/pip install --require-hashes -r api.lock
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
RUN /opt/sbom/bin/cyclonedx-py environment --output-file /api.cdx.json /opt/recoup/bin/python

FROM scratch AS sbom
COPY --from=inventory /api.cdx.json /

FROM python:3.12.14-slim-trixie AS image
# What libraries write beside Recoup's own files (caches, configuration) goes to /tmp.
ENV PATH=/opt/recoup/bin:$PATH HOME=/tmp RECOUP_HOME=/var/lib/recoup PYTHONUNBUFFERED=1
RUN groupadd --gid 10001 recoup \
    && useradd --uid 10001 --gid recoup --home-dir /tmp --no-create-home --shell /usr/sbin/nologin recoup \
    && install --directory --owner recoup --group recoup --mode 0700 /var/lib/recoup /var/lib/recoup/deployments
COPY --from=build /opt/recoup /opt/recoup
USER 10001:10001
EXPOSE 8321
# Listening beyond loopback needs a key; without one the service does not start.
CMD ["recoup-server", "api", "--host", "0.0.0.0"]
