"""Backends of `random_walk`."""

from cc4s_kernels import backends
from cc4s_kernels.ops.random_walk import reference

backends.register("random_walk", "reference", reference.random_walk)
