"""The TLS proxy of docs/two-machines.md in a real nginx, with a certificate that the client is told to trust."""

import os
import re
from contextlib import closing
from hashlib import sha256
from pathlib import Path

from pydantic import SecretStr

from buffer.client import HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from buffer.memory_table import MemoryTable
from services.context import ServiceSettings
from services.security import TokenSettings
from tests.certificates import self_signed
from tests.factories import make_manifest
from tests.nginx.running import free_port, running_nginx
from tests.services.live import LIMITER, TABLE, make_context, serving

PAGE = (Path(__file__).parents[2] / "docs" / "two-machines.md").read_text()
PAYLOAD = os.urandom(3 << 20)  # above nginx's own limit of a body


def test_weights_go_up_and_down_through_the_proxy_of_the_page(tmp_path: Path) -> None:
    found = re.search(r"<!-- test:nginx -->\n```nginx\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    certificate, port = self_signed(tmp_path), free_port()
    tokens = TokenSettings(learn=(SecretStr("a-learner's"),))
    context = make_context(tmp_path, MemoryTable(TABLE, LIMITER, "run"), settings=ServiceSettings(tokens=tokens))
    with serving(context) as origin:
        server = found[1]
        for written, real in (
            ("listen 443", f"listen 127.0.0.1:{port}"),
            ("http://127.0.0.1:8642", origin),
            ("/etc/ssl/train.example.org.pem", str(certificate)),
            ("/etc/ssl/train.example.org.key", str(certificate.with_suffix(".key"))),
        ):
            assert written in server
            server = server.replace(written, real)
        temporary = "access_log off; client_body_temp_path body; proxy_temp_path proxied;"
        conf = f"pid nginx.pid; error_log stderr warn; events {{}} http {{ {temporary}\n{server} }}"
        settings = ClientSettings(retry_budget_s=0.0, ca_file=certificate)
        client = ServiceClient(f"https://127.0.0.1:{port}", token="a-learner's", settings=settings)
        with running_nginx(conf, tmp_path, port), closing(client):
            store = HttpWeightStore(client)
            store.put_blob(sha256(PAYLOAD).hexdigest(), [PAYLOAD])
            store.publish(make_manifest(0, payload=PAYLOAD))
            manifest = store.latest(wait_s=5)
            assert manifest is not None
            store.download(manifest.payloads[0], tmp_path / "payload")

    assert (tmp_path / "payload").read_bytes() == PAYLOAD
