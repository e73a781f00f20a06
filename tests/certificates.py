"""A certificate for a test's own TLS server."""

import subprocess
from pathlib import Path


def self_signed(directory: Path) -> Path:
    """Make a certificate of 127.0.0.1 that it signs itself, its key beside it as `.key`; return its path."""
    path = directory / "certificate.pem"
    names = ["-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1"]
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-out", str(path), "-keyout", str(path.with_suffix(".key"))]
    subprocess.run([*new, "-days", "2", *names, *files], check=True, capture_output=True)
    return path
