"""Groups of ranks that talk to one another: a mesh and a rank in, MindSpore communication groups out."""

from __future__ import annotations

from dataclasses import dataclass

from llama31_core.parallel.mesh import AXES, Axis, ParallelConfig


@dataclass(frozen=True)
class Group:
    """Ranks in an order that all of them agree on.

    Attributes:
        ranks: in the order of their parts.
        index: the caller's place among them.
        name: MindSpore's name of the group; "" for a rank by itself, which needs none.
    """

    ranks: tuple[int, ...]
    index: int
    name: str

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return self.size == 1


ALONE = Group((0,), 0, "")


def plan_groups(parallel: ParallelConfig, rank: int, n_kv_heads: int) -> list[tuple[int, ...]]:
    """Every group of two ranks or more that a rank is in, in an order that all ranks share.

    Making a group waits for its members; as each rank goes through its own in this order, none waits for one that waits
    for it.
    """
    mesh = _Mesh(parallel, rank, n_kv_heads)
    axes = [mesh.axis(axis) for axis in AXES]
    stages = mesh.axis("pp")
    pairs = [mesh.pair(stage) for stage in range(len(stages)) if stages[stage] != rank]
    groups = [*axes, *pairs, mesh.ends(), mesh.kv_copies(), tuple(range(parallel.world_size))]
    return sorted({group for group in groups if len(set(group)) > 1 and rank in group})


@dataclass(frozen=True)
class _Mesh:
    """Members of the groups of one rank."""

    parallel: ParallelConfig
    rank: int
    n_kv_heads: int

    def axis(self, axis: Axis) -> tuple[int, ...]:
        return tuple(self.parallel.group(axis, self.rank))

    def kv_copies(self) -> tuple[int, ...]:
        tp = self.axis("tp")
        copies = max(1, self.parallel.tp // self.n_kv_heads)
        first = self.parallel.coordinates(self.rank).tp // copies * copies
        return tp[first : first + copies]

    def ends(self) -> tuple[int, ...]:
        stages = self.axis("pp")
        return (stages[0], stages[-1])

    def pair(self, stage: int) -> tuple[int, ...]:
        return tuple(sorted((self.rank, self.axis("pp")[stage])))


class Groups:
    """The groups of one rank of a mesh. All ranks of the mesh must make theirs at the same point of a program."""

    def __init__(self, parallel: ParallelConfig, rank: int, n_kv_heads: int) -> None:
        self.parallel = parallel
        self.rank = rank
        self.at = parallel.coordinates(rank)
        self._mesh = _Mesh(parallel, rank, n_kv_heads)
        self._names = {members: _name(members) for members in plan_groups(parallel, rank, n_kv_heads)}

    def axis(self, axis: Axis) -> Group:
        """The ranks that differ from this one on `axis` alone."""
        return self._of(self._mesh.axis(axis))

    def world(self) -> Group:
        """All ranks of the mesh."""
        return self._of(tuple(range(self.parallel.world_size)))

    def kv_copies(self) -> Group:
        """The neighbours on the tp axis that hold the same key-value head."""
        return self._of(self._mesh.kv_copies())

    def ends(self) -> Group:
        """The first and the last stage, which both hold a tied embedding."""
        return self._of(self._mesh.ends())

    def pair(self, stage: int) -> Group:
        """This rank and the one in its place on another pipeline stage, the lower rank first."""
        return self._of(self._mesh.pair(stage))

    def _of(self, members: tuple[int, ...]) -> Group:
        if len(set(members)) == 1:
            return Group(members[:1], 0, "")
        return Group(members, members.index(self.rank), self._names[members])


def world_group(parallel: ParallelConfig, rank: int) -> Group:
    """All ranks of the mesh, before `Groups` are made."""
    members = tuple(range(parallel.world_size))
    return Group(members, rank, _name(members) if len(members) > 1 else "")


_made: set[str] = set()  # MindSpore refuses to make a group twice in a process


def _name(members: tuple[int, ...]) -> str:
    from mindspore.communication import GlobalComm, create_group, get_group_size  # MindSpore: seconds to import

    if members == tuple(range(get_group_size())):
        world: str = GlobalComm.WORLD_COMM_GROUP
        return world
    name = "ranks_" + "_".join(map(str, members))
    if name not in _made:
        create_group(name, list(members))
        _made.add(name)
    return name
