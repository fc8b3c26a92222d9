"""Reading data files: every line is a record or is reported with file:line, hostile files included."""

import json
import os
import random
from pathlib import Path

import pytest

from qlora.data import Source
from qlora.data.reading import source, strict_json
from qlora.data.reading.resolve_paths import resolve_source
from qlora.data.types import BadRecord, Record
from qlora.errors import DataError


def read(path: str | Path, **settings: object) -> list[Record | BadRecord]:
    return list(source.read_sources([Source(path=str(path), **settings)], seed=0))


def outcomes(path: Path) -> list[tuple[int, dict | str]]:
    """(line, fields) for a record, (line, reason) for a bad one."""
    return [
        (int(record.where.rpartition(":")[2]), dict(record.fields) if isinstance(record, Record) else record.reason)
        for record in read(path)
    ]


GOOD = b'{"text": "a"}'
LINES = {  # bytes of a file, and the outcomes
    "crlf": (GOOD + b"\r\n" + GOOD + b"\r\n", [(1, {"text": "a"}), (2, {"text": "a"})]),
    "bom": (b"\xef\xbb\xbf" + GOOD, [(1, {"text": "a"})]),
    "blank lines": (b"\n\n" + GOOD + b"\n \t\n" + GOOD, [(3, {"text": "a"}), (5, {"text": "a"})]),
    "u2028 in a string": ('{"text": "a\u2028b"}'.encode(), [(1, {"text": "a\u2028b"})]),
    "escapes": (b'{"text": "\\ud83d\\ude00"}', [(1, {"text": "\U0001f600"})]),
    "a backslash before u0000": (b'{"text": "\\\\u0000"}', [(1, {"text": "\\u0000"})]),
    "bad json": (GOOD + b'\n{"text": \n' + GOOD, [(1, {"text": "a"}), (2, "not JSON"), (3, {"text": "a"})]),
    "two objects": (GOOD + GOOD, [(1, "more than one value on the line")]),
    "trailing comma": (GOOD + b",", [(1, "more than one value on the line")]),
    "nul byte": (b'{"text": "\0"}', [(1, "NUL character")]),
    "nul escape": (b'{"text": "\\u0000"}', [(1, "NUL character")]),
    "nan": (b'{"text": NaN}', [(1, "NaN or Infinity")]),
    "infinity": (b'{"text": [-Infinity]}', [(1, "NaN or Infinity")]),
    "huge exponent": (b'{"text": 1e999}', [(1, "number out of range")]),
    "huge whole number": (b'{"text": ' + b"9" * 5000 + b"}", [(1, "number out of range")]),
    "not utf-8": (b'{"text": "\xff\xfe"}', [(1, "not UTF-8")]),
    "utf-16": ('{"text": "a"}'.encode("utf-16-le"), [(1, "NUL character")]),
    "lone surrogate": (b'{"text": "\\ud800"}', [(1, "lone surrogate")]),
    "lone low surrogate in a key": (b'{"\\udc00": 1}', [(1, "lone surrogate")]),
    "nested a little": (b'{"text": ' + b"[" * 33 + b"]" * 33 + b"}", [(1, "nested too deep")]),
    "nested very deep": (b"[" * 100_000, [(1, "nested too deep")]),
    "duplicate key": (b'{"text": "a", "text": "b"}', [(1, "duplicate key")]),
    "an array": (b"[1, 2]", [(1, "not an object")]),
    "a string": (b'"text"', [(1, "not an object")]),
    "null": (b"null", [(1, "not an object")]),
    "5 MB line": (b'{"text": "' + b"a" * 5_000_000 + b'"}\n' + GOOD, [(1, "record too large"), (2, {"text": "a"})]),
    "gzip": (b"\x1f\x8b\x08\x00", [(1, "NUL character")]),
    "single quotes": (b"{'text': 'a'}", [(1, "not JSON")]),
    "a raw line end in a string": (b'{"text": "a\nb"}', [(1, "not JSON"), (2, "not JSON")]),
}


