"""Behind an HTTP proxy: a cluster's own addresses are reached directly, names through the proxy."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
import ray

from rayrl.cluster import direct
from rayrl.commands.submit import environment

NAMES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
USUAL = "localhost,127.0.0.1,.internal"


@pytest.fixture
def nowhere() -> Iterator[str]:
    """A proxy that refuses: a port that is taken, but at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def behind(proxy: str, no_proxy: str | None) -> dict[str, str]:
    """Variables as they are set behind a proxy, in both cases."""
    found = dict.fromkeys([*NAMES, *map(str.upper, NAMES)], proxy)
    return found if no_proxy is None else found | {"no_proxy": no_proxy, "NO_PROXY": no_proxy}


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch, nowhere: str, no_proxy: str | None) -> None:
    """This process is behind a proxy, as one that has imported `rayrl.cluster` there."""
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in behind(nowhere, no_proxy).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("no_grpc_proxy", direct(os.environ))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "localhost,0.0.0.0/0,::/0"),
        ({"no_proxy": "a.b, .c"}, "a.b, .c,localhost,0.0.0.0/0,::/0"),
        ({"no_proxy": "a.b", "no_grpc_proxy": "d"}, "d,localhost,0.0.0.0/0,::/0"),
        ({"no_proxy": "a.b", "no_grpc_proxy": ""}, "localhost,0.0.0.0/0,::/0"),
        ({"no_proxy": USUAL}, f"{USUAL},0.0.0.0/0,::/0"),
        ({"no_grpc_proxy": "d,localhost,0.0.0.0/0,::/0"}, "d,localhost,0.0.0.0/0,::/0"),
    ],
)
def test_what_is_excepted_stays_excepted(given: dict[str, str], wanted: str) -> None:
    assert direct(given) == wanted


class Echo(grpc.GenericRpcHandler):
    def service(self, details: object) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda request, _: request)


@pytest.mark.usefixtures("set_up")
@pytest.mark.parametrize("no_proxy", [None, USUAL])
def test_grpc_reaches_the_addresses_of_this_node() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    for host in ("localhost", "127.0.0.1", ray.util.get_node_ip_address()):
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            assert channel.unary_unary("/any/call")(b"here", timeout=600) == b"here"
    server.stop(None).wait()


@pytest.mark.parametrize("no_proxy", [None, USUAL])
def test_grpc_to_a_name_outside_still_takes_the_proxy(
    monkeypatch: pytest.MonkeyPatch, set_up: None, no_proxy: str | None
) -> None:
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def answer() -> None:
            connection, _ = proxy.accept()
            with connection:
                asked.append(connection.recv(4096))

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("grpc_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with grpc.insecure_channel("outside.example:443") as channel:
            call = channel.unary_unary("/any/call").future(b"there", wait_for_ready=True)
            thread.join(600)
            call.cancel()
    assert asked[0].startswith(b"CONNECT outside.example:443")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "127.0.0.1"),
        ({"NO_PROXY": "a.b", "RAY_ADDRESS": "http://10.0.0.7:8265"}, "a.b,10.0.0.7"),
        ({"no_proxy": "a.b", "RAY_ADDRESS": "http://localhost:8265"}, "a.b,localhost"),
        ({"no_proxy": "a.b", "RAY_ADDRESS": "http://[fd00::7]:8265"}, "a.b,fd00::7"),
        ({"no_proxy": "a.b", "RAY_ADDRESS": "https://ray.example.com"}, "a.b"),
    ],
)
def test_jobs_are_submitted_to_an_address_directly(given: dict[str, str], wanted: str) -> None:
    assert environment(given) == {**given, "no_proxy": wanted}
