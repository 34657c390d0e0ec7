"""The comparison of checkpoints, for the tests and for kills.py."""
import torch


def same(a, b):
    """Whether two contents of checkpoints hold the same bits."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
