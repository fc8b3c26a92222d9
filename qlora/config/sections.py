"""A section of a recipe: a typed, frozen, strict group of settings.  The only module that imports pydantic.

Types, JSON schema and error messages all come from one declaration, `setting`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator
from pydantic_core import PydanticCustomError, core_schema

from qlora.config.error_messages import UNSET, Schema, problems, shown
from qlora.config.locations import Location, Path, Problem
from qlora.errors import did_you_mean

Between = Field  # Annotated[float, Between(ge=0, lt=1)]: limits of a type nested in another
Validator = AfterValidator  # Annotated[str, Validator(function)]: the function returns the value or raises ValueError
REQUIRED: Any = ...
S = TypeVar("S", bound="Section")


def setting(default: Any, documentation: str, *, nullable: bool = False, **limits: Any) -> Any:
    """One setting: its default (REQUIRED: none), its documentation, its limits as arguments of pydantic's Field.

    `nullable`: other settings can leave it without effect. It reads null as "not set", and is then written as null.
    """
    return Field(default, description=documentation, json_schema_extra=_allow_null if nullable else None, **limits)


class Section(BaseModel):
    """A frozen group of settings. Unknown keys are errors; no type is converted, except whole numbers to floats."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    def without_effect(self) -> Mapping[str, str]:
        """Settings that have no effect given the others: `key: reason`."""
        return {}

    def conflicts(self) -> Mapping[str, str]:
        """Conflicts between valid settings: `key: message`. By default, settings without effect that were set."""
        unused = self.without_effect().items()
        return {key: f"has no effect: {reason}. Remove it." for key, reason in unused if self.is_set(key)}

    def is_set(self, key: str) -> bool:
        """Whether the setting was written, not left at its default."""
        return key in self.model_fields_set

    @model_validator(mode="before")
    @classmethod
    def _normalized(cls, value: Any) -> Any:
        """Without nulls that mean "not set", and with tuples for lists."""
        if not isinstance(value, Mapping):
            return value
        fields = cls.model_fields
        nullable = {key for key in value if key in fields and fields[key].json_schema_extra is _allow_null}
        settings = {key: item for key, item in value.items() if item is not None or key not in nullable}
        return {key: tuple(item) if isinstance(item, list) else item for key, item in settings.items()}

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> "Section":
        conflicts = self.conflicts()
        if conflicts:
            text = "; ".join(f"{key}: {message}" for key, message in conflicts.items())
            raise PydanticCustomError("conflict", "{text}", {"text": text, "conflicts": conflicts})
        return self

    @model_serializer(mode="wrap")
    def _serialized(self, serialize: Callable[["Section"], dict[str, Any]]) -> dict[str, Any]:
        """Settings without effect are written as null."""
        return serialize(self) | dict.fromkeys(self.without_effect())


class KindOf:
    """Annotated[str, KindOf(TABLE, "auto")]: a kind of the table, or one of the other words."""

    def __init__(self, table: Iterable[str], *others: str) -> None:
        self.words = (*others, *table)

    def check(self, word: str) -> str:
        """The word, if it is known, else ValueError."""
        if word not in self.words:
            raise ValueError(f"no {shown(word)}.{did_you_mean(word, self.words)}")
        return word

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Schema:
        return {"enum": [*self.words]}


@dataclass(frozen=True)
class Shorthand:
    """Annotated[Model, Shorthand("name")]: a text is shorthand for {name: text}."""

    key: str

    def expand(self, value: Any) -> Any:
        """The long form of a value."""
        return {self.key: value} if isinstance(value, str) else value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self.expand, handler(source))

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Schema:
        return {"anyOf": [{"type": "string"}, handler(core)]}


class OneOrMany(Shorthand):
    """Annotated[tuple[Source, ...], OneOrMany("path")]: one value or a list, each in long form or shorthand."""

    def expand(self, value: Any) -> Any:
        """The tuple of long forms."""
        if isinstance(value, (list, tuple)):
            return tuple(super(OneOrMany, self).expand(item) for item in value)
        return (super().expand(value),) if isinstance(value, (str, Mapping, Section)) else value

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Schema:
        many = handler(core)
        one = [{"type": "string"}, many["items"]]
        return {"anyOf": [*one, many | {"items": {"anyOf": one}}]}


def validate(section: type[S], value: Any, locate: Callable[[Path], Location]) -> tuple[S | None, list[Problem]]:
    """The section made from `value`, or its problems, each at the location of its setting."""
    try:
        return section.model_validate(value), []
    except ValidationError as error:
        schema = _schema(section)
        messages = [message for details in error.errors() for message in problems(dict(details), schema)]
    parents = {path[:size] for path, _ in messages for size in range(len(path))}  # they repeat the problem inside
    return None, [(locate(path), text) for path, text in messages if path not in parents]


@cache
def _schema(section: type[Section]) -> Schema:
    return section.model_json_schema()


def _allow_null(schema: Schema) -> None:
    """Allow null in a setting's JSON schema."""
    kept = {key: schema.pop(key) for key in [*schema] if key not in ("default", "description", "title", "examples")}
    schema["anyOf"] = [*kept.get("anyOf", [kept]), UNSET]
