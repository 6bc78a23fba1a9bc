"""Imported by a worker: ours beside a slow peer, a wrong one, and one with wrong gradients."""

import time

from support.planted import always, backwards, provider, shifted

from bench.providers import PROVIDERS

PROVIDERS[1:] = [
    provider("slow", always(lambda: time.sleep(0.3))),
    provider("shifted", shifted),
    provider("scaled", backwards(lambda g: 1.1 * g)),
]
