"""An S3-speaking server (moto's) on this host, in a process of its own: so forks and a busy test do not disturb it."""

import http.client
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from support.launchers import free_port
from vir.data.stores import choose

_STARTS_WITHIN = 60
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_SESSION_TOKEN": None,
               "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull, "AWS_PROFILE": None,
               "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"}

# A signature, which is not checked; and everyone may read.
_HEADERS = {"Authorization": "AWS4-HMAC-SHA256 Credential=testing/20200101/us-east-1/s3/aws4_request, "
                             "SignedHeaders=host, Signature=0", "x-amz-acl": "public-read"}


class S3Server:
    """A server and one bucket, as long as the block lasts. Within it the environment names the endpoint and
    credentials, so that this process and those that it starts need no settings. Objects may also be read by anyone.

        with S3Server() as server:
            server.upload("train/a.tar", content)
            fsspec.open(server.url("train/a.tar"))
    """

    def __init__(self, bucket: str = "bucket"):
        self.bucket, self.port = bucket, int(free_port())
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.environment = {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.endpoint}

    def url(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def upload(self, key: str, content: bytes) -> str:
        """Stores an object, anew where there is one, and returns its URL."""
        self._request("PUT", f"/{self.bucket}/{quote(key)}", content)
        return self.url(key)

    def upload_folder(self, folder: Path, prefix: str = "") -> None:
        """All files of a folder, by their names within it."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.upload(f"{prefix}{path.relative_to(folder)}", path.read_bytes())

    def remove(self, key: str) -> None:
        self._request("DELETE", f"/{self.bucket}/{quote(key)}")

    def requests(self) -> list[tuple[str, str, int]]:
        """Method, path with query, and status of all requests since the start, in order of their answers."""
        plain = re.sub(r"\x1b\[[0-9;]*m", "", self._log.read_text())  # what is no 200 has a colour
        return [(method, path, int(status)) for method, path, status in re.findall(
            r'"([A-Z]+) (\S+) HTTP/1\.1" (\d+)', plain)]

    def _request(self, method: str, path: str, body: bytes | None = None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, _HEADERS)
            answer = connection.getresponse()
            assert answer.status < 300, (method, path, answer.status, answer.read())
        finally:
            connection.close()

    def _wait_until_it_answers(self) -> None:
        until = time.monotonic() + _STARTS_WITHIN
        while True:
            try:
                return self._request("PUT", f"/{self.bucket}")
            except OSError:
                assert self._process.poll() is None and time.monotonic() < until, self._log.read_text()
                time.sleep(0.05)

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)], stdout=log, stderr=log,
                env=os.environ | {"NO_COLOR": "1"})
        self._before = {name: os.environ.get(name) for name in self.environment}
        _set(self.environment)
        choose._stores.clear()  # stores of this process know the endpoint from before
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        _set(self._before)
        self._process.kill()
        self._process.wait(timeout=30)
        self._folder.cleanup()


def _set(environment: dict[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
