"""The text of a recipe's file: there, UTF-8, and no longer than a recipe can be."""

from pathlib import Path

from qlora.errors import RecipeError, did_you_mean

MAX_BYTES = 2**20  # no recipe is this long; it bounds the time a hostile one can take


def read_text(where: str) -> str:
    """The text of the file `where`. RecipeError if there is no such file, or it is no text of that length."""
    path = Path(where)
    try:
        with path.open("rb") as file:
            return decode(file.read(MAX_BYTES + 1), where)
    except IsADirectoryError:
        raise RecipeError(f"{where}: a folder. A recipe is a YAML file.") from None
    except FileNotFoundError:
        beside = [each.name for pattern in ("*.yaml", "*.yml") for each in path.parent.glob(pattern)]
        known = did_you_mean(path.name, beside) if beside else ""
        raise RecipeError(f"{where}: no such file.{known} `qlora recipes list` shows those that come along.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"{where}: can't be read ({reason}).") from None


def decode(content: bytes, source: str) -> str:
    """The text of a file. RecipeError if it is too long or not UTF-8."""
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{source}: longer than {MAX_BYTES} bytes; that is no recipe.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecipeError(f"{source}:{line}: not UTF-8 text. Save the file as UTF-8.") from None
