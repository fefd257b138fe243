"""Programs for tests of the engine, compiled once: compiling takes longer than what is tested."""

import functools

import torch

from tests.helpers.bilevel import compiled


def program(**options):
    """Return a plan and its two problems, as `compiled` does, at the beginning; options as for `make`."""
    made, beginning = _compiled(tuple(options.items()))
    made[0].load_state_dict(beginning)
    return made


@functools.cache
def _compiled(options):
    torch.manual_seed(0)
    made = compiled(**dict(options))
    return made, made[0].state_dict()
