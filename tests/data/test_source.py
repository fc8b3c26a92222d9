"""Rows come with file:line, hostile lines are reported with it, and nothing hangs, crashes or is lost."""

import json
import os
import random

import pytest

from qlora.data import Source
from qlora.data.reading import source, strict_json
from qlora.data.reading.resolve_paths import locate
from qlora.data.types import BadRecord, Record
from qlora.errors import DataError


def read(path, **settings) -> list[Record | BadRecord]:
    return list(source.rows([Source(path=str(path), **settings)], seed=0))


def outcome(path) -> list:
    """(line, fields) for a row, (line, reason) for a bad one."""
    return [
        (int(row.where.rpartition(":")[2]), dict(row.fields) if isinstance(row, Record) else row.reason)
        for row in read(path)
    ]


GOOD = b'{"text": "a"}'
LINES = {  # bytes of a file: what comes out of it
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
    "5 MB line": (b'{"text": "' + b"a" * 5_000_000 + b'"}\n' + GOOD, [(1, "row too large"), (2, {"text": "a"})]),
    "gzip": (b"\x1f\x8b\x08\x00", [(1, "NUL character")]),
    "single quotes": (b"{'text': 'a'}", [(1, "not JSON")]),
    "a raw line end in a string": (b'{"text": "a\nb"}', [(1, "not JSON"), (2, "not JSON")]),
}


@pytest.mark.parametrize("name", LINES)
def test_each_line_is_a_row_or_is_reported_with_its_number(name, tmp_path):
    content, expected = LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert outcome(path) == expected


def test_ten_thousand_fuzzed_lines_are_each_a_row_or_reported(tmp_path):
    draw = random.Random(0)
    lines = [fuzzed(draw) for _ in range(10_000)]
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = outcome(path)
    assert [number for number, _ in found] == [i for i, line in enumerate(lines, 1) if line.strip(b" \t\r\n")]
    for number, what in found:
        if isinstance(what, dict):
            assert json.loads(lines[number - 1]) == what
            json.dumps(what, ensure_ascii=False).encode()
    assert 2_000 < sum(isinstance(what, dict) for _, what in found) < 9_000  # the fuzz hits both sides


def fuzzed(draw: random.Random) -> bytes:
    line = bytearray(json.dumps({"prompt": "a" * draw.randrange(9), "completion": ["b", 1.5, None, "é"]}).encode())
    for _ in range(draw.choice([0, 0, 1, 1, 2, 5])):
        place = draw.randrange(len(line) + 1)
        if draw.random() < 0.5 and place < len(line):
            line[place] = draw.randrange(256)
        else:
            line[place:place] = draw.choice([b"{", b"}", b'"', b"\\", b"\\ud800", b"\0", b"NaN", b"9" * 400, b","])
    return bytes(line).replace(b"\n", b" ")


