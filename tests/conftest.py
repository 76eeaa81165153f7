"""What all tests share: one torch thread and a fixed seed."""

import os

# Micro-models are many times slower with a second thread on busy cores; subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
