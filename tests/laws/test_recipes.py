"""Laws of recipes: a dump reads back, every typo is found with its line, any bytes are a recipe or an error."""

import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora.adapters import ADAPTERS
from qlora.config import parse
from qlora.data import FORMATS
from qlora.distributed import STRATEGIES
from qlora.errors import RecipeError
from qlora.quant import QUANTIZERS
from qlora.recipe.recipe import SECTIONS, dump, from_mapping, read, recipes_folder, schema
from qlora.training import OPTIMIZERS, SCHEDULES
from qlora.training.objectives import OBJECTIVES

WORDS = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1)
WHOLE = st.integers(1, 10**9)
POSITIVE = st.floats(1e-300, 1e300)
SHARE = st.floats(0, 1, exclude_max=True)
FORMAT = st.sampled_from(["auto", *FORMATS])
SOURCE = st.fixed_dictionaries(
    {"path": WORDS},
    optional={
        "format": FORMAT | st.none(),
        "split": WORDS | st.none(),
        "columns": st.dictionaries(WORDS, WORDS) | st.none(),
        "weight": POSITIVE,
        "max_samples": WHOLE | st.none(),
    },
)
SOURCES = WORDS | SOURCE | st.lists(WORDS | SOURCE, min_size=1, max_size=3)
VALUES = {
    "model.name": WORDS,
    "model.revision": WORDS | st.none(),
    "model.dtype": st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
    "model.attention": st.sampled_from(["auto", "sdpa", "eager"]),
    "model.chat_template": WORDS,
    "quant.kind": st.sampled_from(sorted(QUANTIZERS)),
    "quant.double": st.booleans() | st.none(),
    "quant.block": st.sampled_from([32, 64, 4096, None]),
    "quant.keep": st.just("auto") | st.lists(st.sampled_from(["down_proj", r"layers\.\d+\.mlp"])) | st.none(),
    "quant.keep_bytes": POSITIVE | st.sampled_from(["5%", "0.5 %", "200MiB", "1 GB"]) | st.none(),
    "adapter.kind": st.sampled_from(sorted(ADAPTERS)),
    "adapter.rank": WHOLE | st.none(),
    "adapter.alpha": POSITIVE | WHOLE | st.none(),
    "adapter.dropout": SHARE,
    "adapter.targets": st.just("all-linear") | st.lists(WORDS, min_size=1, max_size=3),
    "adapter.save_modules": st.lists(st.sampled_from(["embed_tokens", "lm_head", "norm"])),
    "adapter.tokens": st.lists(WORDS | st.integers(0, 99), max_size=3),
    "adapter.new_tokens": st.lists(WORDS, max_size=3),
    "adapter.rank_pattern": st.dictionaries(st.just("q_proj") | st.just(r"layers\.\d+\.mlp\..*"), WHOLE) | st.none(),
    "adapter.alpha_pattern": st.dictionaries(st.just("up_proj"), POSITIVE | WHOLE) | st.none(),
    "adapter.expert_rank": st.just("auto") | st.integers(0, 8) | st.none(),
    "adapter.init": st.sampled_from(["default", "gaussian", "pissa", "loftq"]),
    "data.train": SOURCES,
    "data.eval": SOURCES | st.none(),
    "data.eval_fraction": SHARE | st.none(),
    "data.format": FORMAT,
    "data.max_length": WHOLE,
    "data.overlong": st.sampled_from(["auto", "split", "drop", "truncate", "error"]),
    "data.control_strings": st.sampled_from(["text", "accept"]),
    "data.template_args": st.dictionaries(
        st.sampled_from(["enable_thinking", "reasoning_effort", "depth"]), st.booleans() | WORDS | WHOLE, max_size=2
    ),
    "data.thinking": st.sampled_from(["as_template", "in_content", "drop"]),
    "data.empty_thinking": st.sampled_from(["mask", "train"]),
    "data.packing": st.booleans(),
    "data.order": st.sampled_from(["shuffle", "length", "sequential"]),
    "data.train_on": st.sampled_from(["assistant", "last", "all"]),
    "objective.kind": st.sampled_from(sorted(OBJECTIVES)),
    "objective.beta": POSITIVE | st.none(),
    "objective.label_smoothing": st.floats(0, 0.5, exclude_max=True) | st.none(),
    "objective.gamma": st.just(0.0) | POSITIVE | st.none(),
    "objective.desirable_weight": POSITIVE | st.none(),
    "objective.undesirable_weight": POSITIVE | st.none(),
    "objective.sft_weight": st.just(0.0) | POSITIVE | st.none(),
    "objective.reference": st.just("base") | WORDS | st.none(),
    "optim.kind": st.sampled_from(sorted(OPTIMIZERS)),
    "optim.learning_rate": POSITIVE,
    "optim.schedule": st.sampled_from(sorted(SCHEDULES)),
    "optim.warmup": SHARE | WHOLE,
    "optim.weight_decay": SHARE,
    "optim.betas": st.lists(SHARE, min_size=2, max_size=2),
    "optim.max_grad_norm": POSITIVE | st.none(),
    "optim.loraplus_ratio": POSITIVE | st.none(),
    "train.output": WORDS,
    "train.epochs": POSITIVE | st.none(),
    "train.max_steps": WHOLE | st.none(),
    "train.micro_batch": WHOLE,
    "train.global_batch": WHOLE,
    "train.seed": st.integers(0, 2**32 - 1),
    "train.log_every": WHOLE,
    "train.eval_every": WHOLE | st.none(),
    "train.save_every": WHOLE | st.none(),
    "train.keep": WHOLE,
    "train.early_stop": WHOLE | st.none(),
    "train.early_stop_on": st.sampled_from(["loss", "accuracy", None]),
    "train.resume": WORDS,
    "train.sample_prompts": st.lists(WORDS) | WORDS.map("{}.jsonl".format),
    "train.report_to": st.lists(st.sampled_from(["wandb", "tensorboard", "trackio"])),
    "train.compile": st.booleans(),
    "train.deterministic": st.booleans(),
    "memory.budget": st.sampled_from(["auto", "24GiB", "0.5 GB", "512MiB", ".5TiB"]),
    "memory.recompute": st.sampled_from(["auto", "all", "none"]) | st.integers(0, 99),
    "memory.offload_activations": st.just("auto") | st.booleans(),
    "memory.weights": st.sampled_from(["auto", "resident", "stream"]),
    "distributed.kind": st.sampled_from(["auto", *STRATEGIES]),
}
KEYS = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]
REQUIRED = {"model.name": WORDS, "data.train": SOURCES}


