"""The lowest version of every runtime dependency that pyproject.toml allows, one requirement a line, for pip.

python scripts/lowest_versions.py [NAME ...] > lowest.txt      # without the named packages
"""

import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest(requirement: str) -> str:
    """`name==version` of a requirement `name>=version,...`."""
    name, _, rest = requirement.partition(">=")
    if not rest:
        raise SystemExit(f"pyproject.toml: {requirement!r} has no lowest version. Write it as name>=version.")
    return f"{name.strip()}=={rest.split(',')[0].strip()}"


if __name__ == "__main__":
    requirements = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    lines = [lowest(requirement) for requirement in requirements]
    print("\n".join(line for line in lines if line.partition("==")[0] not in sys.argv[1:]))
