# The REST service: no torch, no model is ever loaded here.
# Build from the repository's root: docker build -f deploy/docker/api.Dockerfile .

FROM python:3.12.14-slim-trixie AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY clients clients
COPY service service
COPY workers workers
RUN python -m venv /opt/recoup && /opt/recoup/bin/pip install --no-cache-dir '.[postgres,s3]'

FROM python:3.12.14-slim-trixie
# What libraries write beside Recoup's own files (caches, configuration) goes to /tmp.
ENV PATH=/opt/recoup/bin:$PATH HOME=/tmp RECOUP_HOME=/var/lib/recoup PYTHONUNBUFFERED=1
RUN groupadd --gid 10001 recoup \
    && useradd --uid 10001 --gid recoup --home-dir /tmp --no-create-home --shell /usr/sbin/nologin recoup \
    && install --directory --owner recoup --group recoup --mode 0700 /var/lib/recoup
COPY --from=build /opt/recoup /opt/recoup
USER 10001:10001
EXPOSE 8321
# Listening beyond loopback needs RECOUP_API_KEY; without it the service does not start.
CMD ["recoup-server", "api", "--host", "0.0.0.0"]
