"""`qlora doctor`: what works, a remedy for what does not, and a block for an issue that names every version."""

from support.command_line import qlora

from qlora.runs.doctor import SHOWN, as_lines

CARD = {"name": "Card", "capability": "7.5", "bf16": False, "total_bytes": 8 * 2**30, "free_bytes": 2**30}


def test_the_block_for_an_issue_names_every_version_and_the_devices() -> None:
    found = qlora("doctor", "--json").json
    said = qlora("doctor")
    assert said.code == 0 and said.out == ""
    block = said.err.split("```")[1]
    assert all(f"{name} {found[name]}" in block for name in ("qlora", *SHOWN))
    assert all(device["name"] in block for device in found["devices"]) and "GiB of main memory" in block


def test_each_problem_stands_in_a_line_of_its_own_with_what_to_do() -> None:
    found = qlora("doctor", "--json").json
    lines = as_lines(found | {"devices": [CARD], "problems": ["a: do this", "b: do that"], "four_bit": False})
    assert "problem  a: do this" in lines and "problem  b: do that" in lines
    assert any("no bfloat16" in line and "1.0 GiB of 8.0 GiB free" in line for line in lines)
    assert not any(line.startswith("works    bitsandbytes") for line in lines)
