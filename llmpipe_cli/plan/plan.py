"""The plan: what runs where, as plain JSON.

A plan is made once on the machine where the command was typed, written to the run directory, read by rank 0 and sent
from there to every other rank. Nothing in it depends on the rank that reads it, and reading it needs only pydantic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from llmpipe_cli.engine.schedules import SCHEDULES, Placement

Job = Literal["train", "bench", "evaluate", "generate", "serve"]
ScheduleName = Literal["1f1b", "gpipe", "interleaved", "zb-h1", "zb-h2", "zb-v"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Layout(_Frozen):
    """How many ways the work is split."""

    pipeline: int
    tensor: int
    data: int

    @property
    def num_ranks(self) -> int:
        """Processes, one a device."""
        return self.pipeline * self.tensor * self.data

    def __str__(self) -> str:
        return f"{self.pipeline} x {self.tensor} x {self.data}"


class TrainingSettings(_Frozen):
    """Numbers of the training loop that depend on the data or the layout."""

    max_steps: int
    """Optimizer steps."""
    warmup_steps: int
    """Steps over which the learning rate rises."""
    steps_per_epoch: float
    """Optimizer steps a pass over the training data; 0 for endless data."""
    resume_from: str | None = None
    """Checkpoint directory to go on from."""
    stop_at: int | None = None
    """Step after which to save and stop as if asked to."""


class Plan(_Frozen):
    """Everything a worker needs.

    `partition` holds the bounds of the model's parts over the segments of `slice_plan`: part k runs segments
    ``partition[k]`` up to but not including ``partition[k + 1]``. A stage holds one part, or `virtual_stages` of them
    (`placement`).
    """

    job: Job
    name: str
    recipe: dict[str, Any]
    """The resolved recipe, as `Recipe.model_dump(by_alias=True)` gives it."""
    model_type: str
    model_config_fields: dict[str, Any]
    """The Hugging Face config as `config.to_dict()` gives it."""
    model_class: str
    """Name of the transformers class, for example LlamaForCausalLM."""
    weights: str | None
    """Directory with the weights to start from; none starts from scratch."""
    adapters: dict[str, Any] | None = None
    """`model.adapters.Adapters` as JSON; none without LoRA."""
    adapter_weights: str | None = None
    """Directory with the adapters to start from; none draws new ones."""
    trainable: list[str] | None = None
    """Names of the parameters that learn; none means all."""
    slice_plan: dict[str, Any]
    layout: Layout
    partition: list[int]
    micro_batch_size: int
    """Samples a micro-batch."""
    num_micro_batches: int
    """Micro-batches a step and replica."""
    schedule: ScheduleName
    virtual_stages: int = 1
    """Parts of the model on each stage."""
    zero_stage: Literal[0, 1]
    activation_checkpointing: Literal["none", "selective", "full"]
    device: Literal["cpu", "cuda"]
    data: dict[str, Any] | None
    """`data.prepare.PreparedData` as JSON; none when the job reads no prepared data."""
    training: TrainingSettings | None = None
    options: dict[str, Any] = {}
    """Options of an evaluate or generate job."""

    @property
    def placement(self) -> Placement:
        """Which stage holds which part of the model."""
        if self.virtual_stages == 1:
            return Placement(self.layout.pipeline)
        return SCHEDULES[self.schedule].placement(self.layout.pipeline, self.virtual_stages)

    @property
    def num_global_micro_batches(self) -> int:
        """Micro-batches a step over all replicas."""
        return self.num_micro_batches * self.layout.data

    def stopping_at(self, step: int) -> Plan:
        """The same plan, but training saves and stops after `step`."""
        assert self.training is not None
        return self.model_copy(update={"training": self.training.model_copy(update={"stop_at": step})})

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan that `save` wrote."""
        return cls.model_validate_json(path.read_text())
