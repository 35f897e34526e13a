"""Ring attention: every rank has some tokens of each sequence, and keys and values go round a ring of ranks.

Partial softmaxes are merged as they come (Liu et al. 2023, Ring Attention; Dao et al. 2022, FlashAttention, section
3.1). Neither forward nor backward holds the scores of more than one step. What each step computes is planned in
sequence.py.

Collectives of one graph depend on one another, so that all ranks come to them in one order: their graphs differ.

Shapes: B sequences, T tokens of the rank (half of them in each piece), H query heads, K key-value heads, D width of a
head, G = H / K, t queries and s keys of a step.
"""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, nn, ops

from llama31_core.parallel.groups import Group
from llama31_core.parallel.sequence import Pieces, plan_ring
from llama31_core.parallel.transport import transport
from llama31_core.training.masks import HIDDEN


class RingAttention(nn.Cell):  # type: ignore[misc]
    """Causal attention within packed sequences, in the place of `BlockwiseAttention`.

    Context: the biases of `sequence.ring_biases`, one after another.

    Args:
        group: the cp group, of two ranks or more.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        steps = plan_ring(group.index, group.size)
        self._queries = tuple(step.queries for step in steps)
        self._keys = tuple(step.keys for step in steps)
        self._size = group.size
        self._shift = transport().shift(group, 1)
        self._product = ops.BatchMatMul()
        self._product_tb = ops.BatchMatMul(transpose_b=True)
        self._product_ta = ops.BatchMatMul(transpose_a=True)

    def construct(
        self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, positions_BT: Tensor, *biases_Bts: Tensor
    ) -> Tensor:
        """Mixed values of shape (B, T, H * D)."""
        batch, tokens, heads, width = q_BTHD.shape
        q = self._by_kv_head(q_BTHD, k_BTKD.shape[2]) * (1.0 / math.sqrt(width))
        kv = ops.stack((self._by_head(k_BTKD), self._by_head(v_BTKD)))
        out = ops.zeros_like(q)
        logsumexp = ops.zeros(q.shape[:-1], ms.float32) + HIDDEN
        for step in range(self._size):
            keys, values = _take(self._keys[step], kv[0], 2), _take(self._keys[step], kv[1], 2)
            scores = self._scores(_take(self._queries[step], q, 3), keys, biases_Bts[step])
            seen, seen_logsumexp = self._softmax(scores, values)
            more = _pad(self._queries[step], seen, 3, 0.0)
            more_logsumexp = _pad(self._queries[step], seen_logsumexp, 3, HIDDEN)
            merged = _merge(logsumexp, more_logsumexp)
            share = ops.exp(logsumexp - merged).expand_dims(-1)
            out = out * share + more * ops.exp(more_logsumexp - merged).expand_dims(-1)
            logsumexp = merged
            if step + 1 < self._size:
                kv = self._shift(kv)
        return out.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads * width).astype(q_BTHD.dtype)

    def gradients(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        out_BTE: Tensor,
        d_out_BTE: Tensor,
        positions_BT: Tensor,
        *biases_Bts: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, given the output and its gradient (E = H * D).

        Keys go round once for the logsumexps, which are not kept, then keys, values and what they have gathered.
        """
        width, kv_heads = q_BTHD.shape[3], k_BTKD.shape[2]
        scale = 1.0 / math.sqrt(width)
        q = self._by_kv_head(q_BTHD, kv_heads) * scale
        own_keys = self._by_head(k_BTKD)
        d_out = self._by_kv_head(d_out_BTE.reshape(q_BTHD.shape), kv_heads)
        out = self._by_kv_head(out_BTE.reshape(q_BTHD.shape), kv_heads).astype(ms.float32)
        d_out_sums = (d_out * out).sum(axis=-1)
        logsumexp = self._all_logsumexps(q, own_keys, biases_Bts)
        kv = ops.depend(ops.stack((own_keys, self._by_head(v_BTKD))), logsumexp)
        dq, dkv = ops.zeros_like(q), ops.zeros_like(kv)
        for step in range(self._size):
            own, others = self._queries[step], self._keys[step]
            keys, values = _take(others, kv[0], 2), _take(others, kv[1], 2)
            own_q, own_d_out = _take(own, q, 3), _take(own, d_out, 3)
            scores = self._scores(own_q, keys, biases_Bts[step])
            weights = ops.exp(scores - _take(own, logsumexp, 3).expand_dims(-1))
            d_weights = self._product_tb(_flat(own_d_out), values).reshape(weights.shape)
            d_scores = (weights * (d_weights - _take(own, d_out_sums, 3).expand_dims(-1))).astype(q.dtype)
            dq = dq + _pad(own, self._product(_flat(d_scores), keys).reshape(own_q.shape), 3, 0.0)
            dk = self._product_ta(_flat(d_scores), _flat(own_q))
            dv = self._product_ta(_flat(weights).astype(q.dtype), _flat(own_d_out))
            dkv = dkv + _pad(others, ops.stack((dk, dv)), 3, 0.0)
            # What keys have gathered goes round with them, and is home again after the last step.
            if step + 1 < self._size:
                kv = self._shift(kv)
                dkv = ops.depend(dkv, kv)
            dkv = self._shift(dkv)
            kv = ops.depend(kv, dkv)
        dq_BTHD = dq.transpose(0, 3, 1, 2, 4).reshape(q_BTHD.shape) * scale
        return dq_BTHD, self._by_head(dkv[0]), self._by_head(dkv[1])

    def _all_logsumexps(self, q: Tensor, keys: Tensor, biases_Bts: tuple[Tensor, ...]) -> Tensor:
        logsumexp = ops.zeros(q.shape[:-1], ms.float32) + HIDDEN
        for step in range(self._size):
            seen = _take(self._keys[step], keys, 2)
            scores = self._scores(_take(self._queries[step], q, 3), seen, biases_Bts[step])
            greatest = scores.max(axis=-1)
            more = greatest + ops.log(ops.exp(scores - greatest.expand_dims(-1)).sum(axis=-1))
            logsumexp = _merge(logsumexp, _pad(self._queries[step], more, 3, HIDDEN))
            if step + 1 < self._size:
                keys = self._shift(keys)
        return logsumexp

    def _scores(self, q_BKGtD: Tensor, k_BKsD: Tensor, bias_Bts: Tensor) -> Tensor:
        """(B, K, G, t, s), masked."""
        batch, kv_heads, group, tokens, _ = q_BKGtD.shape
        shape = (batch, kv_heads, group, tokens, k_BKsD.shape[2])
        scores = self._product_tb(_flat(q_BKGtD), k_BKsD).astype(ms.float32).reshape(shape)
        return scores + bias_Bts.expand_dims(1).expand_dims(1)

    def _softmax(self, scores: Tensor, v_BKsD: Tensor) -> tuple[Tensor, Tensor]:
        """Values weighted by the softmax of these scores alone, and their logsumexps."""
        greatest = scores.max(axis=-1)
        weights = ops.exp(scores - greatest.expand_dims(-1))
        total = weights.sum(axis=-1)
        mixed = self._product(_flat(weights).astype(v_BKsD.dtype), v_BKsD).reshape((*scores.shape[:-1], -1))
        return mixed / total.expand_dims(-1), greatest + ops.log(total)

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, T, K, D) to (B, K, T, D) and back."""
        return x.transpose(0, 2, 1, 3)

    def _by_kv_head(self, x_BTHD: Tensor, kv_heads: int) -> Tensor:
        """(B, K, G, T, D)."""
        batch, tokens, heads, width = x_BTHD.shape
        return x_BTHD.reshape(batch, tokens, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)


def _take(which: Pieces, x: Tensor, axis: int) -> Tensor:
    """These pieces of the tokens, which are the axis `axis`."""
    half = x.shape[axis] // 2
    rest = len(x.shape) - axis - 1
    begin = (*((0,) * axis), which[0] * half, *((0,) * rest))
    size = (*x.shape[:axis], (which[1] - which[0]) * half, *x.shape[axis + 1 :])
    return ops.slice(x, begin, size)


def _pad(which: Pieces, x: Tensor, axis: int, value: float) -> Tensor:
    """x with the piece that `which` leaves out filled with `value`."""
    padded = x
    if which[1] == 1:
        padded = ops.cat((x, ops.zeros_like(x) + value), axis)
    elif which[0] == 1:
        padded = ops.cat((ops.zeros_like(x) + value, x), axis)
    return padded


def _flat(x: Tensor) -> Tensor:
    """(B, K, G, t, ...) to (B, K, G * t, ...)."""
    batch, heads, group, tokens, width = x.shape
    return x.reshape(batch, heads, group * tokens, width)


def _merge(logsumexp: Tensor, more: Tensor) -> Tensor:
    """Logsumexps over two sets of keys to those over both."""
    greatest = ops.maximum(logsumexp, more)
    return greatest + ops.log(ops.exp(logsumexp - greatest) + ops.exp(more - greatest))
