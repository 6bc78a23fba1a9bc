"""The file for `swift rlhf --external_plugins`.

`python -m roma.integrations.swift` prints its path. swift runs it before it chooses a trainer,
and again in the workers of a data loader.
"""

from roma.integrations.swift import register

register()
