"""Warm-up checkpoints: the model that every run of a task starts from, made once and kept."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.study.tasks import SLIPS, TASKS, TOKENIZER
from services.make_model import WARMUP_STEPS, make_config, warm_up

STEPS = {"running_sums": WARMUP_STEPS, "sorting": 2 * WARMUP_STEPS, "scratchpad_addition": 2000}
"""Supervised steps: until the model is as good as its noisy teacher."""


def checkpoint(directory: Path, task: str, seed: int) -> Path:
    """Return the model directory of a warm-up, made if it is not there. Same seed, same machine, same weights."""
    path = directory / f"{task}-{seed}"
    if not path.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(TOKENIZER), dtype=torch.float32)
        rng = np.random.default_rng(seed)
        warm_up(model, TASKS[task](), steps=STEPS[task], rng=rng, slip_probability=SLIPS[task])
        made = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=directory))  # whole, or not there: runs share it
        TOKENIZER.save_pretrained(made)
        model.save_pretrained(made)
        try:
            made.rename(path)
        except OSError:
            if not path.is_dir():
                raise
            shutil.rmtree(made)  # another run was first
    return path
