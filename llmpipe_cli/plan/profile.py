"""What a model costs, before any layout: a profile a segment, for one token and one device.

A profile lists what one forward pass of a segment does to a token: matrix products with their shapes, attention, bytes
that elementwise kernels move, bytes that autograd keeps for the backward pass, and what tensor parallelism divides. Two
things make profiles: `plan.measure` from a model's real modules on the meta device, and `plan.transformer` from the
formulas of a GPT or Llama written with another engine's fused kernels. `plan.cost` turns them into seconds,
`plan.memory` into bytes. Plain Python; no torch.

Sizes that grow with the sequence come in two parts, as operations do in a slice plan: a part a token, and a part a
token and token of the sequence (`_squared`), so that one profile serves every micro-batch size and sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Cut = Literal["outer", "inner", "none"]


@dataclass(frozen=True)
class Product:
    """A matrix product with a weight: [rows, inner] x [inner, outer].

    Attributes:
        inner: columns of the activations.
        outer: columns of the result.
        cut: which side tensor parallelism divides: "outer" (column-parallel), "inner" (row-parallel) or "none".
        rows: rows a token; below 1 where only some tokens take part.
        count: how many such products a pass has.
        shared: its activations are those of another product of the segment too.
    """

    inner: int
    outer: int
    cut: Cut = "none"
    rows: float = 1.0
    count: float = 1.0
    shared: bool = False

    @property
    def flops(self) -> float:
        """Operations a token of all of them, undivided."""
        return 2.0 * self.rows * self.inner * self.outer * self.count

    def shard(self, tensor: int) -> tuple[float, float]:
        """Inner and outer size on one of `tensor` shards."""
        inner = self.inner / tensor if self.cut == "inner" else float(self.inner)
        return inner, self.outer / tensor if self.cut == "outer" else float(self.outer)


@dataclass(frozen=True)
class Attention:
    """Scores and values of one attention: two batched products over the sequence.

    Attributes:
        heads: query heads.
        head_dim: size of a head.
        fused: a kernel that never writes the scores to memory (flash or memory-efficient attention).
        causal: the fused kernel leaves out what the mask hides.
        count: how many a pass has.
    """

    heads: int
    head_dim: int
    fused: bool = True
    causal: bool = True
    count: float = 1.0

    @property
    def flops_squared(self) -> float:
        """Operations a token and token of the sequence, both products, nothing left out."""
        return 4.0 * self.heads * self.head_dim * self.count


@dataclass(frozen=True)
class Size:
    """Bytes a token.

    Attributes:
        whole: bytes that every tensor shard has.
        cut: bytes that the tensor shards divide.
        squared: bytes a token and token of the sequence, divided by the tensor shards.
    """

    whole: float = 0.0
    cut: float = 0.0
    squared: float = 0.0

    def bytes(self, tokens: float, sequence_len: int, tensor: int) -> float:
        """Bytes for so many tokens in sequences of `sequence_len`, on one of `tensor` shards."""
        return tokens * (self.whole + (self.cut + self.squared * sequence_len) / tensor)


@dataclass(frozen=True)
class SegmentProfile:
    """One segment of a model.

    Attributes:
        name: as in the slice plan.
        kind: "pre", "layer", "mid" or "post".
        parameters: elements that learn or not, tied ones in each segment that uses them.
        cut_parameters: those of them that tensor shards divide.
        frozen_parameters: those of them that do not learn; they have no gradient and no optimizer state.
        products: matrix products with weights.
        attentions: attentions.
        traffic: bytes that elementwise kernels read and write in the forward pass.
        saved: bytes that autograd keeps until the backward pass.
        selective_saved: what is kept of `saved` under selective checkpointing.
        temporary: bytes at the peak inside the segment's own forward or backward pass, beyond `saved`.
        carried: bytes that leave the segment for the next one, a token.
        kernels: kernel launches of a forward pass.
        all_reduces: all-reduces of `carried` bytes in a forward pass under tensor parallelism; the backward pass has as
            many.
        tied: parameters (elements) that other segments hold too and that are summed over their stages every step.
    """

    name: str
    kind: str
    parameters: int
    cut_parameters: int = 0
    frozen_parameters: int = 0
    products: tuple[Product, ...] = ()
    attentions: tuple[Attention, ...] = ()
    traffic: Size = Size()
    saved: Size = Size()
    selective_saved: Size = Size()
    temporary: Size = Size()
    carried: float = 0.0
    kernels: float = 0.0
    all_reduces: float = 0.0
    tied: int = 0

    def flops(self, tokens: float, sequence_len: int) -> float:
        """Forward operations, undivided, as published rates count them (causal masks leave nothing out)."""
        products = sum(product.flops for product in self.products)
        squared = sum(attention.flops_squared for attention in self.attentions)
        return tokens * (products + squared * sequence_len)

    def parameters_on(self, tensor: int) -> float:
        """Elements on one of `tensor` shards."""
        return self.parameters - self.cut_parameters * (1 - 1 / tensor)

    def learning_on(self, tensor: int) -> float:
        """Elements that learn, on one of `tensor` shards."""
        return self.parameters_on(tensor) * (1 - self.frozen_parameters / max(self.parameters, 1))


@dataclass(frozen=True)
class ModelProfile:
    """All segments, from the embedding to the head.

    Attributes:
        segments: in order.
        dtype: "fp32", "bf16" or "fp16": what the bytes above are for.
        measured_on: "cuda" or "cpu": whose kernels the profile describes.
        divisible: numbers that tensor shards are to divide (heads first, key-value heads, intermediate size);
            empty when the model cannot be divided.
    """

    segments: tuple[SegmentProfile, ...]
    dtype: str
    measured_on: str = "cuda"
    divisible: tuple[int, ...] = field(default=())

    @property
    def num_parameters(self) -> int:
        """Elements, tied ones counted once."""
        return sum(segment.parameters for segment in self.segments) - sum(
            segment.tied for segment in self.segments if segment.kind == "post"
        )

    def flops(self, tokens: float, sequence_len: int) -> float:
        """Forward operations."""
        return sum(segment.flops(tokens, sequence_len) for segment in self.segments)

    def frozen_flops(self, tokens: float) -> float:
        """Operations of the weight gradients that are not computed, since the weights do not learn."""
        return tokens * sum(
            sum(product.flops for product in segment.products) * segment.frozen_parameters / max(segment.parameters, 1)
            for segment in self.segments
        )
