"""Units of work on real Ray workers: in order, once each, and whatever becomes of a worker."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adatsq_trt.errors import DependencyError, MismatchError, UserError
from adatsq_trt.execution import InProcess, cluster
from adatsq_trt.execution.cluster import Address, RayExecutor, Surroundings, connected, parse_address, require_cluster


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    with connected(Address(None, 2)) as two:
        yield two


def test_results_come_in_the_order_of_the_items_and_are_those_of_this_process(executor: RayExecutor) -> None:
    def unit(common: Tensor, item: tuple[int, Tensor]) -> tuple[int, Tensor, int, int]:
        number, x = item
        time.sleep(0.02 * (3 - number % 3))  # later ones end earlier
        return number, (common @ x).softmax(dim=0).sum(dim=1), torch.get_num_threads(), os.getpid()

    generator = torch.Generator().manual_seed(0)
    common = torch.randn(65, 33, generator=generator)
    items = [(number, torch.randn(33, 17, generator=generator)) for number in range(12)]
    found = list(executor.map(unit, executor.share(common), items))
    here = InProcess()
    expected = list(here.map(unit, here.share(common), items))
    assert [number for number, *_ in found] == list(range(12))
    for (_, one, threads, _), (_, other, *_) in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert threads == torch.get_num_threads()
    assert os.getpid() not in {process for *_, process in found}


def test_items_may_be_shared_and_are_taken_as_they_are_needed(executor: RayExecutor) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = executor.map(lambda common, item: common + item, executor.share(10), items())
    assert next(results) == 10
    assert len(taken) < 20
    results.close()  # type: ignore[attr-defined]
    shared = [executor.share([number]) for number in range(3)]
    assert list(executor.map(lambda common, item: common + item[0], executor.share(10), shared)) == [10, 11, 12]


def test_a_worker_that_is_killed_costs_its_unit_and_nothing_else(executor: RayExecutor, tmp_path: Path) -> None:
    def unit(folder: Path, number: int) -> int:
        with (folder / f"unit_{number}").open("a") as file:
            file.write("x")
        if number == 3 and (folder / "unit_3").stat().st_size == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    assert list(executor.map(unit, executor.share(tmp_path), range(8))) == [number**2 for number in range(8)]
    attempts = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert attempts["unit_3"] == 2
    # Ray may have queued a unit behind the one that died; the others ran once.
    assert sum(attempts.values()) <= 8 + 2


def test_what_a_unit_raises_arrives_as_it_was_raised(executor: RayExecutor) -> None:
    def unit(_common: None, number: int) -> int:
        if number == 1:
            raise UserError("layer 'x' of step 3 is not finite")
        return number

    results = executor.map(unit, executor.share(None), range(4))
    assert next(results) == 0
    with pytest.raises(UserError, match=r"^layer 'x' of step 3 is not finite$"):
        list(results)


def test_a_worker_unlike_this_process_is_refused(executor: RayExecutor) -> None:
    here = Surroundings.here()
    strange = RayExecutor(2, Surroundings(here.version, "1.0", here.instructions, here.threads))
    with pytest.raises(MismatchError, match=r"torch .* expected .* 1\.0 and .* use machines of one kind"):
        list(strange.map(lambda _, item: item, strange.share(None), [1]))


# ------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("local", Address(None)),
        ("local:3", Address(None, 3)),
        ("10.0.0.1:6379", Address("10.0.0.1:6379")),
        ("[::1]:6379", Address("[::1]:6379")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "auto", "local:", "local:0", "head", "head:", "head:99999", "ray://head:10001"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected HOST:PORT of a Ray cluster's head, 'local', or 'local:N'"):
        parse_address(text)


def test_an_address_that_nobody_listens_at_is_refused() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = Address(f"127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(
            UserError, match=r"no Ray cluster answers there .*; start one there with 'ray start --head'"
        ):
            require_cluster(address)


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_server_that_is_no_ray_is_refused(answer: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                if answer is not None:
                    connection.sendall(answer)
                connection.recv(100)
                time.sleep(0.5)

        thread = threading.Thread(target=serve)
        thread.start()
        reason = "timed out" if answer is None else "something else than Ray listens"
        with pytest.raises(UserError, match=rf"no Ray cluster answers there \({reason}\)"):
            require_cluster(Address(f"127.0.0.1:{server.getsockname()[1]}"))
        thread.join()


def test_the_head_of_a_cluster_answers(executor: RayExecutor) -> None:
    import ray

    require_cluster(Address(ray.get_runtime_context().gcs_address))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match=r"pip install 'adatsq-trt\[ray\]'"):
        require_cluster(Address(None))
