"""Slicing a transformers model into pipeline segments: `trace` finds the plan, `StageReplay` runs a stage of it."""

from llmpipe_cli.model.slicing.plan import SlicePlan
from llmpipe_cli.model.slicing.replay import StageReplay
from llmpipe_cli.model.slicing.trace import trace, trace_config, whole_plan

__all__ = ["SlicePlan", "StageReplay", "trace", "trace_config", "whole_plan"]
