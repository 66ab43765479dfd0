# FedMeDUET in a container: `--target site` for a hospital, `--target server` for the coordinating centre. How to
# build and run it: docs/runbook.md, "In a container".
#
# Does not hold: keys, settings, scans or runs; they are mounted. The tokenizer is in the package. Both targets
# keep the sources beside the environment: the centre makes from them what sites run.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# PyTorch for CPUs; for GPUs: --build-arg TORCH_INDEX=https://pypi.org/simple
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/fedmeduet/.venv
WORKDIR /opt/fedmeduet
COPY constraints.txt ./
RUN .venv/bin/pip install --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY storage ./storage
COPY scans ./scans
COPY meduet_models ./meduet_models
COPY forms ./forms
COPY privacy ./privacy
COPY audit ./audit
COPY federation ./federation
COPY strategies ./strategies
COPY client ./client
COPY server ./server
COPY simulations ./simulations
COPY conf ./conf
RUN .venv/bin/pip install -c constraints.txt -e '.[federation]' \
    && .venv/bin/python -m compileall -q storage scans forms meduet_models privacy audit federation strategies client server simulations \
    && .venv/bin/pip uninstall --yes pip

FROM ${PYTHON_IMAGE} AS base
# tini as process 1: without an init, ended processes stay as zombies, and Flower takes them for living ones
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 --home-dir /var/lib/meduet --create-home meduet
COPY --from=build /opt/fedmeduet /opt/fedmeduet
ENV PATH=/opt/fedmeduet/.venv/bin:$PATH PYTHONUNBUFFERED=1
STOPSIGNAL SIGTERM

FROM base AS server
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends nginx \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o meduet -g meduet -m 700 /var/lib/meduet-server
USER 10001
WORKDIR /var/lib/meduet-server
EXPOSE 8443
ENTRYPOINT ["/usr/bin/tini", "--", "/opt/fedmeduet/.venv/bin/meduet-server"]
CMD ["start", "--config", "/etc/meduet/server.yaml"]

FROM base AS site
USER 10001
WORKDIR /var/lib/meduet
ENTRYPOINT ["/usr/bin/tini", "--", "/opt/fedmeduet/.venv/bin/meduet-site"]
CMD ["start", "--config", "/etc/meduet/site.yaml"]
