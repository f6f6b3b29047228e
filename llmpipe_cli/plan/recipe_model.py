"""The recipe's model as the planner sees it, from its config alone: how it is cut, what learns, what segments cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from llmpipe_cli.plan.profile import ModelProfile
from llmpipe_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from llmpipe_cli.model.slicing.plan import SlicePlan
    from llmpipe_cli.recipe.schema import ModelSection


@dataclass(frozen=True)
class RecipeModel:
    """A recipe's model.

    Attributes:
        recipe: the recipe.
        section: its model, an adapter's base in place of the adapter.
        cls: class of the model.
        config: its config.
    """

    recipe: Recipe
    section: ModelSection
    cls: type[PreTrainedModel]
    config: PreTrainedConfig

    @property
    def traced_attention(self) -> str:
        """The implementation of attention that can be traced without values."""
        given = self.section.attn_implementation
        return "sdpa" if given.startswith("flash") else given

    @cached_property
    def sliced(self) -> tuple[SlicePlan, list[str] | None]:
        """How the model can be cut, split as the recipe lists, and the parameters that learn (None: all).

        Raises:
            NotSliceableError: it cannot be cut, and the recipe wants stages.
        """
        from llmpipe_cli.model.slicing.trace import NotSliceableError, trace_config, whole_plan
        from llmpipe_cli.plan.cuts import split_as_listed
        from llmpipe_cli.plan.layout import fixed
        from llmpipe_cli.plan.learning import choose_learning

        recipe, cls, config = self.recipe, self.cls, self.config
        length, attention = recipe.data.sequence_len, self.section.attn_implementation
        try:
            plan = trace_config(cls, config, recipe.task, sequence_len=length, attn_implementation=attention)
        except NotSliceableError:
            if recipe.parallel.pipeline not in (1, "auto"):
                raise
            plan = whole_plan(cls, config)
        if recipe.lora is not None:
            return plan, []  # the adapters are small beside what is frozen
        learning = choose_learning(recipe, "train", cls, config, plan, self.section, None, None)
        tensor = fixed(recipe.parallel.tensor) or 1
        plan = split_as_listed(recipe, tensor, cls, config, learning.slice_plan, learning.trainable)
        return plan, learning.trainable

    def profile(self, plan: SlicePlan, trainable: list[str] | None, device: str) -> ModelProfile:
        """What the segments of a slice plan cost; `device` is "cuda" or "cpu": whose kernels it will run."""
        from llmpipe_cli.plan.measure import measure_profile

        return measure_profile(
            self.cls,
            self.config,
            self.recipe.task,
            plan,
            dtype=self.recipe.model.dtype,
            attn_implementation=self.section.attn_implementation,
            trainable=trainable,
            device=device,
        )


def recipe_model(recipe: Recipe) -> RecipeModel:
    """The recipe's model.

    Raises:
        UsageError: no such model.
    """
    from llmpipe_cli.model.adapters import config_section, split_adapter
    from llmpipe_cli.model.auto import load_config, model_class

    section, adapter = split_adapter(recipe.model)
    tokenizer = recipe.tokenizer
    vocab_size = None if tokenizer is None or isinstance(tokenizer, str) else tokenizer.train.vocab_size
    config = load_config(config_section(section, adapter), recipe.task, vocab_size=vocab_size)
    return RecipeModel(recipe, section, model_class(config, recipe.task), config)


def recipe_profile(recipe: Recipe, device: str = "cuda") -> ModelProfile:
    """The profile of the recipe's model.

    Args:
        recipe: the recipe.
        device: "cuda" or "cpu": whose kernels it will run.

    Raises:
        UsageError: no such model, or one that cannot be traced.
    """
    from llmpipe_cli.plan.stand_in import stand_in

    return stand_in(recipe_model(recipe), device).profile
