"""The experiment's configuration: what a YAML file may say, its defaults and its checks.

This is the first of two stages of validation: schema and values, without torch, flwr or grpc.
Names of models, strategies, optimizers and partitioners are checked in the second stage
(`fedhpc.preflight`) against the installed packages.
"""

from fedhpc.config.loading import dump, load, parse, schema
from fedhpc.config.sections import (
    Checkpoints,
    Cluster,
    Config,
    Data,
    Failures,
    Federation,
    Isolation,
    JobOptions,
    Named,
)

__all__ = [
    "Checkpoints",
    "Cluster",
    "Config",
    "Data",
    "Failures",
    "Federation",
    "Isolation",
    "JobOptions",
    "Named",
    "dump",
    "load",
    "parse",
    "schema",
]
