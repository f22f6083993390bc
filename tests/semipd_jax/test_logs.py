import json
import logging
import math
import os
import warnings
from datetime import datetime
from pathlib import Path

import pytest

from semipd_jax import logs

pytestmark = pytest.mark.usefixtures("restored_logs")


def failing() -> None:
    raise ValueError("a\nb")


def test_lines_are_json_objects(capsys: pytest.CaptureFixture[str]):
    logs.configure("coordinator", "info", "json")
    log = logging.getLogger("semipd_jax.x")
    log.info('%s said "%s"\nGrüße', "he", "no")
    log.debug("unseen")
    try:
        failing()
    except ValueError:
        log.exception("it failed")
    plain, failure = map(json.loads, capsys.readouterr().err.splitlines())
    assert datetime.fromisoformat(plain.pop("time")).tzinfo is not None
    assert plain == {
        "level": "info",
        "process": "coordinator",
        "logger": "semipd_jax.x",
        "message": 'he said "no"\nGrüße',
    }
    assert (failure["level"], failure["message"]) == ("error", "it failed")
    assert "ValueError: a\nb" in failure["exception"]


def test_fields_of_a_record_are_fields_of_the_line(capsys: pytest.CaptureFixture[str]):
    logs.configure("coordinator", "info", "json")
    logging.getLogger("semipd_jax.x").info("moved", extra={"fields": {"to": 0.5}})
    assert json.loads(capsys.readouterr().err)["fields"] == {"to": 0.5}


def test_every_line_is_json_whatever_its_fields(capsys: pytest.CaptureFixture[str]):
    logs.configure("coordinator", "info", "json")
    fields = {"left_s": math.inf, "error": math.nan, "path": Path("x")}
    logging.getLogger("semipd_jax.x").info("moved", extra={"fields": fields})
    line = json.loads(capsys.readouterr().err, parse_constant=pytest.fail)
    assert line["fields"] == {"left_s": None, "error": None, "path": "x"}


def test_names_of_files_that_are_no_text_are_logged(capsys: pytest.CaptureFixture[str]):
    logs.configure("coordinator", "info", "json")
    logging.getLogger("semipd_jax.x").info("no file %s", os.fsdecode(b"a\xff"))
    assert json.loads(capsys.readouterr().err)["message"] == r"no file a\udcff"


def test_lines_for_a_person(capsys: pytest.CaptureFixture[str]):
    logs.configure("coordinator", "warning")
    logging.getLogger("semipd_server").warning("hello")
    assert capsys.readouterr().err.endswith("coordinator | hello\n")


def test_what_others_log_has_the_same_form(capsys: pytest.CaptureFixture[str]):
    logs.configure("coordinator", "debug", "json")
    other = logging.getLogger("some.package")
    other.info("unseen")
    other.error("it failed")
    warnings.showwarning("old", DeprecationWarning, "x.py", 1)
    seen = list(map(json.loads, capsys.readouterr().err.splitlines()))
    assert [line["logger"] for line in seen] == ["some.package", "py.warnings"]
    assert seen[0]["message"] == "it failed"
    assert "DeprecationWarning: old" in seen[1]["message"]
