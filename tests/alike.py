"""When two trainings taught the same."""

from safetensors.torch import load_file

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
