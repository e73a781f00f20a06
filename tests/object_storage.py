"""Real S3-compatible object storage on loopback, as a process of its own."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

BUCKET = "weights"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret"}


@contextmanager
def object_storage() -> Iterator[str]:
    """Start it with an empty bucket; yield its URL."""
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stderr=log, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        try:
            while not (found := re.search(rb"http://127\.0\.0\.1:\d+", os.pread(log.fileno(), 10_000, 0))):
                assert process.poll() is None, "the object storage did not start"
                time.sleep(0.02)
            url = found.group().decode()
            signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=a-key/20200101/us-east-1/s3/aws4_request"}
            httpx.put(f"{url}/{BUCKET}", headers=signed, trust_env=False).raise_for_status()
            yield url
        finally:
            process.terminate()
            process.wait()
