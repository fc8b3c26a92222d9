"""`qlora chat`: answers equal those of generate, messages are kept, and no input line breaks the chat."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_records
from support.tiny_models import FAMILIES, byte_tokenizer

import qlora as qlora_package
from qlora.adapters.switch import AdapterSwitch
from qlora.data.types import Message
from qlora.model import Model
from qlora.model.generate_tokens import generate, stream_tokens
from qlora.model.load_base import load
from qlora.quant import Quant, build_quantizer
from qlora.runs.chat import COMMANDS, HELP, run_chat
from qlora.runs.conversation import ChatSession, decode_stream
from qlora.runs.load_run import LoadedRun, load_with_adapters

Zoo = Callable[..., Path]
DEMO = Path(qlora_package.__file__).parent / "demo" / "base"
pytestmark = pytest.mark.xdist_group("chat")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded base model, which answers in words."""
    folder = tmp_path_factory.mktemp("chat")
    data = write_records(folder / "records.jsonl", 12)
    overrides = ("train.max_steps=4", "optim.learning_rate=0.03", "train.global_batch=4")
    run(recipe_of(DEMO, data, folder / "run", *overrides))
    return folder / "run"


class RecordedScreen:
    """A screen that records its output; it can be interrupted after some pieces."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.answers: list[tuple[str, str]] = []
        self.infos: list[str] = []
        self.interrupt_after = interrupt_after

    def answer(self, name: str, pieces: Iterator[str]) -> None:
        text = ""
        try:
            for number, piece in enumerate(pieces, start=1):
                text += piece
                if number == self.interrupt_after:
                    raise KeyboardInterrupt
        finally:
            self.answers.append((name, text))

    def info(self, text: str) -> None:
        self.infos.append(text)


@pytest.fixture(scope="module")
def loaded(trained: Path) -> tuple[LoadedRun, AdapterSwitch]:
    """The run with its adapter twice."""
    return load_with_adapters(str(trained), {"own": str(trained), "twin": str(trained)})


@pytest.fixture
def session(loaded: tuple[LoadedRun, AdapterSwitch]) -> ChatSession:
    """A new conversation, with the first adapter."""
    run, switch = loaded
    switch.activate("own")
    return ChatSession(run, switch, max_new_tokens=8, temperature=0.0)


def type_lines(session: ChatSession, *lines: str, screen: RecordedScreen | None = None) -> RecordedScreen:
    screen = screen or RecordedScreen()
    run_chat(session, screen, lines)
    return screen


# ---- answers


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_answer_is_the_one_of_generate(zoo: Zoo, family: str) -> None:
    base = load(Model(name=str(zoo(family)), dtype="float32"), build_quantizer(Quant()), torch.device("cpu"))
    prompt = torch.randint(5, 250, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    (answer,) = generate(base, [prompt], 12)
    assert list(stream_tokens(base, prompt, 12)) == answer
    sampled = [list(stream_tokens(base, prompt, 12, temperature=1.0, seed=seed)) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.booleans())
def test_pieces_join_to_the_text_and_no_piece_has_half_a_character(text: str, ends: bool) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * ends
    pieces = list(decode_stream(ids, tokenizer))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    assert all(piece for piece in pieces)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_the_prompt_is_that_of_training(session: ChatSession) -> None:
    screen = type_lines(session, "one two", "three")
    messages = [
        Message("user", "one two"),
        Message("assistant", screen.answers[0][1].strip()),
        Message("user", "three"),
    ]
    assert session.messages[:3] == messages
    (ids,) = generate(session.run.base, [session.run.encoder.prompt_ids(messages)], 8)
    answer = session.run.base.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert session.messages[3] == Message("assistant", answer)


# ---- the commands


def test_compare_prints_base_and_adapter_and_changes_nothing(session: ChatSession) -> None:
    screen = type_lines(session, "one two", "/compare", "/adapter base", "/reset", "one two")
    first, base, tuned, alone = screen.answers
    assert base[0] == "base" and tuned[0] == "own" and base[1] == alone[1] and tuned[1] == first[1] != base[1]
    second = type_lines(session, "/reset", "/adapter twin", "/compare one two")
    assert second.answers == [("base", base[1]), ("twin", tuned[1])]
    assert [message.content for message in session.messages] == ["one two", tuned[1].strip()]


def test_an_adapter_is_switched_by_name_or_mixed(session: ChatSession) -> None:
    screen = type_lines(
        session, "/adapter", "/adapter twin", "/adapter own:0.5 twin:0.5", "one", "/reset", "/adapter own", "one"
    )
    assert screen.infos[:2] == ["adapters: base, own *, twin", "adapters: base, own, twin *"]
    assert "0.5 own + 0.5 twin *" in screen.infos[2]
    assert screen.answers[0] == screen.answers[1]  # a mix of two equal adapters is that adapter


def test_retry_samples_again_and_equal_seeds_give_equal_answers(session: ChatSession) -> None:
    session.temperature = 1.5
    first = type_lines(session, "one two", "/retry", "/retry", "/reset")
    assert len({text for _, text in first.answers}) > 1
    assert type_lines(session, "one two", "/retry", "/retry").answers == first.answers
    assert [message.content for message in session.messages] == ["one two", first.answers[-1][1].strip()]


def test_the_system_prompt_is_used_and_a_reset_keeps_it(session: ChatSession) -> None:
    screen = type_lines(
        session, "one two", "/reset", "/system be brief and three", "one two", "/reset", "/system", "one two"
    )
    assert screen.answers[0] == screen.answers[2]
    type_lines(session, "/reset", "/system be brief")
    assert session.system == "be brief" and session.messages == []


def test_a_saved_conversation_can_be_trained_on(session: ChatSession, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    screen = type_lines(
        session, "/system speak", "one two", "three", f"/save {file}", "/reset", "four", f"/save {file}"
    )
    assert [line for line in screen.infos if "saved" in line] == [f"saved as record {n} of {file}" for n in (1, 2)]
    records = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert [turn["role"] for turn in records[0]] == ["system", "user", "assistant", "user", "assistant"]
    assert records[1][1]["content"] == "four" and len(records) == 2
    result = qlora("eval", session.run.recipe.train.output, "--data", file, "--json")
    assert result.json["rows"] == 2


def test_an_interrupted_answer_is_kept_and_the_chat_continues(session: ChatSession) -> None:
    screen = RecordedScreen(interrupt_after=1)
    type_lines(session, "one two", screen=screen)
    assert "stopped" in screen.infos[0] and session.messages[1].content == screen.answers[0][1].strip()
    screen.interrupt_after = None
    type_lines(session, "/retry", screen=screen)
    assert len(screen.answers[1][1]) > len(screen.answers[0][1]) and len(session.messages) == 2


def test_the_oldest_turns_are_left_out_and_a_too_long_text_is_refused(session: ChatSession) -> None:
    lines: list[str] = []
    session.log = lines.append
    screen = type_lines(session, *["zq " * 60] * 5)  # some 120 tokens each, of 512 in all
    assert len(screen.answers) == 5 and len(session.messages) == 10
    assert lines and all("left out" in line for line in lines)
    refused = type_lines(session, "zq " * 400)
    assert "Shorten the prompt" in refused.infos[0] and refused.answers == [] and len(session.messages) == 10


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([*COMMANDS, "/adapter x", "/adapter own:x", "/save /", "/"]), st.just("")), max_size=6
    )
)
def test_only_exit_ends_a_chat(loaded: tuple[LoadedRun, AdapterSwitch], lines: list[str]) -> None:
    run, switch = loaded
    switch.activate("own")
    session = ChatSession(run, switch, max_new_tokens=1, temperature=0.0)
    before = lines[: lines.index("/exit")] if "/exit" in lines else lines
    screen = type_lines(session, *lines)
    assert all(line in HELP for line in COMMANDS) and len(screen.infos) >= sum(line == "/help" for line in before)


# ---- the command


def test_in_a_pipe_answers_are_on_stdout_and_all_else_on_stderr(
    trained: Path, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\n/adapter base\n/nothing\n//slash\n"))
    result = qlora("chat", trained, "--max-new-tokens", 5, "--temperature", 0)
    (row,) = qlora("generate", trained, "one two", "--max-new-tokens", 5, "--json").json["rows"]
    assert result.code == 0 and result.out.startswith(row["text"]) and result.out.endswith("\n")
    assert "/nothing is no command" in result.err and "base *" in result.err and "\x1b[" not in result.out + result.err
    monkeypatch.setattr("sys.stdin", io.StringIO("/adapter own\n"))
    plain = qlora("chat", zoo("llama-tied-bias"))
    assert plain.code == 0 and "no adapter is called 'own'" in plain.err
    refused = qlora("chat", trained, "--adapter", f"own={trained}")
    assert refused.code == 2 and "own" in refused.err