@pytest.mark.parametrize("name", LINES)
def test_each_line_is_a_record_or_is_reported_with_its_number(name: str, tmp_path: Path) -> None:
    content, expected = LINES[name]
    path = tmp_path / "records.jsonl"
    path.write_bytes(content)
    assert outcomes(path) == expected


def test_ten_thousand_fuzzed_lines_are_each_a_record_or_reported(tmp_path: Path) -> None:
    draw = random.Random(0)
    lines = [fuzzed_line(draw) for _ in range(10_000)]
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    results = outcomes(path)
    assert [number for number, _ in results] == [i for i, line in enumerate(lines, 1) if line.strip(b" \t\r\n")]
    for number, result in results:
        if isinstance(result, dict):
            assert json.loads(lines[number - 1]) == result
            json.dumps(result, ensure_ascii=False).encode()
    assert 2_000 < sum(isinstance(result, dict) for _, result in results) < 9_000  # many of both kinds


def fuzzed_line(draw: random.Random) -> bytes:
    line = bytearray(json.dumps({"prompt": "a" * draw.randrange(9), "completion": ["b", 1.5, None, "é"]}).encode())
    for _ in range(draw.choice([0, 0, 1, 1, 2, 5])):
        at = draw.randrange(len(line) + 1)
        if draw.random() < 0.5 and at < len(line):
            line[at] = draw.randrange(256)
        else:
            line[at:at] = draw.choice([b"{", b"}", b'"', b"\\", b"\\ud800", b"\0", b"NaN", b"9" * 400, b","])
    return bytes(line).replace(b"\n", b" ")


