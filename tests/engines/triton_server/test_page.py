"""The page without Triton server behind it; tests/serving has both, and a browser."""

from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse

import pytest

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.triton_server.page import Page
from adatsq_trt.engines.triton_server.server import HOST, free_ports


@pytest.fixture
def connection(tiny_bundle: BundleFiles) -> Iterator[HTTPConnection]:
    ports = free_ports()
    with Page(ports.http, ports.grpc, tiny_bundle, "tiny"):
        yield HTTPConnection(HOST, ports.http, timeout=10)


def ask(connection: HTTPConnection, length: str, path: str = "/generate") -> HTTPResponse:
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", length)
    connection.endheaders(b"{}")
    return connection.getresponse()


def test_the_page_is_all_that_can_be_read(connection: HTTPConnection) -> None:
    connection.request("GET", "/?prompt=1")
    answer = connection.getresponse()
    assert (answer.status, b"<title>tiny" in answer.read()) == (200, True)
    connection.request("GET", "/../page.py")
    assert connection.getresponse().status == 404


@pytest.mark.parametrize("length", ["", "0", "-1", "two", "1e3", "100001", "9" * 5000])
def test_lengths_that_are_not_read(connection: HTTPConnection, length: str) -> None:
    assert ask(connection, length).status == 400


def test_when_the_server_is_away(connection: HTTPConnection) -> None:
    assert ask(connection, "2", "/elsewhere").status == 400
    answer = ask(connection, "2")
    assert (answer.status, "does not answer" in answer.reason) == (502, True)
