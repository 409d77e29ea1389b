# ngrokd in a container: docker build -t ngrokd .   and how it is run: compose.yaml
#
# What it needs at run time, and no more: --cap-drop ALL --cap-add NET_ADMIN --device /dev/net/tun. Without the device it
# says so, and how to give it, and exits with 77.
FROM python:3.13-slim AS build
WORKDIR /src
COPY requirements requirements
RUN python -m venv --without-pip /opt/ngrokd/venv \
    && python -m pip install --no-cache-dir --require-hashes -r requirements/build.lock \
    && python -m pip --python /opt/ngrokd/venv/bin/python install --no-cache-dir --require-hashes -r requirements/runtime.lock
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheel . \
    && python -m pip --python /opt/ngrokd/venv/bin/python install --no-cache-dir --no-deps --no-index /wheel/*.whl

FROM python:3.13-slim
COPY --from=build /opt/ngrokd /opt/ngrokd
RUN ln -s /opt/ngrokd/venv/bin/ngrokd /opt/ngrokd/venv/bin/ngrokctl /usr/local/bin/
# Operator, key, certificate and addresses: without a volume each container is another operator to ngrok.
VOLUME /etc/ngrokd
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 CMD ["ngrokd", "health", "--ready"]
ENTRYPOINT ["ngrokd"]
CMD ["run"]
