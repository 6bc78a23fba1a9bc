"""`python -m experiments.accumulator`: the table of docs/MATH.md section 7."""

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from bench import data
from experiments.accumulator.measure import PRODUCTS, Product, Row, measure, of
from roma.testing.matrix_unit import MatrixUnit

BF16 = "logits rounded to bf16"
CARD = "this card, its vendor's product"


def rounded(states: Tensor, weight: Tensor) -> Tensor:
    """Exact logits, then bf16."""
    parts = [states.double() @ part.double().T for part in weight.split(8192)]
    return torch.cat([part.float().bfloat16() for part in parts], -1)


def by_vendor(states: Tensor, weight: Tensor) -> Tensor:
    """Logits in fp32 from the device's own library."""
    product = torch.mm(states.flatten(0, 1), weight.T, out_dtype=torch.float32)
    return product.view(*states.shape[:2], -1)


def gaussian(shape: data.Shape, device: str) -> data.Case:
    """Gaussian states and head, logits of standard deviation 5.3; every token as likely.

    The target's logit is then far below the largest, and the two errors do not cancel.
    """
    draw = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device)

    weight = normal(shape.vocab, shape.depth).to(shape.dtype)
    clean = normal(shape.tokens, shape.depth) * (5.3 / shape.depth**0.5)
    views = [clean * (1 + data.SHIFT * normal(*clean.shape)) for _ in range(shape.views)]
    tokens = torch.randint(shape.vocab, (shape.tokens,), generator=draw, device=device)
    return data.Case(shape, torch.stack([clean, *views]).to(shape.dtype), weight, tokens)


def table(title: str, rows: dict[str, Row]) -> str:
    """In Markdown."""
    lines = [
        f"| {title} | logp: rms | max | δ: rms | max | worst view as float64 |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        off = (row.logp_rms, row.logp_max, row.delta_rms, row.delta_max)
        cells = [*(f"{x:.1e}" for x in off), f"{row.worst_view:.1%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints one table for data like a language model's and one for Gaussian data."""
    parser = argparse.ArgumentParser(prog="python -m experiments.accumulator", description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--depth", type=int, default=4096, help="D (4096)")
    parser.add_argument("--vocab", type=int, default=16_384, help="V (16384)")
    parser.add_argument(
        "--full", action="store_true", help="256 tokens, V = 151,936: 7 GB, minutes"
    )
    parser.add_argument("--terms", type=int, help="a unit of your own: products added at once")
    parser.add_argument("--guard", type=int, default=0, help="its bits below fp32's last place")
    parser.add_argument(
        "--device", default="cpu", help="cuda: measures this card beside the models"
    )
    options = parser.parse_args()
    shape = data.Shape(options.tokens, options.views, options.depth, options.vocab)
    if options.full:
        shape = replace(shape, tokens=256, vocab=151_936)
    products: dict[str, Product] = {BF16: rounded, **PRODUCTS}
    if options.terms:
        name = f"{options.terms} terms, {options.guard} guard bits"
        products[name] = of(MatrixUnit(options.terms, options.guard))
    if options.device.startswith("cuda"):
        products[CARD] = by_vendor
    print(f"{shape}: errors in nats against float64 on the same bf16 inputs\n")
    for title, make in (("like a language model's", data.make), ("Gaussian", gaussian)):
        rows = measure(make(shape, options.device), products, whole=(BF16, CARD))
        print(table(title, rows), "\n")


if __name__ == "__main__":
    main()
