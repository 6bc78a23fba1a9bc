"""Run as a program: the providers as a Markdown table, each with its version or why it is not here.

python -m bench.providers
"""

import torch

from bench.providers import PROVIDERS, Provider, Unavailable, version_of

HEADER = "| provider | package | here | logits | products | what |\n|---|---|---|---|---|---|"


def here(provider: Provider, device: str) -> str:
    """Its version, or the reason why it cannot run."""
    try:
        provider.load(device)
    except Unavailable as why:
        return f"no: {why}"
    return version_of(provider.package)


def main() -> None:
    """Prints the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(HEADER)
    for p in PROVIDERS:
        cells = (p.name, p.package, here(p, device), p.logits, p.passes, p.what)
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
