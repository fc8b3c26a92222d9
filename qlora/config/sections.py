"""What a section of a recipe is: typed, frozen, and strict.  Door: pydantic.

Types, JSON schema and error messages all come from one declaration, `setting`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator
from pydantic_core import PydanticCustomError, core_schema

from qlora.config.error_messages import UNSAID, Schema, problems, shown
from qlora.config.locations import Path, Place, Problem
from qlora.errors import did_you_mean

Between = Field  # Annotated[float, Between(ge=0, lt=1)]: limits of a type inside another
Rule = AfterValidator  # Annotated[str, Rule(function)]: the function gives the value back, or raises ValueError
REQUIRED: Any = ...
S = TypeVar("S", bound="Section")


def setting(default: Any, documentation: str, *, unsaid: bool = False, **limits: Any) -> Any:
    """One setting: its default (REQUIRED: none), its documentation, its limits as pydantic's Field takes them.

    `unsaid`: the setting can be idle beside others; there it reads null as "not said", and is written as null.
    """
    return Field(default, description=documentation, json_schema_extra=_or_null if unsaid else None, **limits)


class Section(BaseModel):
    """A frozen group of settings: no unknown keys, no conversions but whole numbers where any number will do."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def idle(self) -> Mapping[str, str]:
        """The settings that have no effect beside the others, each with the reason."""
        return {}

    def clashes(self) -> Mapping[str, str]:
        """What is wrong with settings that are right one by one: `key: message`. Idle settings that were written."""
        return {key: f"has no effect: {why}. Remove it." for key, why in self.idle().items() if self.wrote(key)}

    def wrote(self, key: str) -> bool:
        """Whether the setting was given, rather than left at its default."""
        return key in self.model_fields_set

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        fields = cls.model_fields
        unsaid = {key for key in value if key in fields and fields[key].json_schema_extra is _or_null}
        said = {key: each for key, each in value.items() if each is not None or key not in unsaid}
        return {key: tuple(each) if isinstance(each, list) else each for key, each in said.items()}

    @model_validator(mode="after")
    def _without_clashes(self) -> "Section":
        clashes = self.clashes()
        if clashes:
            text = "; ".join(f"{key}: {message}" for key, message in clashes.items())
            raise PydanticCustomError("clash", "{text}", {"text": text, "clashes": clashes})
        return self

    @model_serializer(mode="wrap")
    def _as_read(self, plain: Callable[["Section"], dict[str, Any]]) -> dict[str, Any]:
        return plain(self) | dict.fromkeys(self.idle())


class KindOf:
    """Annotated[str, KindOf(TABLE, "auto")]: a word of the table, or one of the others."""

    def __init__(self, table: Iterable[str], *others: str) -> None:
        self.words = (*others, *table)

    def check(self, word: str) -> str:
        """The word itself, if it is known."""
        if word not in self.words:
            raise ValueError(f"no {shown(word)}.{did_you_mean(word, self.words)}")
        return word

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Schema:
        return {"enum": [*self.words]}


@dataclass(frozen=True)
class Short:
    """Annotated[Model, Short("name")]: a text is short for {name: text}."""

    key: str

    def long(self, value: Any) -> Any:
        """The long form of what was written."""
        return {self.key: value} if isinstance(value, str) else value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self.long, handler(source))

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Schema:
        return {"anyOf": [{"type": "string"}, handler(core)]}


class OneOrMany(Short):
    """Annotated[tuple[Source, ...], OneOrMany("path")]: one or a list of them, each perhaps in its short form."""

    def long(self, value: Any) -> Any:
        """The tuple of long forms."""
        if isinstance(value, (list, tuple)):
            return tuple(super(OneOrMany, self).long(each) for each in value)
        return (super().long(value),) if isinstance(value, (str, Mapping, Section)) else value

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Schema:
        many = handler(core)
        one = [{"type": "string"}, many["items"]]
        return {"anyOf": [*one, many | {"items": {"anyOf": one}}]}


def validate(section: type[S], value: Any, place: Callable[[Path], Place]) -> tuple[S | None, list[Problem]]:
    """The section that `value` says, or else what is wrong with it, each problem at the place of its setting."""
    try:
        return section.model_validate(value), []
    except ValidationError as error:
        schema = _schema(section)
        wrong = [problem for each in error.errors() for problem in problems(dict(each), schema)]
    around = {path[:size] for path, _ in wrong for size in range(len(path))}  # these only repeat what is wrong inside
    return None, [(place(path), text) for path, text in wrong if path not in around]


@cache
def _schema(section: type[Section]) -> Schema:
    return section.model_json_schema()


def _or_null(schema: Schema) -> None:
    """Let a setting's JSON schema take null too."""
    kept = {key: schema.pop(key) for key in [*schema] if key not in ("default", "description", "title", "examples")}
    schema["anyOf"] = [*kept.get("anyOf", [kept]), UNSAID]
