"""The end of the model in training: hidden states and labels in, loss and gradients out, a chunk of tokens at a time.

Only tokens whose label is trained on are computed, and logits exist for one chunk: with 128,256 entries in the
vocabulary those of a whole sequence of 8,192 tokens would take 4.2 GB, and as much again for their gradient.

Shapes: N tokens (all of a batch), C tokens of a chunk, E = dim, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from llama31_core.model import Llama
from llama31_core.training.batch import IGNORED_LABEL
from llama31_core.training.native_products import NativeProducts


@dataclass(frozen=True)
class Objective:
    """What is minimised: cross-entropy with smoothed labels, and a penalty on the size of the logits.

    Attributes:
        label_smoothing: share of a label that is spread over the whole vocabulary (Szegedy et al. 2016, section 7).
        z_loss: factor of logsumexp(logits)^2 (Chowdhery et al. 2022, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


def label_chunks(
    labels_N: npt.NDArray[np.int32], size: int
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]:
    """Places and labels (C,) of the tokens that are trained on; the last chunk is filled up with ignored labels."""
    places = np.flatnonzero(labels_N != IGNORED_LABEL).astype(np.int32)
    for start in range(0, len(places), size):
        chunk = places[start : start + size]
        filling = size - len(chunk)
        labels = np.pad(labels_N[chunk], (0, filling), constant_values=IGNORED_LABEL)
        yield np.pad(chunk, (0, filling)), labels


class Vocabulary(nn.Cell):  # type: ignore[misc]
    """The rows of the output matrix that are here: all of them. A layout that splits them brings its own.

    Attributes:
        num_parts: into how many equal parts the vocabulary is split.
    """

    num_parts = 1

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self._log_softmax = ops.LogSoftmax(-1)

    def log_softmax(self, logits_CV: Tensor) -> Tensor:
        """Log-probabilities, over the whole vocabulary, of the rows that are here."""
        return self._log_softmax(logits_CV)

    def rows(self, labels_C: Tensor) -> Tensor:
        """The label's row among those here; any row for labels that are not here."""
        return ops.maximum(labels_C, ops.zeros_like(labels_C))

    def is_here(self, labels_C: Tensor) -> Tensor:
        """1.0 for labels whose rows are here, else 0.0."""
        return ops.ones_like(labels_C).astype(ms.float32)

    def total(self, x_C: Tensor) -> Tensor:
        """The sum over all parts of the vocabulary."""
        return x_C


class HeadLoss(nn.Cell):  # type: ignore[misc]
    """Loss of one chunk, summed over its labels. `products` multiply with the output matrix; else MindSpore does."""

    def __init__(
        self,
        llama: Llama,
        objective: Objective,
        vocabulary: Vocabulary | None = None,
        products: NativeProducts | None = None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.vocabulary = vocabulary or Vocabulary()
        self.norm = llama.model.norm_out
        head = llama.lm_head
        self.weight: Parameter = llama.model.tok_embeddings.embedding_weight if head is None else head.weight
        self._smoothing, self._z_loss = objective.label_smoothing, objective.z_loss
        self._product = ops.MatMul()
        self.products = products
        self._product_tb = ops.MatMul(transpose_b=True) if products is None else products.linear

    def construct(self, x_NE: Tensor, places_C: Tensor, labels_C: Tensor) -> Tensor:
        """Summed loss of the labels."""
        return self.compute(ops.gather(x_NE, places_C, 0), labels_C)[0]

    def compute(self, x_CE: Tensor, labels_C: Tensor) -> tuple[Tensor, ...]:
        """Summed loss, log-probabilities (C, V), normed x (C, E), which labels are valid, and the slope of the z-loss,
        1 + 2 z logsumexp, both (C,)."""
        normed_CE, logits_CV = self.project(x_CE)
        log_p_CV = self.vocabulary.log_softmax(logits_CV)
        valid_C = (labels_C >= 0).astype(ms.float32)
        chosen_C = self._choose(log_p_CV, labels_C)
        loss_C = -chosen_C * (1.0 - self._smoothing)
        slope_C = ops.ones_like(valid_C)
        if self._smoothing > 0:
            vocab = log_p_CV.shape[1] * self.vocabulary.num_parts
            sum_C = self._product(log_p_CV, ops.ones((log_p_CV.shape[1], 1), ms.float32)).reshape(-1)
            loss_C = loss_C - self._smoothing * self.vocabulary.total(sum_C) * (1.0 / vocab)
        if self._z_loss > 0:
            logsumexp_C = self._choose(logits_CV, labels_C) - chosen_C
            loss_C = loss_C + self._z_loss * logsumexp_C * logsumexp_C
            slope_C = 1.0 + 2.0 * self._z_loss * logsumexp_C
        return (loss_C * valid_C).sum(), log_p_CV, normed_CE, valid_C, slope_C

    def project(self, x_CE: Tensor) -> tuple[Tensor, Tensor]:
        """Normed x (C, E) and logits (C, V)."""
        normed_CE = self.norm(x_CE)
        return normed_CE, self._product_tb(normed_CE, self.weight.astype(normed_CE.dtype)).astype(ms.float32)

    def _choose(self, values_CV: Tensor, labels_C: Tensor) -> Tensor:
        """The label's own value of every token."""
        here_C = ops.gather_d(values_CV, 1, self.vocabulary.rows(labels_C).reshape(-1, 1)).reshape(-1)
        return self.vocabulary.total(here_C * self.vocabulary.is_here(labels_C))


class HeadGradient(nn.Cell):  # type: ignore[misc]
    """Loss and gradients of one chunk; those of the weights are added to `gradients` in place.

    The gradient of the logits is `softmax - label` times a factor a token, which is applied to the narrow side of both
    products that follow, never to (C, V).

    Args:
        loss: what is differentiated.
        cross_entropy: losses (C,) and the gradients of logits (C, V) in one; for a plain objective over a whole
            vocabulary. None computes them from the log-probabilities.
    """

    def __init__(self, loss: HeadLoss, cross_entropy: ops.Custom | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.loss = loss
        self._is_fused = cross_entropy is not None
        self._cross_entropy: ops.Custom = cross_entropy
        self.trains_weight, self.trains_norm = loss.weight.requires_grad, loss.norm.weight.requires_grad
        shapes = [p.shape for p in self.trained]
        buffers = [Parameter(Tensor(np.zeros(s, np.float32)), f"head_gradient_{i}") for i, s in enumerate(shapes)]
        self.gradients = ParameterTuple(buffers)
        self._product = ops.MatMul()
        self._input_product, self._weight_product = self._product, ops.MatMul(transpose_a=True)
        if loss.products is not None:
            self._input_product, self._weight_product = loss.products.input_gradient, loss.products.weight_gradient
        self._norm_weights = ParameterTuple([loss.norm.weight] if self.trains_norm else [])
        self._norm_gradient = ops.GradOperation(get_all=True, get_by_list=self.trains_norm, sens_param=True)

    @property
    def trained(self) -> list[Parameter]:
        """The weights that `gradients` belong to: the output matrix and the norm, those that are trained."""
        return [p for p in (self.loss.weight, self.loss.norm.weight) if p.requires_grad]

    def construct(
        self, x_NE: Tensor, d_x_NE: Tensor, places_C: Tensor, labels_C: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Summed loss of the labels, and `d_x_NE`, float32, with the gradient of this chunk's tokens added.

        It is times `scale`. Products are in the type of x; what is summed over chunks is float32.
        """
        x_CE = ops.gather(x_NE, places_C, 0)
        dtype = x_CE.dtype
        total, normed_CE, d_logits_CV, factors_C = self._differentiate(x_CE, labels_C)
        ones_1E = ops.ones((1, x_CE.shape[1]), ms.float32)
        factors_CE = self._product((factors_C * scale).reshape(-1, 1), ones_1E)
        d_logits_CV = d_logits_CV.astype(dtype)
        d_normed_CE = self._input_product(d_logits_CV, self.loss.weight.astype(dtype)).astype(ms.float32) * factors_CE
        d_normed_CE = d_normed_CE.astype(dtype)
        if self.trains_norm:
            d_inputs, d_weights = self._norm_gradient(self.loss.norm, self._norm_weights)(x_CE, d_normed_CE)
            added = ops.assign_add(self.gradients[-1], d_weights[0])
        else:
            d_inputs = self._norm_gradient(self.loss.norm)(x_CE, d_normed_CE)
            added = total
        d_rows = ops.depend(d_inputs[0].astype(ms.float32), added)
        if self.trains_weight:
            scaled_CE = (normed_CE.astype(ms.float32) * factors_CE).astype(dtype)
            d_weight = self._weight_product(d_logits_CV, scaled_CE)
            d_rows = ops.depend(d_rows, ops.assign_add(self.gradients[0], d_weight.astype(ms.float32)))
        return total, ops.tensor_scatter_add(d_x_NE, places_C.reshape(-1, 1), d_rows)

    def _differentiate(self, x_CE: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Summed loss, normed x (C, E), and the gradients of the logits (C, V) but for a factor of each token (C,)."""
        if self._is_fused:
            normed_CE, logits_CV = self.loss.project(x_CE)
            losses_C, d_logits_CV = self._cross_entropy(logits_CV, labels_C)
            return losses_C.sum(), normed_CE, d_logits_CV, (labels_C >= 0).astype(ms.float32)
        total, log_p_CV, normed_CE, valid_C, slope_C = self.loss.compute(x_CE, labels_C)
        return total, normed_CE, self._logit_gradients(log_p_CV, labels_C, slope_C), valid_C * slope_C

    def _logit_gradients(self, log_p_CV: Tensor, labels_C: Tensor, slope_C: Tensor) -> Tensor:
        """Gradient of a label's loss by its logits, over `slope`."""
        vocabulary = self.loss.vocabulary
        tokens, rows = log_p_CV.shape
        places = ops.stack((ops.arange(tokens).astype(ms.int32), vocabulary.rows(labels_C)), -1)
        smoothing = self.loss._smoothing
        label_C = -(1.0 - smoothing) / slope_C * vocabulary.is_here(labels_C)
        gradients = ops.tensor_scatter_add(ops.exp(log_p_CV), places, label_C)
        if smoothing > 0:
            gradients = gradients - (smoothing / (rows * vocabulary.num_parts) / slope_C).reshape(-1, 1)
        return gradients
