"""Tensor parallelism: the layers of one stage divided over several ranks (Shoeybi et al. 2019)."""
