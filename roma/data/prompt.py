"""Templates of prompts: a jinja file in which `content` is the question, as EasyR1 has them."""

from collections.abc import Callable
from pathlib import Path

from roma_kernels.errors import fail


def read_format(path: str | Path) -> Callable[[str], str]:
    r"""Reads a template of prompts.

    Args:
        path: a text such as `{{ content | trim }} Answer in \boxed{}.`; blanks around it are
            dropped.

    Returns:
        From a question to the prompt's text. `<image>` in the question stays where it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a jinja template, another variable than `content`, or none.

    Example:
        >>> from tempfile import NamedTemporaryFile
        >>> with NamedTemporaryFile("w", suffix=".jinja") as file:
        ...     _ = file.write("{{ content | trim }} Think first."), file.flush()
        ...     read_format(file.name)(" <image> sum ? ")
        '<image> sum ? Think first.'
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    key = "data.format_prompt"
    if not Path(path).is_file():
        fail(key, "a jinja file", str(path), "check the path", error=FileNotFoundError)
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
        template = ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(text)
        made = template.render(content="\0")
    except (TemplateError, UnicodeDecodeError) as error:
        fail(key, "a jinja template of `content`", f"{path} ({error})", "correct it")
    if "\0" not in made:
        fail(key, "{{ content }} in it", f"{path} without", "the question would be missing")

    def formatted(question: str) -> str:
        return template.render(content=question)

    return formatted
