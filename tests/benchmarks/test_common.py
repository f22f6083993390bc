from pathlib import Path

from benchmarks.common import header


def test_results_do_not_say_where_files_lay():
    settings = {
        "model": "/a/b/model",
        "workload": ["/c/trace.csv", "sharegpt"],
        "out": Path("/d/e"),
    }
    assert header(settings)["settings"] == {
        "model": "model",
        "workload": ["trace.csv", "sharegpt"],
        "out": "e",
    }
