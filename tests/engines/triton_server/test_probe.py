"""The probe's way to end a server; what it asks a real one is in tests/serving."""

from pathlib import Path

import pytest

from adatsq_trt.engines.triton_server import probe


@pytest.mark.parametrize("text", ["0", "-1", "1", "", "12x"])
def test_only_a_process_id_ends_a_server(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal to 0 goes to the probe's own group, to -1 to every process, to 1 to the container."""
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr("os.kill", lambda *one: killed.append(one))
    (tmp_path / "pid").write_text(text)
    probe._end(tmp_path / "pid")
    assert killed == []
    assert f"cannot end the server of '{tmp_path / 'pid'}'" in capsys.readouterr().err
