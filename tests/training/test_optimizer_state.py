"""Restored optimizer state is where the parameter is: the fused kernels read it through raw pointers."""

import torch
from torch import nn

from qlora.training.optimizers import Adamw, load_state

META = torch.device("meta")  # stands for a GPU


def test_all_restored_state_of_adamw_is_on_the_parameters_device() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, device=META))
    optimizer = Adamw.build([{"params": [parameter], "lr": 1e-3}], (0.9, 0.999), 0.0)
    saved = {"w/step": torch.tensor(4.0), "w/exp_avg": torch.ones(2, 3), "w/exp_avg_sq": torch.ones(2, 3)}
    load_state(optimizer, {"w": parameter}, saved)
    state = optimizer.state[parameter]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert {value.device for value in state.values()} == {META}