def test_a_json_array_counts_records_and_continues_after_a_bad_one(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text('[{"text": "a"},\n {"text": NaN}, 7, {"text": "b", "text": "c"},\n {"text": "d"}]')
    reasons = ["NaN or Infinity", "not an object", "duplicate key"]
    assert outcomes(path) == [(1, {"text": "a"}), *((n, r) for n, r in enumerate(reasons, 2)), (5, {"text": "d"})]
    path.write_text('[{"text": "a"}, {"text": ')
    assert outcomes(path) == [(1, {"text": "a"}), (2, "not JSON")]
    for broken in ('[{"text": "a"}', '[{"text": "a"}] x', '[{"text": "a"} {"text": "b"}'):
        path.write_text(broken)
        assert outcomes(path)[0] == (1, {"text": "a"}) and outcomes(path)[-1][1] == "not JSON", broken


def test_json_is_an_object_per_line_or_one_object_over_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert outcomes(path) == [(1, {"text": "a"}), (2, {"text": "b"})]
    path.write_text('{\n "text": "a"\n}')
    assert outcomes(path) == [(1, {"text": "a"})]


def test_a_table_reports_the_line_where_a_row_starts(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"a,\r\nb",c\r\n\r\nonly one\r\n"d ""e""",f\r\n\xff,g\r\nh,i')
    assert outcomes(path) == [
        (2, {"prompt": "a,\r\nb", "completion": "c"}),
        (5, "wrong number of columns"),
        (6, {"prompt": 'd "e"', "completion": "f"}),
        (7, "not UTF-8"),
        (8, {"prompt": "h", "completion": "i"}),
    ]
    tabs = tmp_path / "records.tsv"
    tabs.write_text("prompt\tcompletion\na\tb\n")
    assert outcomes(tabs) == [(2, {"prompt": "a", "completion": "b"})]


def test_a_table_with_an_open_quote_or_a_wrong_header_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    path.write_text('prompt,completion\na,b\n"open,c\n' + "d,e\n" * 10)
    assert outcomes(path)[0] == (2, {"prompt": "a", "completion": "b"})
    assert outcomes(path)[-1][1] == "not a table row"
    path.write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match=r"records\.csv:1: .*every column once"):
        read(path)


def test_a_text_file_is_read_as_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeff\nOne\r\ntwo\n\n\n  \nThree é\n".encode() + b"\n\xff\n\nFour")
    texts = {line: result["text"] if isinstance(result, dict) else result for line, result in outcomes(path)}
    assert texts == {2: "One\ntwo", 7: "Three é", 9: "not UTF-8", 11: "Four"}


def test_parquet_rows_are_numbered_from_1(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "records.parquet"
    datasets.Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"]}).to_parquet(str(path))
    assert outcomes(path) == [(1, {"prompt": "a", "completion": "c"}), (2, {"prompt": "b", "completion": "d"})]
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"records\.parquet"):
        read(path)


def test_a_folder_is_all_its_data_files_and_others_are_reported(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "inner/c.jsonl", ".hidden.jsonl", "README.md", "LICENSE.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)
    folder = f"{tmp_path}/"
    assert [record.where.removeprefix(folder) for record in read(folder)] == [
        "a.jsonl:1",
        "b.jsonl:1",
        "inner/c.jsonl:1",
    ]
    findings = resolve_source(Source(path=folder)).findings
    assert [finding.where.removeprefix(folder) for finding in findings] == ["LICENSE.txt", "README.md"]


def test_a_split_is_a_file_stem_and_test_files_are_reported(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    assert [record.where for record in read(tmp_path, split="train")] == [f"{tmp_path}/train.jsonl:1"]
    assert "test files are read as well" in resolve_source(Source(path=str(tmp_path))).findings[0].message
    with pytest.raises(DataError, match="no file of split 'dev'"):
        read(tmp_path, split="dev")


def test_a_glob_reads_in_order_and_relative_paths_stay_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x2.jsonl", "x1.jsonl", "y.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    assert [record.where for record in read("x*.jsonl")] == ["x1.jsonl:1", "x2.jsonl:1"]
    assert [record.where for record in read("y.jsonl")] == ["y.jsonl:1"]


@pytest.mark.parametrize("case", ["missing", "missing_plain", "empty", "folder", "pipe", "device", "kind", "glob"])
def test_a_path_without_data_is_named_in_the_error(case: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.bin").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.jsonl")
    path = {
        "missing": f"{tmp_path}/train.jsonl",
        "missing_plain": "no such thing",
        "empty": f"{tmp_path}/empty.jsonl",
        "folder": f"{tmp_path}/folder",
        "pipe": f"{tmp_path}/pipe.jsonl",
        "device": "/dev/zero",
        "kind": f"{tmp_path}/model.bin",
        "glob": f"{tmp_path}/z*.jsonl",
    }[case]
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(path)


def test_columns_are_renamed_and_a_missing_one_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"q": "a", "completion": "b"}\n{"p": "a", "completion": "b"}')
    good, bad = read(path, columns={"prompt": "q"})
    assert good.fields == {"prompt": "a", "completion": "b"}
    assert bad.where == f"{path}:2" and "no 'q'" in bad.message


def test_a_weight_repeats_or_drops_the_same_records_every_time(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\n".join([GOOD] * 2000))
    copies = [record.copies for record in read(path, weight=2.5)]
    assert set(copies) == {2, 3} and 4850 < sum(copies) < 5150  # 5000 +- 7 sd of a fair coin over 2000 records
    assert copies == [record.copies for record in read(path, weight=2.5)]
    assert 850 < len(read(path, weight=0.5)) < 1150
    assert len(read(path, max_samples=7)) == 7


def test_one_changed_byte_changes_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(GOOD)
    section = Source(path=str(path))
    before = source.sha256(section, resolve_source(section))
    assert before == source.sha256(section, resolve_source(section))
    path.write_bytes(GOOD.replace(b"a", b"b"))
    assert before != source.sha256(section, resolve_source(section))


def test_a_line_above_the_size_limit_is_never_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with path.open("wb") as file:
        file.truncate(64 * 2**20)  # sparse: 64 MiB of NUL without a line end
    assert outcomes(path) == [(1, "record too large")]
    assert strict_json.MAX_RECORD_BYTES < 5_000_000
