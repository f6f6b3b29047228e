"""Generation over pipeline stages, by transformers' own `generate`.

Every rank runs `generate` on a view of the model (`PipelinedModel`) whose forward is the stages' one after the other:
a rank receives what the stage before it sends, replays its own stage with its own part of the key-value cache, and
sends on. Where `generate` has scores and picks the next tokens, the last stage picks and tells the others, so all
ranks see the same tokens, stop together and ask for the same next pass. Logits processors, stopping criteria, beam
search and the reordering of caches are transformers' code.

With tensor shards every shard has its heads' part of the cache and, on the last stage, all logits; the first shard
picks for all of them.

An encoder runs once for each batch; its result is given to all ranks. After that the decoder is a pipeline of its own,
whose first stage is the one with the decoder's embedding; stages that hold nothing but encoder layers sit it out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from llmpipe_cli.engine.cache import StageCache, why_uncached
from llmpipe_cli.engine.exchange import gather_json
from llmpipe_cli.engine.module import StageModule
from llmpipe_cli.engine.transfers import Receiver, Sender
from llmpipe_cli.engine.turns import Turns
from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.model.slicing.replay import StageReplay
from llmpipe_cli.model.slicing.trace import trace_decoder

PickFunction = Callable[[Tensor, int], Tensor]
"""Next tokens [rows] of scores [rows, vocabulary]; the second argument counts the tokens generated before."""


class PipelineDecoder:
    """The stages of one pipeline as one model that generates. Made by all ranks of a job together, once.

    Args:
        module: this rank's stage.
        device: its device.
        should_stop: asked on the replica's first rank before every pass; true ends all batches after it. Either all
            ranks pass one or none.

    Attributes:
        turns: for several batches in flight.
        uncached: why there is no cache over the stages; none when there is one.
        num_computed_tokens: tokens that passed through the stages, padding included, encoder inputs left out.
        stopping: whether a stop was asked for.
    """

    def __init__(
        self, module: StageModule, device: torch.device, should_stop: Callable[[], bool] | None = None
    ) -> None:
        model: PreTrainedModel = module.skeleton
        self.model, self.device, self.turns = model, device, Turns()
        self.config, self.is_encoder_decoder = model.config, bool(model.config.is_encoder_decoder)
        self.num_stages, self.num_computed_tokens, self.stopping = module.num_stages, 0, False
        self.uncached = why_uncached(model)
        self._should_stop = should_stop
        self._line = _Line(module, device)
        self._encoder: list[_Part] = []
        self._decoder: list[_Part] = []
        self._encoder_owner = 0
        if self.num_stages == 1:
            return  # nothing is cut
        plan, middle = module.slice_plan, 0
        if self.is_encoder_decoder:
            middle = plan.middle
            part = next(part for part, bound in enumerate(module.bounds[1:]) if bound > middle)
            self._encoder_owner = module.placement.owner(part)[0]
            self._encoder = _own_parts(module, plan.first_stack(), 0, self._line, model.get_encoder())
            plan = trace_decoder(type(model), model.config)
        self._decoder = _own_parts(module, plan, middle, self._line)

    @property
    def is_last(self) -> bool:
        """Whether this rank has the logits."""
        return self._line.is_last

    def new_cache(self) -> Cache | None:
        """An empty cache for `generate`; none where there cannot be one."""
        if self.uncached is not None:
            return None
        own = StageCache(self.config) if self.num_stages > 1 else DynamicCache(config=self.config)
        return EncoderDecoderCache(own, DynamicCache(config=self.config)) if self.is_encoder_decoder else own

    def view(self, generation_config: GenerationConfig) -> Any:
        """The model as `generate` sees it; every batch in flight needs its own."""
        return PipelinedModel.over(self, generation_config)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None) -> BaseModelOutput:
        """The encoder's last hidden states [batch, length, hidden], on every rank."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "return_dict": True}
        if self.num_stages == 1:
            return BaseModelOutput(last_hidden_state=self.model.get_encoder()(**inputs)[0])
        states: Tensor | None = None
        output = _run(self._encoder, inputs, tuple(input_ids.shape))
        if self._line.stage == self._encoder_owner:
            states = output[0]
        if states is not None:
            states = states.contiguous()
            self._line.tell(torch.tensor(states.shape, device=self.device), self._encoder_owner, "encoder")
            self._line.tell(states, self._encoder_owner, "encoder")
        self.turns.pause()
        if states is None:
            shape = self._line.hear(torch.zeros(3, dtype=torch.int64), self._encoder_owner, "encoder")
            states = self._line.hear(
                torch.empty(shape.tolist(), dtype=self.model.dtype), self._encoder_owner, "encoder"
            )
        return BaseModelOutput(last_hidden_state=states)

    def forward(self, inputs: dict[str, Any]) -> Any:
        """One pass over the stages: the model's own output on the last one, an empty one with the cache elsewhere."""
        self._exchange_stop()
        ids: Tensor = inputs["decoder_input_ids" if self.is_encoder_decoder else "input_ids"]
        cache = inputs.get("past_key_values")
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        self.num_computed_tokens += ids.numel()
        # Besides hidden states, carried tensors may be as long as the past or as what the encoder has read.
        past = cache.get_seq_length() if cache is not None else 0
        read = inputs["encoder_outputs"][0].shape[1] if self.is_encoder_decoder else 0
        if self.num_stages == 1:
            return self.model(**inputs)
        if isinstance(own, StageCache):
            own.begin(ids.shape[0], ids.shape[1], self.device)
        output = _run(self._decoder, inputs, (*ids.shape, past, read))
        if isinstance(own, StageCache):
            own.end()
        if self.is_last:
            return output
        nothing = torch.zeros(ids.shape[0], 1, 1, device=self.device)
        if self.is_encoder_decoder:
            return Seq2SeqLMOutput(logits=nothing, past_key_values=cache)
        return CausalLMOutputWithPast(logits=nothing, past_key_values=cache)

    def agree(self, made: Tensor | None, empty: Tensor) -> Tensor:
        """What the last stage has made, on every rank, after the other batches had their turns.

        Args:
            made: on the last stage, the tensor; elsewhere none.
            empty: a tensor of its shape and dtype.
        """
        line = self._line
        picks = line.is_last and line.shard == 0
        if picks and line.num_ranks > 1:
            assert made is not None
            line.tell(made, line.last, "tokens")  # before the pause: the first stage waits for it
        self.turns.pause()
        return made if picks and made is not None else line.hear(empty, line.last, "tokens")

    def _exchange_stop(self) -> None:
        """Let all ranks know in the same pass that a stop was asked for."""
        if self._should_stop is None:
            return
        line = self._line
        asks = line.stage == 0 and line.shard == 0
        if asks:
            self.stopping = self.stopping or self._should_stop()
        if line.num_ranks > 1:
            flag = torch.tensor([int(self.stopping)], device=self.device)
            if asks:
                line.tell(flag, 0, "stop")
            else:
                self.stopping = bool(line.hear(flag, 0, "stop"))


