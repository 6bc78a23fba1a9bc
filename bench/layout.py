"""What a batch of the update step looks like, as the words of a variant's column `what`."""

import random
from dataclasses import dataclass, fields

from roma_kernels.errors import fail

AROUND = 3  # tokens of a prompt around its image and its words


@dataclass(frozen=True)
class Layout:
    """P prompts of equal length, each with an image and G rollouts of up to T tokens."""

    prompts: int
    rollouts: int
    completion: int
    """T, tokens."""
    prompt: int
    """Tokens, those of the image included."""
    image: int
    """Image tokens, a multiple of 4."""
    layers: int = 4
    ragged: bool = False
    """Completions of T/8 to T tokens; else all have T."""
    checkpointed: bool = False

    @classmethod
    def of(cls, what: str) -> "Layout":
        """A layout by its words.

        Raises:
            ValueError: a word that no layout has.
        """
        found: dict[str, int | bool] = {}
        known = {field.name: field.type for field in fields(cls)}
        for word in what.split():
            name, sign, number = word.partition("=")
            if name not in known or (known[name] is bool) == bool(sign):
                fail("what", "a layout, such as 'prompts=2 rollouts=8 …'", word, "see Layout")
            found[name] = int(number) if sign else True
        return cls(**found)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """The words."""
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                words += [field.name] if value else []
            else:
                words.append(f"{field.name}={value}")
        return " ".join(words)

    @property
    def tokens(self) -> int:
        """Tokens of all completions."""
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """[P·G] tokens of each completion; the longest has T."""
        count = self.prompts * self.rollouts
        if not self.ragged:
            return [self.completion] * count
        drawn = random.Random(0)
        return [
            self.completion,
            *(drawn.randint(self.completion // 8, self.completion) for _ in range(count - 1)),
        ]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens, as square as they come."""
        rows = int(self.image**0.5)
        while self.image % rows:
            rows -= 1
        return rows, self.image // rows
