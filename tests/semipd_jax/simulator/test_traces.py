from pathlib import Path

import pytest

from semipd_jax.simulator.traces import (
    Clipping,
    TraceRow,
    clip,
    hash_block_len,
    read_trace,
    scale,
)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.6805900,374,44
2023-11-17 00:00:01.1805900,396,109
2023-11-17 00:00:01,5,1
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 4500, "input_length": 600, "output_length": 7, "hash_ids": [0, 2]}

{"timestamp": 4600, "input_length": 3, "output_length": 2}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_azure_csv(tmp_path: Path) -> None:
    rows = read_trace(write(tmp_path / "a.csv", AZURE))
    assert [(r.input_len, r.output_len, r.hash_ids) for r in rows] == [
        (374, 44, ()),
        (396, 109, ()),
        (5, 1, ()),
    ]
    assert [r.arrival_s for r in rows] == pytest.approx([0.0, 1.5, 1.31941], abs=1e-5)


def test_mooncake_jsonl(tmp_path: Path) -> None:
    rows = read_trace(write(tmp_path / "m.jsonl", MOONCAKE))
    assert [r.arrival_s for r in rows] == pytest.approx([0.0, 3.5, 3.6])
    assert [(r.input_len, r.output_len, r.hash_ids) for r in rows] == [
        (700, 5, (0, 1)),
        (600, 7, (0, 2)),
        (3, 2, ()),
    ]


def test_only_the_first_rows_are_read(tmp_path: Path) -> None:
    broken_later = MOONCAKE + "not json\n"
    assert len(read_trace(write(tmp_path / "m.jsonl", broken_later), num_requests=2)) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("t.txt", "", "no known trace"), ("t.csv", AZURE.splitlines()[0], "no requests")],
)
def test_useless_traces_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_trace(write(tmp_path / name, text))


def test_scale() -> None:
    rows = [TraceRow(arrival_s=4.0, input_len=1000, output_len=3, hash_ids=(1, 2))]
    assert scale(rows, time_scale=0.5, length_scale=0.1) == [
        TraceRow(arrival_s=2.0, input_len=100, output_len=1, hash_ids=(1, 2))
    ]


def test_clip_says_what_was_lost() -> None:
    rows = [
        TraceRow(arrival_s=0.0, input_len=60, output_len=40),  # fits exactly
        TraceRow(arrival_s=0.0, input_len=90, output_len=40),
        TraceRow(arrival_s=0.0, input_len=90, output_len=70),
    ]
    clipped, clipping = clip(rows, 100)
    assert [(r.input_len, r.output_len) for r in clipped] == [(60, 40), (60, 40), (50, 50)]
    assert clipping == Clipping(max_len=100, num_requests=2, num_tokens=90)


@pytest.mark.parametrize("length_scale", [1.0, 0.5, 0.03])
def test_scaled_hash_blocks_cover_the_scaled_prompt(length_scale: float) -> None:
    row = TraceRow(arrival_s=0.0, input_len=1024, output_len=1, hash_ids=(1, 2))
    (scaled,) = scale([row], time_scale=1.0, length_scale=length_scale)
    assert 2 * hash_block_len(length_scale) >= scaled.input_len
