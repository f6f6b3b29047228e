"""The systems that are compared: each trains the same Llama on batches of the same shape, one optimizer step a call.

All of them live in the same two processes, one thread each, so that whatever else the machine does hits all alike.
References are written as a user of the tool would write them: stages of whole layers, cut into equal numbers of
layers, torch's AdamW with its defaults. `tuned` gives a reference what llmpipe does beyond its engine: the balanced
cut and the fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from llmpipe_cli.engine.recorder import Recorder
from llmpipe_cli.plan.plan import Plan
from llmpipe_cli.recipe.schema import Recipe
from llmpipe_cli.report.timeline import load_timeline, simulated_step
from llmpipe_cli.run import RunDirectory
from llmpipe_cli.worker.process import Context
from llmpipe_cli.worker.stop import StopFlag
from llmpipe_cli.worker.training import Trainer


@dataclass(frozen=True)
class Work:
    """What every system does in a step."""

    num_layers: int = 8
    num_micro_batches: int = 8
    micro_batch_size: int = 2
    sequence_len: int = 256
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_heads: int = 4
    learning_rate: float = 1e-3
    max_grad_norm: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.num_micro_batches * self.micro_batch_size * self.sequence_len

    def config_fields(self) -> dict[str, object]:
        """The model's config."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.sequence_len,
            "tie_word_embeddings": False,
        }

    def config(self) -> LlamaConfig:
        """The config as the references use it."""
        return LlamaConfig(**self.config_fields(), attn_implementation="sdpa")


class System(Protocol):
    """One contender."""

    def step(self) -> None:
        """One optimizer step, on every rank."""


def _batches(work: Work, size: int) -> Iterator[torch.Tensor]:
    """Endless token ids, int64 [size, sequence_len]."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(0, work.vocab_size, (size, work.sequence_len), generator=generator)


class Transformers:
    """Plain transformers: one whole model a process, no communication.

    Args:
        work: the work.
        active: whether this rank takes part.
        threads: threads of its step.
    """

    def __init__(self, work: Work, active: bool, threads: int = 1) -> None:
        self.work, self.active, self.threads = work, active, threads
        self.batches = _batches(work, work.micro_batch_size)
        if active:
            self.model = LlamaForCausalLM(work.config())
            self.optimizer = torch.optim.AdamW(self.model.parameters(), work.learning_rate)

    def step(self) -> None:
        if not self.active:
            return
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        for _ in range(self.work.num_micro_batches):
            ids = next(self.batches)
            (self.model(input_ids=ids, labels=ids).loss / self.work.num_micro_batches).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.work.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.set_num_threads(before)


class Block(nn.Module):
    """A decoder layer that takes and gives hidden states alone, as pipelines want them."""

    def __init__(self, work: Work, index: int) -> None:
        super().__init__()
        self.layer = LlamaDecoderLayer(work.config(), index)
        self.rotary = LlamaRotaryEmbedding(work.config())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(hidden.shape[1])[None]
        tables = self.rotary(hidden, positions)
        return self.layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=tables)


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _layers(work: Work) -> list[tuple[type[nn.Module], tuple[object, ...], dict[str, object]]]:
    embedding = (nn.Embedding, (work.vocab_size, work.hidden_size), {})
    blocks = [(Block, (work, index), {}) for index in range(work.num_layers)]
    norm = (LlamaRMSNorm, (work.hidden_size,), {})
    head = (nn.Linear, (work.hidden_size, work.vocab_size), {"bias": False})
    return [embedding, *blocks, norm, head]


def _cut(work: Work, tuned: bool) -> int:
    """First layer of the second stage: equal numbers of blocks, or one more in front because the head weighs one."""
    return 1 + work.num_layers // 2 + (1 if tuned else 0)


class _CutModule(PipelineModule):
    """A PipelineModule of two stages cut at a given layer."""

    def __init__(self, cut: int, **options: object) -> None:
        self._cut = cut
        super().__init__(**options)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = [0, self._cut, len(self._layer_specs)]
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])


class DeepSpeedPipeline:
    """DeepSpeed's own PipelineEngine over hand-written layers."""

    def __init__(self, work: Work, tuned: bool = False) -> None:
        specs = [LayerSpec(cls, *args, **options) for cls, args, options in _layers(work)]
        module = _CutModule(_cut(work, tuned), layers=specs, num_stages=2, loss_fn=_loss)
        for parameter in module.parameters():
            parameter.model_parallel = True  # else DeepSpeed's norm leaves out the second stage
        parameters = list(module.parameters())
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.AdamW(parameters, work.learning_rate, fused=True if tuned else None),
            model_parameters=parameters,
            config={
                "train_micro_batch_size_per_gpu": work.micro_batch_size,
                "gradient_accumulation_steps": work.num_micro_batches,
                "gradient_clipping": work.max_grad_norm,
                "steps_per_print": None,
            },
        )
        batches = _batches(work, work.micro_batch_size)
        self.pairs = ((ids, ids) for ids in batches)

    def step(self) -> None:
        self.engine.train_batch(self.pairs)


