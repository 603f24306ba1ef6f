"""What only eager mode on a CPU does, and how torch.compile passes it by.

A graph cannot hold NumPy, MKL or loops over how many rows an expert has. What needs them is either
written twice, the plain form for graphs, or is opaque: a node that a graph calls as it is.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**18  # numbers of a block: a few stay in cache together, and all cores have work


def on_cpu(x: Tensor) -> bool:
    """Whether x has its numbers here and now, so that NumPy can see them."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def opaque(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function of tensors one node of a graph; `fake` makes empty results of its shapes.

    What it returns must be new tensors. Eager mode calls the function itself, which costs less.
    """
    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        node = torch.library.custom_op(f"fira::{function.__name__}", function, mutates_args=())
        node.register_fake(fake)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return (node if torch.compiler.is_compiling() else function)(*args)
        return call
    return wrap


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Cut so many rows of so many numbers into blocks that stay in cache between operations."""
    size = max(1, BLOCK // width)
    for first in range(0, rows, size):
        yield slice(first, first + size)
