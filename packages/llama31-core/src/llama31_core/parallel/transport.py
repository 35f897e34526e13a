"""What a device can send: tensors in, tensors out, with no gradients; which set of operators is chosen by device.

MindSpore's CPU backend has one collective that works in any group: AllReduce, the sum of float32 (AllGather and
Broadcast take the group of all ranks alone). The rest is made of it, by adding zeros: the same numbers, more bytes on
the wire. On Ascend every operation is its own HCCL operator; these are not run on hardware, their arguments are checked
by MindSpore's inference on CPU ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops.operations.comm_ops import NeighborExchange

from llama31_core.parallel.groups import Group

Move = Callable[[Tensor], Tensor]
_zeros_like = ops.ZerosLike()


class EagerTransport(Protocol):
    """What is sent outside graphs: gradients and weights. All members call in the same order with the same shapes."""

    def all_reduce(self, group: Group) -> Move:
        """The sum of all ranks' tensors."""

    def all_gather(self, group: Group) -> Move:
        """All ranks' tensors one after the other along the first axis."""

    def reduce_scatter(self, group: Group) -> Move:
        """The rank's part, along the first axis, of the sum of all ranks' tensors."""


class Transport(EagerTransport, Protocol):
    """Operations over a group of more than one rank. All members call them in the same order with the same shapes."""

    def all_reduce_max(self, group: Group) -> Move:
        """The elementwise maximum of all ranks' tensors."""

    def broadcast(self, group: Group, root: int) -> Move:
        """The tensor of the member with index `root`."""

    def shift(self, group: Group, distance: int) -> Move:
        """The tensor of the member `distance` places before this one, around the ring."""

    def hand_over(self, group: Group, sender: int) -> Move:
        """Within a pair: the tensor of the member with index `sender`; what the other gives says the shape alone."""


def _stack(group: Group) -> Move:
    """Every rank's tensor, one behind the other on a new first axis; integers below 2^24 stay exact."""
    reduce = ops.AllReduce(group=group.name)
    size, index = group.size, group.index

    def stack(x: Tensor) -> Tensor:
        own = x.astype(ms.float32)
        rest = _zeros_like(own)
        parts: tuple[Tensor, ...] = ()
        for place in range(size):
            parts += (own if place == index else rest,)
        return reduce(ops.stack(parts)).astype(x.dtype)

    return stack


def _take(parts: Tensor, place: int) -> Tensor:
    """One part, copied: a graph takes a view outside of graphs, `parts[place]`, for the beginning of what it views."""
    return ops.gather(parts, Tensor(place, ms.int32), 0)


class CpuTransport:
    """All of it out of AllReduce."""

    def all_reduce(self, group: Group) -> Move:
        return ops.AllReduce(group=group.name)  # type: ignore[no-any-return]

    def all_reduce_max(self, group: Group) -> Move:
        stack = _stack(group)
        return lambda x: stack(x).max(axis=0)

    def all_gather(self, group: Group) -> Move:
        stack = _stack(group)
        return lambda x: stack(x).reshape((-1, *x.shape[1:]))

    def reduce_scatter(self, group: Group) -> Move:
        reduce = ops.AllReduce(group=group.name)
        size, index = group.size, group.index
        return lambda x: _take(reduce(x).reshape((size, x.shape[0] // size, *x.shape[1:])), index)

    def broadcast(self, group: Group, root: int) -> Move:
        stack = _stack(group)
        return lambda x: _take(stack(x), root)

    def shift(self, group: Group, distance: int) -> Move:
        return self.broadcast(group, (group.index - distance) % group.size)

    def hand_over(self, group: Group, sender: int) -> Move:
        return self.broadcast(group, sender)


class AscendTransport:
    """HCCL's operators."""

    def all_reduce(self, group: Group) -> Move:
        return ops.AllReduce(group=group.name)  # type: ignore[no-any-return]

    def all_reduce_max(self, group: Group) -> Move:
        return ops.AllReduce(ops.ReduceOp.MAX, group.name)  # type: ignore[no-any-return]

    def all_gather(self, group: Group) -> Move:
        return ops.AllGather(group=group.name)  # type: ignore[no-any-return]

    def reduce_scatter(self, group: Group) -> Move:
        return ops.ReduceScatter(group=group.name)  # type: ignore[no-any-return]

    def broadcast(self, group: Group, root: int) -> Move:
        send = ops.Broadcast(root, group.name)
        return lambda x: send((x,))[0]

    def shift(self, group: Group, distance: int) -> Move:
        to, source = (group.index + distance) % group.size, (group.index - distance) % group.size

        def exchange(x: Tensor) -> Tensor:
            send = NeighborExchange([to], [source], [x.shape], [x.shape], x.dtype, group.name)
            return send((x,))[0]

        return exchange

    def hand_over(self, group: Group, sender: int) -> Move:
        other = 1 - group.index
        if group.index == sender:
            send = ops.Send(sr_tag=0, dest_rank=other, group=group.name)
            return lambda x: ops.depend(x, send(x))

        def receive(x: Tensor) -> Tensor:
            return ops.Receive(sr_tag=0, src_rank=other, shape=x.shape, dtype=x.dtype, group=group.name)(x)

        return receive


def transport() -> Transport:
    """The set for the device that MindSpore is set to."""
    return AscendTransport() if ms.get_context("device_target") == "Ascend" else CpuTransport()
