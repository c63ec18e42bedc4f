"""Tables, JSON and plots."""

import json
import math

from freeio_jax.bench.report import Report, plot_shapes


def test_records_are_kept_as_they_come(tmp_path, capsys):
    path = tmp_path / "out.json"
    report = Report({"jax": "1.2"}, path)
    report.table("Times", {"op": "operation", "wall_s": "wall us", "link_bytes": "link MB"})
    record = {"op": "dispatch", "wall_s": 12.34e-6, "link_bytes": 5_000_000, "ratio": math.nan}
    report.add("shapes", record)
    kept = json.loads(path.read_text())
    assert kept == {"about": {"jax": "1.2"}, "shapes": [{**record, "ratio": None}]}
    assert "| dispatch | 12.3 | 5.00 |" in capsys.readouterr().out


def test_an_error_is_a_record_too(tmp_path, capsys):
    path = tmp_path / "out.json"
    report = Report({}, path)
    report.table("Times", {"op": "operation", "wall_s": "wall us"})

    def fails():
        raise ValueError("out of luck")

    assert not report.guarded("shapes", {"op": "combine"}, fails)
    assert report.guarded("shapes", {"op": "dispatch"}, lambda: {"wall_s": 1e-6})
    assert report.failed == 1
    first, second = json.loads(path.read_text())["shapes"]
    assert first["error"] == "ValueError: out of luck"
    assert second["wall_s"] == 1e-6
    assert second["took_s"] >= 0
    assert "| dispatch | 1.00 |" in capsys.readouterr().out


def test_plot(tmp_path):
    records = [
        {"name": name, "op": op, "exchange": exchange, "num_tokens": t, "wall_s": t * 1e-6}
        | ({"kernel_s": t * 5e-7, "floor_s": math.nan} if exchange == "freeio" else {})
        for name in ("large", "half")
        for op in ("dispatch", "combine")
        for exchange in ("freeio", "dense")
        for t in (1, 128)
    ]
    records.append({"name": "large", "op": "dispatch", "exchange": "ragged", "error": "none"})
    path = tmp_path / "times.png"
    plot_shapes(records, path)
    assert path.read_bytes().startswith(b"\x89PNG")