def nested(flat):
    sections = {}
    for path, value in flat.items():
        section, key = path.split(".")
        sections.setdefault(section, {})[key] = value
    return sections


def test_the_laws_cover_every_setting():
    assert sorted(VALUES) == sorted(KEYS)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None, max_examples=12
)
@given(
    flat=st.fixed_dictionaries(REQUIRED, optional={key: value for key, value in VALUES.items() if key not in REQUIRED})
)
def test_a_dumped_recipe_reads_back_the_same(flat, tmp_path_factory):
    try:
        recipe, _ = from_mapping(nested(flat))
    except RecipeError as error:  # each setting is valid here, so only a conflict between them is allowed
        conflicts = ("has no effect", "full trains every weight", "loftq starts from", "compiled layers", "stream")
        conflicts += (
            "objective.kind",
            "objective.reference",
            "a preference for a whole answer",
            "adapter.kind full has none",
        )
        assert all(any(conflict in line for conflict in conflicts) for line in str(error).splitlines()), error
        return
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump(recipe), encoding="utf-8")
    assert read(file) == (recipe, [])
    assert dump(read(file)[0]) == dump(recipe)


def mutations():
    """The reference with one key changed: each letter replaced, and the last letter doubled."""
    lines = (recipes_folder() / "reference.yaml").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        key = line.split(":")[0].strip(" -")
        if line.startswith("#") or not key:
            continue
        places = sorted({0, len(key) // 2, len(key) - 1})
        for typo in [key + key[-1], *(_replaced(key, index, number * 7 + index * 5) for index in places)]:
            changed = [*lines[: number - 1], line.replace(key, typo, 1), *lines[number:]]
            yield pytest.param("\n".join(changed), number, key, id=f"{number}-{typo}")


def _replaced(key, index, shift):
    letter = next(other for other in string.ascii_lowercase[shift % 20 :] if other != key[index])
    return key[:index] + letter + key[index + 1 :]


@pytest.mark.sample(of=8)
@pytest.mark.parametrize(("text", "number", "key"), mutations())
def test_a_wrong_letter_in_a_key_is_found_with_line_and_right_name(text, number, key, tmp_path):
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        read(tmp_path / "r.yaml")
    [message] = [line for line in str(raised.value).splitlines() if "not a setting" in line]
    assert message.startswith(f"{tmp_path / 'r.yaml'}:{number}: ")
    assert f"Did you mean {key!r}?" in message


PIECES = [
    *(f"{key.split('.')[0]}:\n  {key.split('.')[1]}: " for key in KEYS),
    *(name + ":" for name in SECTIONS),
    *(
        "lora_r: ",
        "datasets: ",
        "optim: ",
        "adapter: ",
        "gradient_accumulation_steps: ",
        "  ",
        "\n",
        "- ",
        "{",
        "}",
        "[",
        "]",
    ),
    *(
        "2e-4",
        "no",
        "null",
        "*a",
        "&a ",
        "!!python/name:os.system",
        "1",
        "-1",
        ".nan",
        "'",
        '"',
        ": ",
        "? ",
        "\x00",
        "\ud800",
    ),
]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary() | st.lists(st.sampled_from(PIECES)).map(lambda pieces: "".join(pieces).encode("utf-8", "surrogatepass"))
)
def test_any_bytes_are_a_recipe_or_a_recipe_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(content)
    try:
        read(file)
    except RecipeError as error:
        assert str(error)
        assert all(line.startswith((str(file), "...")) for line in str(error).splitlines())


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda values: st.lists(values) | st.dictionaries(st.text() | st.integers(), values),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*KEYS, *SECTIONS, "lora_r", "datasets", "report_to", "optim"]), ANYTHING))
def test_any_values_are_a_recipe_or_a_recipe_error(flat):
    mapping = {key: value for key, value in flat.items() if "." not in key}
    for key, value in nested({key: value for key, value in flat.items() if "." in key}).items():
        mapping.setdefault(key, value)
    try:
        from_mapping({"model": "m", "data": {"train": "r"}} | mapping)
    except RecipeError as error:
        assert str(error).isprintable() or "\n" in str(error)


