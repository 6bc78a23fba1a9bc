"""Vision-language models taken apart into the passes that a trainer needs, and their processors."""
