"""`qlora doctor`: what works, a remedy for each problem, and a block for an issue with all versions."""

from support.command_line import qlora

from qlora.runs.doctor import SHOWN, report_lines

GPU = {"name": "A GPU", "capability": "7.5", "bf16": False, "total_bytes": 8 * 2**30, "free_bytes": 2**30}


def test_the_block_for_an_issue_has_all_versions_and_devices() -> None:
    report = qlora("doctor", "--json").json
    result = qlora("doctor")
    assert result.code == 0 and result.out == ""
    block = result.err.split("```")[1]
    assert all(f"{name} {report[name]}" in block for name in ("qlora", *SHOWN))
    assert all(device["name"] in block for device in report["devices"]) and "GiB of host memory" in block


def test_each_problem_is_a_line_with_its_remedy() -> None:
    report = qlora("doctor", "--json").json
    lines = report_lines(report | {"devices": [GPU], "problems": ["a: do this", "b: do that"], "four_bit": False})
    assert "problem  a: do this" in lines and "problem  b: do that" in lines
    assert any("no bfloat16" in line and "1.0 GiB of 8.0 GiB free" in line for line in lines)
    assert not any(line.startswith("works    bitsandbytes") for line in lines)
