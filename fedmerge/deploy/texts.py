"""Templates of a deployment's configuration files: nginx, Flower, systemd, compose."""

import getpass
import os
import sys
from pathlib import Path

from fedmerge import __version__

SETTINGS_HEAD = "# Settings of the deployment. After a change run: fedmerge deploy renew, then restart the federation."
LARGEST_REQUEST = "16m"  # Flower sends arrays in pieces of 5 MiB and an app of at most 10 MiB
LOG_FILE = "refused.log"  # in state/nginx
LONGEST_PATH = 100  # characters of a path in the log


def nginx(folder: Path, port: int, superlink_port: int, operator_sha1: str) -> str:
    """Return the configuration of the reverse proxy: Fleet for everybody, Control with the operator's certificate.

    Everything else is refused. Flower 1.41 serves ``/v1/fleet/…``, ``/v1/control/…`` and ``/v1/runtime/…`` as POST with
    a protobuf body, and ``/health``. Runtime is for the server's own processes, which reach the SuperLink directly on
    127.0.0.1.

    Requests are limited by address. Those to Fleet are delayed above a rate that many clients behind one address do not
    reach; others, which only the operator and strangers send, are refused above a low one, without a line in the log.
    """
    return f"""\
# Written by fedmerge deploy. Fleet is open to everybody (the SuperLink asks each node for its registered key), Control
# needs the operator's certificate, and Runtime cannot be reached from outside this machine.
daemon off;
worker_processes 2;
pid {folder}/state/nginx/nginx.pid;
error_log stderr warn;

events {{ worker_connections 1024; }}

http {{
    server_tokens off;
    map_hash_bucket_size 128;
    client_body_temp_path {folder}/state/nginx/body;
    proxy_temp_path {folder}/state/nginx/proxy;
    fastcgi_temp_path {folder}/state/nginx/fastcgi;
    uwsgi_temp_path {folder}/state/nginx/uwsgi;
    scgi_temp_path {folder}/state/nginx/scgi;

    # Log only refused and failed requests, because every client polls every three seconds; of the path the start, and
    # nothing of requests above their rate. fedmerge deploy start rotates the file.
    map $status $is_refused {{ default 0; 429 0; ~^[45] 1; }}
    map $request_uri $start_of_path {{ default "-"; "~^(?<start>.{{1,{LONGEST_PATH}}})" $start; }}
    log_format refused '$time_iso8601 $remote_addr $status "$request_method $start_of_path" '
        'certificate=$ssl_client_verify';
    access_log {folder}/state/nginx/{LOG_FILE} refused if=$is_refused;

    limit_req_zone $binary_remote_addr zone=fleet:4m rate=200r/s;
    limit_req_zone $binary_remote_addr zone=others:4m rate=20r/s;
    limit_conn_zone $binary_remote_addr zone=connections:4m;
    limit_req_status 429;
    limit_conn_status 429;
    limit_req_log_level info;
    limit_conn_log_level info;

    # The operator's certificate by its fingerprint, so that a new certificate invalidates the previous one.
    map "$ssl_client_verify $ssl_client_fingerprint" $is_operator {{ default 0; "SUCCESS {operator_sha1}" 1; }}

    upstream superlink {{
        server 127.0.0.1:{superlink_port};
        keepalive 32;
    }}

    server {{
        listen {port} ssl;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_certificate {folder}/server/server.crt;
        ssl_certificate_key {folder}/server/server.key;
        ssl_client_certificate {folder}/ca/ca.crt;
        ssl_verify_client optional;
        ssl_session_cache shared:fedmerge:5m;

        client_max_body_size {LARGEST_REQUEST};
        client_header_timeout 15s;
        client_body_timeout 60s;
        client_header_buffer_size 1k;
        large_client_header_buffers 4 4k;
        limit_conn connections 512;
        limit_req zone=others burst=100 nodelay;

        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $host;
        proxy_request_buffering off;
        proxy_buffering off;
        proxy_next_upstream off;
        proxy_connect_timeout 5s;
        proxy_read_timeout 300s;
        proxy_ssl_trusted_certificate {folder}/ca/ca.crt;
        proxy_ssl_verify on;
        proxy_ssl_name localhost;
        proxy_ssl_session_reuse on;

        location /v1/fleet/ {{
            limit_req zone=fleet burst=5000 delay=1000;
            # The raw path, which is what the SuperLink gets.
            if ($request_uri !~ "^/v1/fleet/[a-z-]{{1,64}}$") {{ rewrite ^ /refused-404 last; }}
            proxy_pass https://superlink;
        }}
        location /v1/control/ {{
            if ($is_operator = 0) {{ rewrite ^ /refused-403 last; }}
            proxy_read_timeout 24h;
            proxy_pass https://superlink;
        }}
        location = /health {{
            client_max_body_size 1k;
            limit_except GET {{ deny all; }}
            proxy_pass https://superlink;
        }}
        # try_files, which nginx reaches after it has counted the request; "return" answers without counting.
        root {folder}/state/nginx/none;
        location = /refused-403 {{ try_files /none =403; }}
        location / {{
            client_max_body_size 1k;
            try_files /none =404;
        }}
    }}
}}
"""


