"""When two trainings taught the same, and the plain one that ours are compared with."""

import torch
from safetensors.torch import load_file

from selfguide_ray.tuning.pairs import IGNORED

SHARE = 5e-3  # of a tensor's norm


def adapter(run, task):
    """A published adapter's tensors."""
    return load_file(f"{run.root}/models/{task}/adapter_model.safetensors")


def assert_alike(one, other):
    """Equal but for rounding. AdamW turns the sign of a gradient that is nearly nought into a step, so norms are compared."""
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).norm() <= SHARE * other[name].norm(), name


def assert_equal(one, other):
    """Equal bit for bit."""
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


def plain_step(model, optimizer, tokenizer, rows, clip):
    """One step of plain torch on rows of `trainset`, pair by pair; returns the summed loss and the answers' tokens."""
    total, count = 0.0, 0
    for row in rows:
        prompt, answer = tokenizer.encode(row["prompt"]), tokenizer.encode(row["completion"])
        labels = torch.tensor([[IGNORED] * len(prompt) + answer])
        total = total + model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss * len(answer)
        count += len(answer)
    (total / count).backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    optimizer.zero_grad()
    return total.item(), count
