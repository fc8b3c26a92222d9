"""Trained tokens per second of packing against padding: one small Llama, our loop's own step, the same rows.

python benchmarks/packing.py writes results/packing.json. Padding is what trainers do without packing: shuffled rows in
micro-batches, each padded to its longest.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.adapters.inject import inject
from qlora.adapters.lora import Lora
from qlora.base.attention import NAME
from qlora.data.batches import collate, micro_batches, rows_of_step
from qlora.data.packing import pack
from qlora.data.types import IGNORED, Example
from qlora.train.loss import TokenLoss