@settings(deadline=None)
@given(
    st.lists(
        st.text() | st.sampled_from([*KEYS, *(f"--{key}" for key in KEYS), "adapter.rank=", "lora_r=8", "quant=nf4"])
    )
)
def test_any_overrides_are_a_recipe_or_a_recipe_error(arguments):
    try:
        from_mapping({"model": "m", "data": {"train": "r"}}, overrides=arguments)
    except RecipeError as error:
        assert str(error)


def test_the_schema_matches_the_reader():
    recipe_schema = schema()
    assert recipe_schema["additionalProperties"] is False
    for name, section in SECTIONS.items():
        section_schema = recipe_schema["$defs"][section.__name__]
        assert section_schema["additionalProperties"] is False, name
        assert all(section_schema["properties"][key]["description"] for key in section.model_fields)
    assert recipe_schema["$defs"]["Quant"]["properties"]["kind"]["enum"] == list(QUANTIZERS)
    assert recipe_schema["$defs"]["Adapter"]["properties"]["rank"]["default"] == 16
    assert recipe_schema["required"] == ["model", "data"]


def test_the_schema_has_the_defaults_of_the_reader():
    recipe, _ = from_mapping({"model": "m", "data": {"train": "r"}})
    resolved = parse(dump(recipe), "r").value
    for name, section in SECTIONS.items():
        for key, setting in schema()["$defs"][section.__name__]["properties"].items():
            if key not in getattr(recipe, name).without_effect():  # other kinds read it
                assert "default" not in setting or setting["default"] == resolved[name][key], (name, key)
