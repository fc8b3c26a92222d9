"""Settings of torch's CUDA allocator, made before torch allocates. Imports no torch."""

import os
import sys
from collections.abc import MutableMapping

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the name since torch 2.9, and the old one
EXPANDABLE = "expandable_segments:True"


def use_expandable_segments(environment: MutableMapping[str, str] = os.environ, platform: str = sys.platform) -> bool:
    """Let segments grow in place of new ones: sequences of many lengths would fragment the memory otherwise.

    The plan's reserve of 4 % counts on it. False where the user has set the allocator, and on Windows and WSL, whose
    drivers do not support it.
    """
    is_wsl = "WSL_DISTRO_NAME" in environment
    if platform != "linux" or is_wsl or any(name in environment for name in VARIABLES):
        return False
    environment[VARIABLES[0]] = EXPANDABLE
    return True
