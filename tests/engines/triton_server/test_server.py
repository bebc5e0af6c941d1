"""Starting and ending a server, with a double in its place: a shell."""

import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from adatsq_trt.engines.triton_server.server import Installation, Server, free_ports


class Shell(Installation):
    """A double: a shell that ignores a request to end, with a child of its own."""

    def command(self, scratch: Path) -> tuple[list[str], dict[str, str]]:
        return ["/bin/sh", "-c", "trap '' TERM; /bin/sleep 300 & wait; wait", "sh"], {}


def test_ctrl_c_while_a_server_ends_leaves_none_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path, free_ports(), Shell(None))
    process = psutil.Process(server.process.pid)
    while not process.children():
        assert process.is_running()
    children, wait = process.children(), subprocess.Popen.wait

    def interrupted(self: "subprocess.Popen[bytes]", timeout: float | None = None) -> int:
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            server.stop()
        assert server.process.poll() is not None
        assert psutil.wait_procs(children, timeout=10)[1] == []
        assert not server.log_file.parent.exists()
    finally:
        for one in (process, *children):
            with suppress(psutil.NoSuchProcess):
                one.kill()
