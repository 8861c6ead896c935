# The image of memstore: server, command line and, with the extra hf, the demo. Build arguments: EXTRA is a list of the
# extras of pyproject.toml, such as "cpu", "gpu" or "cpu,hf"; TORCH_INDEX is a package index to look for torch in besides
# the usual one, whose wheels need CUDA: PyTorch's own index of CPU wheels makes an image of a tenth of the size.
FROM python:3.12-slim AS build
ARG EXTRA=cpu
ARG TORCH_INDEX=""
WORKDIR /src
RUN python -m venv /opt/memstore
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN /opt/memstore/bin/pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY memstore memstore
COPY model_client model_client
COPY integration integration
RUN /opt/memstore/bin/pip install --no-cache-dir -c constraints.txt ".[$EXTRA]"

FROM python:3.12-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin memstore \
    && mkdir -p /var/lib/memstore /run/memstore /var/lib/memstore-demo \
    && chown memstore:memstore /var/lib/memstore /run/memstore /var/lib/memstore-demo
COPY --from=build /opt/memstore /opt/memstore
ENV PATH=/opt/memstore/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    MEMSTORE_DATA=/var/lib/memstore \
    XDG_CACHE_HOME=/var/lib/memstore/.cache \
    TRITON_CACHE_DIR=/var/lib/memstore/.cache/triton \
    MEMSTORE_LOG_FORMAT=json
USER 10001
WORKDIR /var/lib/memstore
VOLUME /var/lib/memstore
EXPOSE 7077 9077
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s CMD ["memstore", "healthcheck", "--timeout", "4"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["memstore"]
CMD ["serve"]