def operator_door(address: str, local_port: int) -> str:
    """Return the nginx configuration for another machine of the operator; it presents the certificate for flwr."""
    return f"""\
# Written by fedmerge deploy, for another machine of the operator. flwr cannot present a certificate, so nginx does it
# for everybody who reaches 127.0.0.1: use it only on a machine without other users. In this folder run:
#   nginx -p "$PWD" -c nginx.conf
#   FLWR_HOME="$PWD/flower" flwr list …
daemon off;
pid nginx.pid;
error_log stderr warn;
events {{ }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    server {{
        listen 127.0.0.1:{local_port};
        client_max_body_size {LARGEST_REQUEST};
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_buffering off;
        proxy_read_timeout 24h;
        proxy_ssl_certificate operator.crt;
        proxy_ssl_certificate_key operator.key;
        proxy_ssl_trusted_certificate ca.crt;
        proxy_ssl_verify on;
        proxy_ssl_name localhost;
        location / {{ proxy_pass https://{address}; }}
    }}
}}
"""


def flower_config(name: str, address: str, authority: Path | None) -> str:
    """Return ``$FLWR_HOME/config.toml``; without an authority it connects to the nginx of :func:`operator_door`."""
    trust = f'root-certificates = "{authority}"' if authority else "insecure = true"
    return f"""\
[superlink]
default = "{name}"

[superlink.{name}]
address = "{address}"
{trust}
"""


def systemd_unit(folder: Path, name: str) -> str:
    """Return the unit of one service, which starts and ends SuperLink and proxy together."""
    return f"""\
[Unit]
Description=fedmerge federation {name}: SuperLink and proxy
After=network-online.target
Wants=network-online.target

[Service]
User={getpass.getuser()}
WorkingDirectory={folder}
ExecStart={Path(sys.executable).parent / "fedmerge"} deploy start {folder}
Restart=always
RestartSec=5
TimeoutStopSec=30
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=full

[Install]
WantedBy=multi-user.target
"""


def compose(folder: Path, port: int) -> str:
    """Return the Docker service; the folder has the same path in the container, because its files contain it."""
    wheel = f"fedmerge-{__version__}-py3-none-any.whl"
    return f"""\
# Put {wheel} into {folder}/image first. More arguments for pip, for example
# the index of PyTorch's CPU wheels: docker compose build --build-arg PIP_FLAGS="..."
services:
  operator:
    image: fedmerge-operator:{__version__}
    build:
      context: {folder}/image
      dockerfile_inline: |
        FROM python:3.11-slim
        RUN apt-get update && apt-get install --yes --no-install-recommends nginx && rm -rf /var/lib/apt/lists/*
        COPY constraints.txt {wheel} /fedmerge/
        ARG PIP_FLAGS=""
        RUN pip install --no-cache-dir $$PIP_FLAGS --constraint /fedmerge/constraints.txt /fedmerge/{wheel}
    command: fedmerge deploy start {folder}
    init: true
    user: "{os.getuid()}:{os.getgid()}"
    environment:
      HOME: {folder}/state
      FLWR_HOME: {folder}/flower
    working_dir: {folder}
    volumes:
      - {folder}:{folder}
    ports:
      - "{port}:{port}"
    restart: always
"""


def dockerfile() -> str:
    """Return the image of the Helm chart: for the server, clients and simulations, with a user of number 1000."""
    wheel = f"fedmerge-{__version__}-py3-none-any.whl"
    return f"""\
# Written by fedmerge deploy chart. Put {wheel} beside this file first. EXTRAS: storage and backbone,
# as pip has them; PIP_FLAGS: more arguments for pip, for example the index of PyTorch's CPU wheels.
FROM python:3.11-slim
# KubeRay's probes need wget
RUN apt-get update && apt-get install --yes --no-install-recommends nginx wget && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 fedmerge
COPY constraints.txt {wheel} /fedmerge/
ARG PIP_FLAGS=""
ARG EXTRAS="cluster,minilm,s3"
RUN pip install --no-cache-dir $PIP_FLAGS --constraint /fedmerge/constraints.txt "/fedmerge/{wheel}[$EXTRAS]"
USER fedmerge
"""


def bundle_readme(name: str, address: str, authority_sha256: str, key_sha256: str, app_sha256: str | None) -> str:
    """Return the instructions for an organisation, with the hashes that both sides compare."""
    return f"""\
fedmerge federation, bundle for {name}

  ca.crt            certificate by which your client verifies the server
  federation.toml   the server's address, and the hash of the app that you are asked to approve
  README.txt        this text

Nothing here is secret, but it must come from the operator unchanged. Compare these hashes over another channel, for
example by telephone:

  certificate   {authority_sha256}
  your key      {key_sha256}
  app           {app_sha256 or "not known yet"}

Your private key stays in the folder that 'fedmerge client init' made (DIR); it is never sent. BUNDLE is this folder,
wherever you put it. With fedmerge {__version__} installed, run:

  1. fedmerge client approve DIR --bundle BUNDLE    allows the app above, and no other, to run beside your data
  2. fedmerge client check DIR --bundle BUNDLE      checks data, backbone, disk, network, certificate, clock and key
  3. fedmerge client start DIR --bundle BUNDLE      runs until you stop it

The client connects to {address}; it needs no open port.
"""