class PipelinedModel:
    """Mixed into a transformers class: what of `generate` is different where the model is spread over stages."""

    _decoder: PipelineDecoder
    _pick: PickFunction
    _prompt_len: int

    @classmethod
    def over(cls, decoder: PipelineDecoder, generation_config: GenerationConfig) -> Any:
        """A view of the stage's model: the same modules and weights, with these methods in front."""
        model = decoder.model
        kind = type(f"{cls.__name__}{type(model).__name__}", (cls, type(model)), {})
        view: Any = object.__new__(kind)
        view.__dict__.update(model.__dict__)
        view.__dict__.update(_decoder=decoder, generation_config=generation_config)
        return view

    def pick_with(self, pick: PickFunction, prompt_len: int) -> None:
        """How the last stage chooses tokens behind `prompt_len` others."""
        self.__dict__.update(_pick=pick, _prompt_len=prompt_len)

    @property
    def device(self) -> torch.device:
        """The rank's device; the model's first parameter may belong to another stage."""
        return self._decoder.device

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return self._decoder.forward(inputs)

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        outputs = self._decoder.encode(inputs_tensor, model_kwargs.get("attention_mask"))
        return {**model_kwargs, "encoder_outputs": outputs}

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        if not self._decoder.is_last:
            return LogitsProcessorList()
        return super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]

    def _sample(self, input_ids: Tensor, logits_processor: LogitsProcessorList, *args: Any, **kwargs: Any) -> Any:
        kwargs["generation_config"].do_sample = False  # tokens are drawn by `_pick`; what follows takes the largest
        processors = LogitsProcessorList([*logits_processor, _Picked(self._decoder, self._pick, self._prompt_len)])
        return super()._sample(input_ids, processors, *args, **kwargs)  # type: ignore[misc]

    def _get_top_k_continuations(
        self,
        accumulated_log_probs: Tensor,
        running_sequences: Tensor,
        running_beam_indices: Tensor,
        cur_len: int,
        decoder_prompt_len: int,
        beams_to_keep: int,
        num_beams: int,
        batch_size: int,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best continuations of the last stage's scores: log-probability, beam and token of each."""
        made: Tensor | None = None
        offset = torch.arange(batch_size, device=running_sequences.device)[:, None] * num_beams
        if self._decoder.is_last:
            scores, sequences, indices = super()._get_top_k_continuations(  # type: ignore[misc]
                accumulated_log_probs=accumulated_log_probs,
                running_sequences=running_sequences,
                running_beam_indices=running_beam_indices,
                cur_len=cur_len,
                decoder_prompt_len=decoder_prompt_len,
                beams_to_keep=beams_to_keep,
                num_beams=num_beams,
                batch_size=batch_size,
                **kwargs,
            )
            beams = indices[:, :, cur_len - decoder_prompt_len] - offset
            made = torch.stack([scores.double(), beams.double(), sequences[:, :, cur_len].double()], dim=-1)
        empty = torch.empty(batch_size, beams_to_keep, 3, dtype=torch.float64)
        found = self._decoder.agree(made, empty)
        scores, beams, tokens = found[..., 0].float(), found[..., 1].long(), found[..., 2].long()
        sequences = self._gather_beams(running_sequences, beams)  # type: ignore[attr-defined]
        indices = self._gather_beams(running_beam_indices, beams)  # type: ignore[attr-defined]
        sequences[:, :, cur_len] = tokens
        indices[:, :, cur_len - decoder_prompt_len] = (beams + offset).to(indices.dtype)
        return scores, sequences, indices


class _Picked(LogitsProcessor):
    """The last processor: scores in which nothing but the token that the last stage has picked is possible."""

    def __init__(self, decoder: PipelineDecoder, pick: PickFunction, prompt_len: int) -> None:
        self._decoder, self._pick, self._prompt_len = decoder, pick, prompt_len

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        made = self._pick(scores, input_ids.shape[1] - self._prompt_len) if self._decoder.is_last else None
        tokens = self._decoder.agree(made, torch.empty(len(input_ids), dtype=torch.int64)).to(scores.device)
        width = max(scores.shape[-1], int(tokens.max()) + 1)
        chosen = torch.full((len(tokens), width), -torch.inf, device=scores.device)
        return chosen.scatter_(1, tokens[:, None], 0.0)


_BETWEEN_STAGES = ("carry", "encoder")
_TO_ALL = ("tokens", "stop")


class _Line:
    """The ranks of one pipeline, with a communicator for every kind of message.

    A kind has a single sender, which sends in the order in which the receivers ask; kinds may overtake each other.
    Tensor shards are pipelines side by side, each for its own part; what decides is told by the first to all of them.
    """

    def __init__(self, module: StageModule, device: torch.device) -> None:
        self.stage, self.num_stages, self.device = module.stage_id, module.num_stages, device
        self.last = module.placement.owner(module.placement.num_parts - 1)[0]
        grid = module.mpu()
        shards = range(grid.get_slice_parallel_world_size())
        self.shard = grid.get_slice_parallel_rank()
        by_shard = [[grid.stage_to_global(stage_id=s, model=shard) for s in range(self.num_stages)] for shard in shards]
        self.ranks, everyone = by_shard[self.shard], sorted(rank for ranks in by_shard for rank in ranks)
        self.num_ranks = len(everyone)
        self._sources = dict.fromkeys(_BETWEEN_STAGES, self.ranks) | dict.fromkeys(_TO_ALL, by_shard[0])
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._pending: list[tuple[dist.Work, Tensor]] = []
        for members, kinds in ((self.ranks, _BETWEEN_STAGES), (everyone, _TO_ALL)):
            if len(members) == 1:
                continue
            for ranks in sorted({tuple(ranks) for ranks in gather_json(members)}):
                for kind in kinds:
                    group = dist.new_group(list(ranks))
                    if list(ranks) == members:
                        self._groups[kind] = group

    @property
    def is_last(self) -> bool:
        """Whether this stage has the model's last part."""
        return self.stage == self.last

    def receiver(self, stage: int, num_tensors: int) -> Receiver | None:
        """For carried tensors from a stage; none from this one."""
        if stage == self.stage:
            return None
        return Receiver(self.ranks[stage], self._groups["carry"], self.device, num_tensors)

    def sender(self, stage: int) -> Sender | None:
        """For carried tensors to a stage; none to this one."""
        return None if stage == self.stage else Sender(self.ranks[stage], self._groups["carry"], self.device)

    def tell(self, tensor: Tensor, source: int, kind: str) -> None:
        """Send to all others without waiting for them; this rank is stage `source`."""
        work = dist.broadcast(tensor, self._sources[kind][source], group=self._groups[kind], async_op=True)
        assert work is not None
        self._pending = [(w, t) for w, t in self._pending if not w.is_completed()] + [(work, tensor)]

    def hear(self, empty: Tensor, source: int, kind: str) -> Tensor:
        """The next message of this kind from stage `source`, in the form of `empty`."""
        tensor = empty.to(self.device)
        dist.broadcast(tensor, self._sources[kind][source], group=self._groups[kind])
        return tensor


class _Part:
    """One of the model's parts that this rank has, with its neighbours.

    Args:
        replay: runs it.
        line: the ranks.
        before: stage of the part before it.
        after: stage of the part behind it.
    """

    def __init__(self, replay: StageReplay, line: _Line, before: int, after: int) -> None:
        plan = replay.plan
        self._replay = replay
        self._varies = max((plan.num_carried(boundary) for boundary in range(1, plan.num_segments)), default=0) > 1
        self._receiver = line.receiver(before, plan.num_carried(replay.start)) if replay.start else None
        self._sender = line.sender(after) if replay.stop < plan.num_segments else None

    def run(self, carry: Any, inputs: dict[str, Any], shape: tuple[int, ...]) -> Any:
        """One pass over this part; arguments as of `_run`, and what the part before it made if that is here too."""
        key: Hashable = shape if self._varies else shape[:2]
        if self._receiver is not None:
            self._receiver.announce(key)
            carry = tuple(self._receiver.receive())
        output = self._replay(carry, inputs)
        if self._sender is not None:
            self._sender.send(output, key)
        return output


def _own_parts(
    module: StageModule, plan: SlicePlan, offset: int, line: _Line, forward: Callable[..., Any] | None = None
) -> list[_Part]:
    """This rank's parts of a plan whose segments are those of the module's plan from `offset` on, in their order."""
    parts, placement = [], module.placement
    for number in range(placement.num_parts):
        start, stop = module.bounds[number] - offset, module.bounds[number + 1] - offset
        start, stop = max(start, 0), min(stop, plan.num_segments)
        if placement.owner(number)[0] != module.stage_id or start >= stop:
            continue
        before = placement.owner(max(number - 1, 0))[0]
        after = placement.owner(min(number + 1, placement.num_parts - 1))[0]
        parts.append(_Part(StageReplay(module.skeleton, plan, start, stop, forward), line, before, after))
    return parts


def _run(parts: list[_Part], inputs: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """One pass over this rank's parts: what the last of them makes.

    Args:
        parts: in their order.
        inputs: keyword arguments of the forward, the same on every stage.
        shape: decides the shapes of all carried tensors: [batch, tokens], and other lengths.
    """
    output: Any = None
    for part in parts:
        output = part.run(output, inputs, shape)
    return output
