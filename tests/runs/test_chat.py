"""A conversation says what the model says, keeps what was said, and survives whatever is typed."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import qlora
from support.tiny_models import FAMILIES, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_runs import recipe_of, run, write_rows

import qlora as qlora_package
from qlora.data.types import Message
from qlora.model import Model
from qlora.model.generate_tokens import generate, stream
from qlora.model.load_base import load
from qlora.quant import QUANTIZERS
from qlora.runs.chat import COMMANDS, HELP, converse
from qlora.runs.conversation import ChatSession, text_of_stream
from qlora.runs.load_run import load_with_adapters

Zoo = Callable[..., Path]
DEMO = Path(qlora_package.__file__).parent / "demo" / "base"
pytestmark = pytest.mark.xdist_group("chat")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded base, which speaks words."""
    folder = tmp_path_factory.mktemp("chat")
    data = write_rows(folder / "rows.jsonl", 12)
    overrides = ("train.max_steps=4", "optim.learning_rate=0.03", "train.global_batch=4")
    run(recipe_of(DEMO, data, folder / "run", *overrides))
    return folder / "run"


class Heard:
    """A screen that remembers; it can be interrupted after some pieces."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.answers: list[tuple[str, str]] = []
        self.notices: list[str] = []
        self.interrupt_after = interrupt_after

    def answer(self, who: str, pieces: Iterator[str]) -> None:
        text = ""
        try:
            for number, piece in enumerate(pieces, start=1):
                text += piece
                if number == self.interrupt_after:
                    raise KeyboardInterrupt
        finally:
            self.answers.append((who, text))

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture
def talk(trained: Path) -> ChatSession:
    opened, switch = load_with_adapters(str(trained), {"own": str(trained), "twin": str(trained)})
    return ChatSession(opened, switch, max_new_tokens=12, temperature=0.0)


def say(talk: ChatSession, *lines: str, screen: Heard | None = None) -> Heard:
    screen = screen or Heard()
    converse(talk, screen, lines)
    return screen


# ---- the words


@pytest.mark.parametrize("family", FAMILIES)
def test_one_answer_token_by_token_is_the_one_generate_gives(zoo: Zoo, family: str) -> None:
    base = load(Model(name=str(zoo(family)), dtype="float32"), QUANTIZERS["nf4"](), torch.device("cpu"))
    prompt = torch.randint(5, 250, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    (whole,) = generate(base, [prompt], 12)
    assert list(stream(base, prompt, 12)) == whole
    drawn = [list(stream(base, prompt, 12, temperature=1.0, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.booleans())
def test_pieces_together_are_the_text_and_no_piece_is_half_a_character(text: str, ends: bool) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * ends
    pieces = list(text_of_stream(ids, tokenizer))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    assert all(piece for piece in pieces)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_the_prompt_is_that_of_training(talk: ChatSession) -> None:
    heard = say(talk, "one two", "three")
    messages = [Message("user", "one two"), Message("assistant", heard.answers[0][1].strip()), Message("user", "three")]
    assert talk.messages[:3] == messages
    (ids,) = generate(talk.opened.base, [talk.opened.encoder.prompt_ids(messages)], 12)
    said = talk.opened.base.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert talk.messages[3] == Message("assistant", said)


# ---- the commands


def test_compare_shows_the_base_beside_the_adapter_and_changes_nothing(talk: ChatSession) -> None:
    heard = say(talk, "one two", "/compare", "/adapter base", "/reset", "one two")
    first, base, tuned, alone = heard.answers
    assert base[0] == "base" and tuned[0] == "own" and base[1] == alone[1] and tuned[1] == first[1] != base[1]
    again = say(talk, "/reset", "/adapter twin", "/compare one two")
    assert again.answers == [("base", base[1]), ("twin", tuned[1])]
    assert [message.content for message in talk.messages] == ["one two", tuned[1].strip()]


def test_an_adapter_is_switched_by_name_or_mixed(talk: ChatSession) -> None:
    heard = say(talk, "/adapter", "/adapter twin", "/adapter own:0.5 twin:0.5", "one", "/reset", "/adapter own", "one")
    assert heard.notices[:2] == ["adapters: base, own *, twin", "adapters: base, own, twin *"]
    assert "0.5 own + 0.5 twin *" in heard.notices[2]
    assert heard.answers[0] == heard.answers[1]  # half and half of the same is the same


def test_retry_draws_anew_and_the_same_seeds_give_the_same_talk(talk: ChatSession) -> None:
    talk.temperature = 1.5
    first = say(talk, "one two", "/retry", "/retry", "/reset")
    assert len({text for _, text in first.answers}) > 1
    assert say(talk, "one two", "/retry", "/retry").answers == first.answers
    assert [message.content for message in talk.messages] == ["one two", first.answers[-1][1].strip()]


def test_the_system_prompt_is_told_and_a_reset_keeps_it(talk: ChatSession) -> None:
    heard = say(talk, "one two", "/reset", "/system be brief and three", "one two", "/reset", "/system", "one two")
    assert heard.answers[0] == heard.answers[2]
    say(talk, "/reset", "/system be brief")
    assert talk.system == "be brief" and talk.messages == []


def test_what_is_saved_can_be_trained_on(talk: ChatSession, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    heard = say(talk, "/system speak", "one two", "three", f"/save {file}", "/reset", "four", f"/save {file}")
    assert [notice for notice in heard.notices if "saved" in notice] == [f"saved as row {n} of {file}" for n in (1, 2)]
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert [turn["role"] for turn in rows[0]] == ["system", "user", "assistant", "user", "assistant"]
    assert rows[1][1]["content"] == "four" and len(rows) == 2
    found = qlora("eval", talk.opened.recipe.train.output, "--data", file, "--json")
    assert found.json["rows"] == 2


def test_an_interrupted_answer_is_kept_and_the_talk_goes_on(talk: ChatSession) -> None:
    screen = Heard(interrupt_after=1)
    say(talk, "one two", screen=screen)
    assert "stopped" in screen.notices[0] and talk.messages[1].content == screen.answers[0][1].strip()
    screen.interrupt_after = None
    say(talk, "/retry", screen=screen)
    assert len(screen.answers[1][1]) > len(screen.answers[0][1]) and len(talk.messages) == 2


def test_the_oldest_turns_make_room_and_a_text_that_is_too_long_is_refused(talk: ChatSession) -> None:
    told: list[str] = []
    talk.say = told.append
    heard = say(talk, *["zq " * 60] * 5)  # some 120 tokens each, of 512 in all
    assert len(heard.answers) == 5 and len(talk.messages) == 10
    assert told and all("left out" in line for line in told)
    refused = say(talk, "zq " * 400)
    assert "fewer words" in refused.notices[0] and refused.answers == [] and len(talk.messages) == 10


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([*COMMANDS, "/adapter x", "/adapter own:x", "/save /", "/"]), st.just("")), max_size=6
    )
)
def test_no_line_ends_a_talk_but_exit(trained: Path, lines: list[str]) -> None:
    opened, switch = _opened(trained)
    talk = ChatSession(opened, switch, max_new_tokens=1, temperature=0.0)
    before = lines[: lines.index("/exit")] if "/exit" in lines else lines
    heard = say(talk, *lines)
    assert all(line in HELP for line in COMMANDS) and len(heard.notices) >= sum(line == "/help" for line in before)


_OPEN: dict[Path, Any] = {}


def _opened(folder: Path) -> Any:
    if folder not in _OPEN:
        _OPEN[folder] = load_with_adapters(str(folder), {"own": str(folder)})
    _OPEN[folder][1].use("own")
    return _OPEN[folder]


# ---- the verb


def test_through_a_pipe_answers_are_lines_and_everything_else_is_for_people(
    trained: Path, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\n/adapter base\n/nothing\n//slash\n"))
    said = qlora("chat", trained, "--max-new-tokens", 5, "--temperature", 0)
    (row,) = qlora("generate", trained, "one two", "--max-new-tokens", 5, "--json").json["rows"]
    assert said.code == 0 and said.out.startswith(row["text"]) and said.out.endswith("\n")
    assert "/nothing is no command" in said.err and "base *" in said.err and "\x1b[" not in said.out + said.err
    monkeypatch.setattr("sys.stdin", io.StringIO("/adapter own\n"))
    plain = qlora("chat", zoo("llama-tied-bias"))
    assert plain.code == 0 and "no adapter is called 'own'" in plain.err
    refused = qlora("chat", trained, "--adapter", f"own={trained}")
    assert refused.code == 2 and "own" in refused.err
