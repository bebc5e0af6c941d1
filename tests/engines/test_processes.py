"""Work in other processes."""

import subprocess
import sys

import psutil

PROGRAM = """
import time
from adatsq_trt.engines.processes import processes

if __name__ == "__main__":
    with processes(2) as pool:
        list(pool.map(time.sleep, (0.0, 0.0)))
        print("ready", flush=True)
        list(pool.map(time.sleep, (600.0, 600.0)))
"""


def test_they_end_with_a_parent_that_is_killed(tmp_path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) >= 2
        parent.kill()
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left
