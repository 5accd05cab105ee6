"""The arithmetic of the expectations: matrices by their sizes, and what a report must say."""

from __future__ import annotations

from dataclasses import dataclass, field

ROLES = (
    "embedding",
    "attention",
    "dense_mlp",
    "norm",
    "router",
    "shared_expert",
    "routed_expert",
    "mtp",
    "vision",
    "lm_head",
    "other",
)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, or several of the same size."""

    out: int
    inner: int
    times: int = 1

    @property
    def params(self) -> int:
        return self.out * self.inner * self.times

    @property
    def fp8(self) -> int:
        """One byte each, and an fp32 scale for each started block of 128 x 128."""
        return (self.out * self.inner + 4 * -(-self.out // 128) * -(-self.inner // 128)) * self.times

    @property
    def nvfp4(self) -> int:
        """Half a byte each, an fp8 scale for 16 values, and two fp32 scalars."""
        return (self.out * self.inner // 2 + self.out * self.inner // 16 + 8) * self.times


w = Matrix


def params(*matrices: Matrix) -> int:
    return sum(matrix.params for matrix in matrices)


def fp8(*matrices: Matrix) -> int:
    return sum(matrix.fp8 for matrix in matrices)


def nvfp4(*matrices: Matrix) -> int:
    return sum(matrix.nvfp4 for matrix in matrices)


def glu(hidden: int, inner: int, times: int = 1) -> tuple[Matrix, ...]:
    """gate, up and down projection."""
    return (w(inner, hidden, 2 * times), w(hidden, inner, times))


def gqa(hidden: int, heads: int, kv: int, head: int, times: int = 1) -> tuple[Matrix, ...]:
    """q, k, v and o projection."""
    return (w(heads * head, hidden, times), w(kv * head, hidden, 2 * times), w(hidden, heads * head, times))


def mla(
    hidden: int, heads: int, q_rank: int, kv_rank: int, nope: int, rope: int, value: int, times: int
) -> tuple[Matrix, ...]:
    """q_a, q_b (or q), kv_a, kv_b and o projection."""
    query = (
        (w(q_rank, hidden, times), w(heads * (nope + rope), q_rank, times))
        if q_rank
        else (w(heads * (nope + rope), hidden, times),)
    )
    return (
        *query,
        w(kv_rank + rope, hidden, times),
        w(heads * (nope + value), kv_rank, times),
        w(hidden, heads * value, times),
    )


@dataclass(frozen=True)
class Expected:
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    shared: int
    params: dict[str, int]
    """Logical parameters by role, MTP and towers among them."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes by role, where they are not two for each parameter."""
    kv_token: int | None = None
    """Bytes a token, full-attention layers; None: no figure can be exact."""
    kv_fixed: int = 0
    """Bytes a sequence in windows and chunks, all full."""
    kv_state: int = 0
    context: int = 0
    """max_position_embeddings of the config; 0: not in it."""
    kv_dtype: str = "bfloat16"
    width: int = 2
    stored: int | None = None
    """Elements as they are stored, scales counted; None: as many as parameters."""

    def bytes_of(self, role: str) -> int:
        return self.bytes.get(role, self.width * self.params.get(role, 0))

    @property
    def total(self) -> int:
        return sum(self.params.values()) - self.params.get("mtp", 0)

    @property
    def routed(self) -> int:
        return self.params.get("routed_expert", 0)

    @property
    def active(self) -> int:
        routed = self.routed * self.top_k // self.experts if self.experts else 0
        return self.total - self.params.get("vision", 0) - self.routed + routed

    @property
    def active_without_embeddings(self) -> int:
        return self.active - self.params.get("embedding", 0) - self.params.get("lm_head", 0)

    @property
    def active_without_input(self) -> int:
        return self.active - self.params["embedding"]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_of(role) for role in ROLES)

    @property
    def per_expert(self) -> int:
        return self.bytes_of("routed_expert") // (self.moe_layers * self.experts) if self.experts else 0