def test_a_json_array_counts_records_and_goes_on_after_a_bad_one(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a"},\n {"text": NaN}, 7, {"text": "b", "text": "c"},\n {"text": "d"}]')
    reasons = ["NaN or Infinity", "not an object", "duplicate key"]
    assert outcome(path) == [(1, {"text": "a"}), *((n, r) for n, r in enumerate(reasons, 2)), (5, {"text": "d"})]
    path.write_text('[{"text": "a"}, {"text": ')
    assert outcome(path) == [(1, {"text": "a"}), (2, "not JSON")]
    for cut in ('[{"text": "a"}', '[{"text": "a"}] x', '[{"text": "a"} {"text": "b"}'):
        path.write_text(cut)
        assert outcome(path)[0] == (1, {"text": "a"}) and outcome(path)[-1][1] == "not JSON", cut


def test_json_holds_an_object_per_line_or_a_single_one_over_several(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert outcome(path) == [(1, {"text": "a"}), (2, {"text": "b"})]
    path.write_text('{\n "text": "a"\n}')
    assert outcome(path) == [(1, {"text": "a"})]


def test_a_table_gives_the_line_its_record_begins_on(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"a,\r\nb",c\r\n\r\nonly one\r\n"d ""e""",f\r\n\xff,g\r\nh,i')
    assert outcome(path) == [
        (2, {"prompt": "a,\r\nb", "completion": "c"}),
        (5, "wrong number of columns"),
        (6, {"prompt": 'd "e"', "completion": "f"}),
        (7, "not UTF-8"),
        (8, {"prompt": "h", "completion": "i"}),
    ]
    tabs = tmp_path / "rows.tsv"
    tabs.write_text("prompt\tcompletion\na\tb\n")
    assert outcome(tabs) == [(2, {"prompt": "a", "completion": "b"})]


def test_a_table_with_an_open_quote_or_an_odd_header_does_not_swallow_the_file(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\na,b\n"open,c\n' + "d,e\n" * 10)
    assert outcome(path)[0] == (2, {"prompt": "a", "completion": "b"})
    assert outcome(path)[-1][1] == "not a table row"
    path.write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match=r"rows\.csv:1: .*every column once"):
        read(path)


def test_a_text_file_gives_its_paragraphs(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeff\nOne\r\ntwo\n\n\n  \nThree é\n".encode() + b"\n\xff\n\nFour")
    said = {number: what["text"] if isinstance(what, dict) else what for number, what in outcome(path)}
    assert said == {2: "One\ntwo", 7: "Three é", 9: "not UTF-8", 11: "Four"}


def test_parquet_counts_rows(tmp_path):
    import datasets

    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"]}).to_parquet(str(path))
    assert outcome(path) == [(1, {"prompt": "a", "completion": "c"}), (2, {"prompt": "b", "completion": "d"})]
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"rows\.parquet"):
        read(path)


def test_a_folder_is_all_its_data_files_and_the_strays_are_told(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "inner/c.jsonl", ".hidden.jsonl", "README.md", "LICENSE.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)
    folder = f"{tmp_path}/"
    assert [row.where.removeprefix(folder) for row in read(folder)] == ["a.jsonl:1", "b.jsonl:1", "inner/c.jsonl:1"]
    strays = locate(Source(path=folder)).findings
    assert [finding.where.removeprefix(folder) for finding in strays] == ["LICENSE.txt", "README.md"]


def test_a_split_is_a_file_stem_and_held_out_files_are_pointed_out(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    assert [row.where for row in read(tmp_path, split="train")] == [f"{tmp_path}/train.jsonl:1"]
    assert "test files are read as well" in locate(Source(path=str(tmp_path))).findings[0].message
    with pytest.raises(DataError, match="no file of split 'dev'"):
        read(tmp_path, split="dev")


def test_a_glob_reads_in_order_and_relative_paths_stay_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x2.jsonl", "x1.jsonl", "y.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    assert [row.where for row in read("x*.jsonl")] == ["x1.jsonl:1", "x2.jsonl:1"]
    assert [row.where for row in read("y.jsonl")] == ["y.jsonl:1"]


@pytest.mark.parametrize("case", ["missing", "missing_plain", "empty", "folder", "pipe", "device", "kind", "glob"])
def test_what_is_no_data_is_named_with_what_is_allowed(case, tmp_path):
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
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(path)


def test_columns_are_renamed_and_a_missing_one_is_reported(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"q": "a", "completion": "b"}\n{"p": "a", "completion": "b"}')
    good, bad = read(path, columns={"prompt": "q"})
    assert good.fields == {"prompt": "a", "completion": "b"}
    assert bad.where == f"{path}:2" and "no 'q'" in bad.message


def test_weights_repeat_and_thin_rows_the_same_way_each_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD] * 2000))
    copies = [row.copies for row in read(path, weight=2.5)]
    assert set(copies) == {2, 3} and 4850 < sum(copies) < 5150  # 5000 +- 7 sd of a fair coin over 2000 rows
    assert copies == [row.copies for row in read(path, weight=2.5)]
    assert 850 < len(read(path, weight=0.5)) < 1150
    assert len(read(path, max_samples=7)) == 7


def test_one_changed_byte_changes_the_digest(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD)
    one = Source(path=str(path))
    before = source.sha256(one, locate(one))
    assert before == source.sha256(one, locate(one))
    path.write_bytes(GOOD.replace(b"a", b"b"))
    assert before != source.sha256(one, locate(one))


def test_a_line_above_the_ceiling_is_never_held(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(300 * 2**20)  # sparse: 300 MiB of NUL without a line end
    assert outcome(path) == [(1, "row too large")]
    assert strict_json.MAX_ROW_BYTES < 5_000_000
