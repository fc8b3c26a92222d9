"""The text of a recipe's file: it exists, is UTF-8, and is no longer than a recipe can be."""

from pathlib import Path

from qlora.errors import RecipeError, did_you_mean

MAX_BYTES = 2**20  # no recipe is this long; it bounds the time that a hostile one can take


def read_text(name: str) -> str:
    """The text of the file `name`. RecipeError if there is no such file, or its content is not such a text."""
    path = Path(name)
    try:
        with path.open("rb") as file:
            return decode(file.read(MAX_BYTES + 1), name)
    except IsADirectoryError:
        raise RecipeError(f"{name}: a folder. A recipe is a YAML file.") from None
    except FileNotFoundError:
        neighbors = [file.name for pattern in ("*.yaml", "*.yml") for file in path.parent.glob(pattern)]
        known = did_you_mean(path.name, neighbors) if neighbors else ""
        raise RecipeError(f"{name}: no such file.{known} `qlora recipes list` shows the included ones.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"{name}: can't be read ({reason}).") from None


def decode(content: bytes, source: str) -> str:
    """The text of a file. RecipeError if it is too long or not UTF-8."""
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{source}: longer than {MAX_BYTES} bytes; a recipe is shorter.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecipeError(f"{source}:{line}: not UTF-8 text. Save the file as UTF-8.") from None