class DeepSpeedData:
    """DeepSpeed's data parallelism: a whole model on each rank, which takes every second micro-batch."""

    def __init__(self, work: Work) -> None:
        model = LlamaForCausalLM(work.config())
        self.work, self.count = work, work.num_micro_batches // 2
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), work.learning_rate),
            config={
                "train_micro_batch_size_per_gpu": work.micro_batch_size,
                "gradient_accumulation_steps": self.count,
                "train_batch_size": work.micro_batch_size * work.num_micro_batches,
                "gradient_clipping": work.max_grad_norm,
                "steps_per_print": None,
            },
        )
        self.batches = _batches(work, work.micro_batch_size)

    def step(self) -> None:
        for _ in range(self.count):
            ids = next(self.batches)
            self.engine.backward(self.engine(input_ids=ids, labels=ids).loss)
            self.engine.step()


# What torch.distributed.pipelining has: schedule -> its class, and the parts of the model that each rank holds.
_TORCH_SCHEDULES: dict[str, tuple[type, tuple[list[int], list[int]]]] = {
    "1f1b": (Schedule1F1B, ([0], [1])),
    "interleaved": (ScheduleInterleaved1F1B, ([0, 2], [1, 3])),
    "zbv": (ScheduleZBVZeroBubble, ([0, 3], [1, 2])),
}


class TorchPipelining:
    """torch.distributed.pipelining over the same hand-written layers."""

    def __init__(self, work: Work, rank: int, schedule: str = "1f1b", tuned: bool = False) -> None:
        cls, parts = _TORCH_SCHEDULES[schedule]
        num_parts = len(parts[0]) + len(parts[1])
        stages = [
            PipelineStage(self._part(work, part, num_parts, tuned), part, num_parts, torch.device("cpu"))
            for part in parts[rank]
        ]
        self.work, self.has_first, self.has_last = work, 0 in parts[rank], num_parts - 1 in parts[rank]
        self.schedule = cls(
            stages[0] if num_parts == 2 else stages, n_microbatches=work.num_micro_batches, loss_fn=_loss
        )
        self.parameters = [parameter for stage in stages for parameter in stage.submod.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, work.learning_rate, fused=True if tuned else None)
        self.batches = _batches(work, work.micro_batch_size * work.num_micro_batches)

    @staticmethod
    def _part(work: Work, part: int, num_parts: int, tuned: bool) -> nn.Module:
        """Equal numbers of layers in each part; two parts can be cut like the others' two stages."""
        bounds = [0, *(1 + work.num_layers * cut // num_parts for cut in range(1, num_parts)), work.num_layers + 3]
        if num_parts == 2:
            bounds[1] = _cut(work, tuned)
        layers = _layers(work)[bounds[part] : bounds[part + 1]]
        return nn.Sequential(*(cls(*args, **options) for cls, args, options in layers))

    def step(self) -> None:
        ids = next(self.batches)
        losses: list[torch.Tensor] = []
        targets = {"target": ids, "losses": losses} if self.has_last else {}
        self.schedule.step(*([ids] if self.has_first else []), **targets)
        # Over all stages, as llmpipe and DeepSpeed do; torch leaves this to the user.
        squared = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]).square()
        dist.all_reduce(squared)
        nn.utils.clip_grads_with_norm_(self.parameters, self.work.max_grad_norm, squared.sqrt())
        self.optimizer.step()
        self.optimizer.zero_grad()


class Llmpipe:
    """llmpipe's worker as `llmpipe train` runs it: its data, its metrics, its timeline."""

    def __init__(self, plan: Plan, folder: Path, rank: int, recording: bool = True) -> None:
        run = RunDirectory.create(folder / f"rank-{rank}", "bench")
        context = Context(run, StopFlag(None), plan, Recipe.model_validate(plan.recipe), rank, torch.device("cpu"))
        self.trainer = Trainer(context)
        if not recording:
            self.trainer.engine.executor.recorder = _Silent()

    def step(self) -> None:
        self.trainer.step()

    def simulated_over_measured(self) -> float | None:
        """The last step's length by the simulator, fed with its own records, over its measured length; on rank 0."""
        self.trainer.write_timeline()
        if not self.trainer.context.is_first:
            return None
        timeline = load_timeline(self.trainer.context.run)
        return simulated_step(timeline) / timeline.seconds


class _Silent(Recorder):
    """Records nothing, to see what recording costs."""

    def restart(self) -> None:
        pass

    def begin(self, kind: str, micro_batch: int | None = None, chunk: int = 0) -> None:
        pass

    def arrived(self) -> None:
        pass

    def end(self, waited: bool = False) -> None:
        pass


def build(name: str, work: Work, rank: int, folder: Path) -> System:
    """The system of this name; `llmpipe-X` reads its plan from ``folder/llmpipe-X.json``."""
    torch.manual_seed(1)
    makers: dict[str, Callable[[], System]] = {
        "transformers": lambda: Transformers(work, active=rank == 0),
        "independent": lambda: Transformers(work, active=True),
        "deepspeed": lambda: DeepSpeedPipeline(work),
        "deepspeed-tuned": lambda: DeepSpeedPipeline(work, tuned=True),
        "torch": lambda: TorchPipelining(work, rank),
        "torch-tuned": lambda: TorchPipelining(work, rank, tuned=True),
        "torch-interleaved": lambda: TorchPipelining(work, rank, "interleaved"),
        "torch-zbv": lambda: TorchPipelining(work, rank, "zbv"),
        "two-threads": lambda: Transformers(work, active=rank == 0, threads=2),
        "deepspeed-data": lambda: DeepSpeedData(work),
    }
    if name in makers:
        return makers[name]()
    return Llmpipe(Plan.load(folder / f"{name}.json"), folder, rank, recording=not name.endswith("-unrecorded"))
