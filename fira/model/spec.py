"""What a model is: the numbers that fix its shapes, one class per architecture."""
from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Union

from pydantic import Field, model_validator

from fira.config import Config

# Far above any model there is: what a config.json from elsewhere can ask for, in time and memory,
# before its numbers are compared with the weights.
Size = Annotated[int, Field(ge=1, le=1 << 20)]
Layers = Annotated[int, Field(ge=1, le=1 << 10)]


class Spec(Config):
    """What both architectures need. `num_experts=1` is the dense baseline, without a router."""

    divides: ClassVar[tuple[str, str]]  # two fields, of which the first must divide the second
    vocab_size: Size = Field(50304, description="rows of the token embedding")
    d_model: Size = Field(768, description="width of the residual stream")
    n_head: Size = Field(12, description="query heads")
    num_layers: Layers = Field(12, description="blocks")
    d_ff: Size = Field(3072, description="hidden width of one expert")
    num_experts: Size = Field(4, description="experts per layer; 1 is a dense model")
    top_k: Size = Field(1, description="experts chosen per token")
    context: Size = Field(3072, description="longest sequence, in tokens")
    balance: Literal["loss", "bias", "quantile", "handover", "none"] = Field(
        "loss", description="the method that keeps experts evenly loaded")
    balance_weight: float = Field(0.01, ge=0, description="weight of the load-balance loss")

    @model_validator(mode="after")
    def _check(self) -> Spec:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is above num_experts={self.num_experts}; "
                             f"choose top_k of at most {self.num_experts}")
        (part, size), (whole, total) = ((name, getattr(self, name)) for name in self.divides)
        if total % size:
            fit = max(n for n in range(1, size + 1) if total % n == 0)
            raise ValueError(f"{part}={size} must divide {whole}={total}; try {part}={fit}")
        return self


class FIRASpec(Spec):
    """The founding model: learned positions, LayerNorm, GELU experts with biases, untied head."""

    divides = ("n_head", "d_model")
    architecture: Literal["fira"] = "fira"
    dropout: float = Field(0.1, ge=0, lt=1, description="probability of zeroing an activation")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    @property
    def n_kv_head(self) -> int:
        """Every query head has keys and values of its own."""
        return self.n_head


class FIRA2Spec(Spec):
    """The second generation: exactly Qwen3-MoE's mathematics, so that its weights run elsewhere."""

    divides = ("n_kv_head", "n_head")
    architecture: Literal["fira2"] = "fira2"
    n_kv_head: Size = Field(4, description="key-value heads shared by the query heads")
    head_dim: Size = Field(64, multiple_of=2, description="width of one head")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    tied: bool = Field(True, description="head and token embedding are one matrix")
    norm_eps: float = Field(1e-6, gt=0, le=1e-3, description="added to mean squares in RMSNorm")
    renormalize: bool = Field(True, description="weights of several chosen experts sum to 1")
    look_back: bool = Field(False, description="initial heads attend to the tokens just before")


ModelSpec = Annotated[Union[FIRASpec, FIRA2Spec], Field(discriminator="architecture")]
