"""Methods of another library are refused by name where it is not installed."""

from types import SimpleNamespace

import pytest

from adatsq_trt.errors import DependencyError
from adatsq_trt.evaluation import peers
from adatsq_trt.evaluation.methods import method_named


def test_peers_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    own, theirs = method_named("rtn"), method_named("smoothquant")
    peers.require_peers([own, theirs])
    monkeypatch.setattr(peers, "util", SimpleNamespace(find_spec=lambda name: None))
    peers.require_peers([own])
    with pytest.raises(DependencyError, match=r"'smoothquant' needs the library modelopt.*adatsq-trt\[peers\]"):
        peers.require_peers([own, theirs])
