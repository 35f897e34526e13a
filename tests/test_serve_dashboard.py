"""The Grafana dashboard asks for metrics that the server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

from llama31_serve.server.admission import Admission
from llama31_serve.server.echo_engine import EchoEngine
from llama31_serve.server.engine_thread import EngineThread
from llama31_serve.server.http.exposition import Exposition
from llama31_serve.server.status import Status
from llama31_serve.server.tallies import Tallies

DASHBOARD = Path(__file__).resolve().parents[1] / "configs" / "serve" / "grafana-dashboard.json"
METRIC = re.compile(r"[a-z_:0-9]+(?=\{)")


async def test_every_metric_of_the_dashboard_is_exposed() -> None:
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for expression in expressions for name in METRIC.findall(expression)}
    engine = EngineThread(lambda: EchoEngine(vocab_size=1), lambda outputs, time_s: None, lambda: None)
    tallies = Tallies()
    exposition = Exposition(Status(tallies, Admission(1), engine, 0), "m")
    exposed = set()
    for family in exposition.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        exposed |= {family.name + suffix for suffix in suffixes}
    assert len(asked) > 20
    assert asked <= exposed
