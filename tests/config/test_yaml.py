"""Strict YAML: values typed as in YAML 1.2; what a recipe does not need is refused with its line."""

import math
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora.config import decode, parse, write
from qlora.errors import RecipeError

SURPRISES = {
    "2e-4": 2e-4,
    "1e5": 1e5,
    ".5": 0.5,
    "5.": 5.0,
    "-1.5E+3": -1500.0,
    "012": 12,
    "0o14": 12,
    "0x1F": 31,
    "+3": 3,
    "no": "no",
    "yes": "yes",
    "on": "on",
    "off": "off",
    "y": "y",
    "12:30": "12:30",
    "1_000": "1_000",
    "2024-01-31": "2024-01-31",
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "'2e-4'": "2e-4",
    '"true"': "true",
    "=": "=",
    "<<": "<<",
    "1.2.3": "1.2.3",
    "24GiB": "24GiB",
    "[1, no, 2e-4]": [1, "no", 2e-4],
}


@pytest.mark.parametrize("text", SURPRISES)
def test_a_value_is_typed_as_in_yaml_1_2(text):
    value = parse(f"key: {text}\n", "r.yaml").value["key"]
    assert value == SURPRISES[text]
    assert type(value) is type(SURPRISES[text])


def test_infinity_is_a_number_that_ranges_can_refuse():
    values = parse("[.inf, -.Inf, .nan]", "r.yaml").value
    assert values[:2] == [math.inf, -math.inf]
    assert math.isnan(values[2])


REFUSED = {
    "a: 1\na: 2\n": "r.yaml:2: a: written twice, first on line 1",
    "a: {b: 1,\n  b: 2}\n": "r.yaml:2: a.b: written twice, first on line 1",
    "a: 1\nb: &x 2\n": "r.yaml:2: b: an anchor (&x)",
    "a: 1\nb: *x\n": "r.yaml:2: b: an alias (*x)",
    "a: 1\n\nb: !!int 3\n": "r.yaml:3: b: a tag (tag:yaml.org,2002:int)",
    "a: !mine 3\n": "r.yaml:1: a: a tag (!mine)",
    "a: !!python/object/apply:os.system [ls]\n": "r.yaml:1: a: a tag (tag:yaml.org,2002:python/object/apply:os.system)",
    "a: 1\n2: 3\n": "r.yaml:2: a key must be text",
    "a:\n  null: 3\n": "r.yaml:2: a: a key must be text",
    "? [a]\n: 3\n": "r.yaml:1: a key must be text",
    'a: "\\0"\n': "r.yaml:1: a: a control character",
    'a: "\\ud800"\n': "r.yaml:1: a: a control character",
    f"a: {'9' * 50}\n": "r.yaml:1: a: a number of 50 characters",
}


@pytest.mark.parametrize("text", REFUSED)
def test_yaml_that_is_not_allowed_is_a_problem_with_its_line(text):
    problems = [f"{location}: {problem}" for location, problem in parse(text, "r.yaml").problems]
    assert any(problem.startswith(REFUSED[text]) for problem in problems), problems


UNREADABLE = {
    "a: 1\n---\nb: 2\n": "r.yaml:2: a second document",
    "a: 1\n\tb: 2\n": "r.yaml:2: not YAML",
    "a: b: c\n": "r.yaml:1: not YAML: a second `:`",
    "a: [1\n": "r.yaml:2: not YAML",
    "a: 'x\n": "r.yaml:2: not YAML",
    "a: \x00": "r.yaml:1: the character U+0000",
    "\n\na: \x07": "r.yaml:3: the character U+0007",
    'a: "\\UFFFFFFFF"\n': "r.yaml: not YAML",
    "a: " + "[" * 100: "r.yaml:1: a[0]: more than 16 levels deep",
    "%YAML 2.0\n--- a": "r.yaml:1: not YAML",
}


@pytest.mark.parametrize("text", UNREADABLE)
def test_yaml_that_can_not_be_read_is_an_error_with_its_line(text):
    with pytest.raises(RecipeError) as raised:
        parse(text, "r.yaml")
    assert str(raised.value).startswith(UNREADABLE[text])
    assert len(str(raised.value).splitlines()) == 1


HOSTILE = {
    "billion laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "deep lists": "[" * 1_000_000,
    "deep groups": "a: " + "{a: " * 200_000,
    "deep blocks": "".join(" " * level + "a:\n" for level in range(900)),
    "many keys": "".join(f"a{number}: 1\n" for number in range(80_000)),
    "one key many times": "a: 1\n" * 170_000,
    "many anchors": "- &a 1\n" * 100_000,
    "one long word": "a" * 1_000_000,
    "too long": "a: 1\n" * 300_000,
    "question marks": "? " * 400_000,
}


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_document_is_refused_at_once(name):
    start = time.process_time()
    try:
        document = parse(decode(HOSTILE[name].encode(), "r.yaml"), "r.yaml")
        assert document.problems or not isinstance(document.value, dict)
    except RecipeError:
        pass
    assert time.process_time() - start < 5  # measured: a tenth


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: \xff\n", "r.yaml:2: not UTF-8"),
        ("a: 1".encode("utf-16"), "r.yaml:1: not UTF-8"),
        (b"#" * (2**20 + 1), "r.yaml: longer than"),
    ],
)
def test_bytes_that_are_not_text_are_an_error(content, message):
    with pytest.raises(RecipeError, match=message):
        decode(content, "r.yaml")


def test_a_byte_order_mark_is_not_content():
    assert parse(decode(b"\xef\xbb\xbfa: 1", "r.yaml"), "r.yaml").value == {"a": 1}


PLAIN = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False)
TEXT = st.text(st.characters(blacklist_categories=["Cs", "Cc"])) | st.sampled_from([*SURPRISES, "#", "a: b", "- a"])


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        TEXT, st.recursive(PLAIN | TEXT, lambda values: st.lists(values) | st.dictionaries(TEXT, values), max_leaves=8)
    )
)
def test_written_yaml_reads_back_the_same(value):
    document = parse(write(value), "r.yaml")
    assert document.value == value
    assert not document.problems


@given(
    st.binary()
    | st.text().map(str.encode)
    | st.lists(st.sampled_from([*SURPRISES, *REFUSED])).map("\n".join).map(str.encode)
)
def test_any_bytes_are_a_document_or_a_recipe_error(content):
    try:
        document = parse(decode(content, "r.yaml"), "r.yaml")
    except RecipeError as error:
        assert str(error).startswith("r.yaml")
    else:
        for _, text in document.problems:
            assert text


@given(st.text(alphabet="abc:-?{}[]&*!|>'\"%#@ \n\t,~0.e\\x"))
def test_text_that_pyyaml_refuses_is_refused(text):
    try:
        parse(text, "r.yaml")
    except RecipeError:
        return
    try:
        assert len(list(yaml.parse(text))) > 0
    except yaml.YAMLError as error:  # an alias without an anchor is a problem here and an error in PyYAML
        pytest.fail(f"read although {error}")
