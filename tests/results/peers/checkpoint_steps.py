"""Print the number of steps that a checkpoint of Lightning has taken; runs in the peer's own environment."""

from __future__ import annotations

import sys

import torch

print(torch.load(sys.argv[1], map_location="cpu", weights_only=False)["global_step"])
