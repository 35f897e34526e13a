"""Collectives with gradients: cells that the parallel layers put between shards; over a group of one they do nothing.

Each names what its forward does; its backward is the transposed map for a value that is whole on every rank, or split
(Megatron-LM, Shoeybi et al. 2019, section 3: f and g; Korthikanti et al. 2022, section 4.2: g and its conjugate):

    Copy        forward nothing,         backward sums over the group         (f)
    Sum         forward sums,            backward nothing                     (g)
    GatherTokens    forward all-gathers tokens,      backward reduce-scatters   (sequence parallel, into a split layer)
    ScatterTokens   forward reduce-scatters tokens,  backward all-gathers       (sequence parallel, out of one)

Shapes: tokens are the second axis, as in (B, T, E).
"""

from __future__ import annotations

from mindspore import Tensor, nn

from llama31_core.parallel.groups import Group
from llama31_core.parallel.transport import transport


class Identity(nn.Cell):  # type: ignore[misc]
    """Nothing: what every collective is over a group of one rank."""

    def construct(self, x: Tensor) -> Tensor:
        """x."""
        return x


class _Copy(nn.Cell):  # type: ignore[misc]
    def __init__(self, group: Group) -> None:
        super().__init__()
        self._sum = transport().all_reduce(group)

    def construct(self, x: Tensor) -> Tensor:
        return x

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (self._sum(dout),)


class _Sum(nn.Cell):  # type: ignore[misc]
    def __init__(self, group: Group) -> None:
        super().__init__()
        self._sum = transport().all_reduce(group)

    def construct(self, x: Tensor) -> Tensor:
        return self._sum(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (dout,)


class _GatherTokens(nn.Cell):  # type: ignore[misc]
    def __init__(self, group: Group) -> None:
        super().__init__()
        self._gather = TokenGather(group)
        self._scatter = TokenScatter(group)

    def construct(self, x: Tensor) -> Tensor:
        return self._gather(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (self._scatter(dout),)


class _ScatterTokens(nn.Cell):  # type: ignore[misc]
    def __init__(self, group: Group) -> None:
        super().__init__()
        self._gather = TokenGather(group)
        self._scatter = TokenScatter(group)

    def construct(self, x: Tensor) -> Tensor:
        return self._scatter(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (self._gather(dout),)


class TokenGather(nn.Cell):  # type: ignore[misc]
    """(B, T / n, E) of every rank to (B, T, E)."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self._size = group.size
        self._gather = transport().all_gather(group)

    def construct(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self._gather(x).reshape(self._size, batch, tokens, width)
        return parts.transpose(1, 0, 2, 3).reshape(batch, self._size * tokens, width)


class TokenScatter(nn.Cell):  # type: ignore[misc]
    """(B, T, E) to the rank's (B, T / n, E) of the sum over the ranks."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self._size = group.size
        self._scatter = transport().reduce_scatter(group)

    def construct(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = x.reshape(batch, self._size, tokens // self._size, width).transpose(1, 0, 2, 3)
        return self._scatter(parts.reshape(self._size * batch, tokens // self._size, width))


def copy(group: Group) -> nn.Cell:
    """Into a split computation of something that every rank has whole."""
    return Identity() if group.is_alone else _Copy(group)


def sum_of(group: Group) -> nn.Cell:
    """Out of a split computation: the sum of the ranks' shares, whole on every rank."""
    return Identity() if group.is_alone else _Sum(group)


def gather_tokens(group: Group) -> nn.Cell:
    """Into a split computation of something of which every rank has some tokens."""
    return Identity() if group.is_alone else _GatherTokens(group)


def scatter_tokens(group: Group) -> nn.Cell:
    """Out of a split computation: the rank's tokens of the sum of the ranks' shares."""
    return Identity() if group.is_alone else _ScatterTokens(group)
