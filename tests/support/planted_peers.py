"""Imported by a worker: a peer for every fault."""

from support.planted import FAULTS, provider

from bench.providers import PROVIDERS

PROVIDERS += [provider(name, make()) for name, (make, _) in FAULTS.items()]
