"""A service behind TLS with a certificate that no public authority has signed: client.ca_file names it."""

import http.server
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest

from buffer.client import HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from buffer.errors import InvalidSettings, ServiceUnreachable
from buffer.weights.manifest import Payload
from tests.certificates import self_signed

BODY = b"weights"
PAYLOAD = Payload(kind="keyframe", version=0, sha256=sha256(BODY).hexdigest(), size_bytes=len(BODY))


class Blob(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        body = b"{}" if self.path == "/v1/stats" else BODY
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def url(certificate: Path) -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Blob) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_requests_and_downloads_trust_the_authority_that_is_named(url: str, certificate: Path, tmp_path: Path) -> None:
    with closing(ServiceClient(url, settings=ClientSettings(retry_budget_s=0.0, ca_file=certificate))) as client:
        HttpWeightStore(client).download(PAYLOAD, tmp_path / "payload")

        assert client.stats() == {}
    assert (tmp_path / "payload").read_bytes() == BODY


def test_without_it_both_are_refused(
    url: str, tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # as everything else of the environment: not read
    with closing(ServiceClient(url, settings=ClientSettings(retry_budget_s=0.0))) as client:
        with pytest.raises(ServiceUnreachable, match="certificate verify failed"):
            client.stats()
        with pytest.raises(ServiceUnreachable, match="certificate verify failed"):
            HttpWeightStore(client).download(PAYLOAD, tmp_path / "payload")


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_file_without_certificates_is_a_sentence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "ca.pem").write_text(content)

    with pytest.raises(InvalidSettings, match=r"client.ca_file=.*/ca.pem cannot be used"):
        ServiceClient("https://127.0.0.1:1", settings=ClientSettings(ca_file=tmp_path / "ca.pem"))
