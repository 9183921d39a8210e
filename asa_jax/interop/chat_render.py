"""Renders one chat template in a process of its own, with little memory and time.

A template comes with the weights of a stranger. jinja2's sandbox keeps it from everything but its
variables, but not from looping or growing without end, which the limits of a process do. Reads
{"template", "variables"} as JSON from stdin and writes {"text"} or {"error"} to stdout. Run by its
path and isolated, so that nothing but jinja2 is imported.
"""

import datetime
import json
import resource
import sys
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 5
MAX_MEMORY_BYTES = 2**29
MAX_TEXT_CHARACTERS = 2**24


class Generation(Extension):
    """`{% generation %}` marks what the model says, for training on it; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, variables: dict[str, Any]) -> str:
    """Renders a template as `transformers` does.

    Args:
        template: jinja2 source.
        variables: messages, special tokens and so on.

    Returns:
        The text.

    Raises:
        TemplateError: the template is broken, reaches for what it may not, or refuses the messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    environment.filters["tojson"] = _to_json
    return environment.from_string(template).render(**variables)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **kw: Any) -> str:
    # jinja2's own filter writes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **kw)


def _answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        text = render(request["template"], request["variables"])
    except MemoryError:
        return {"error": f"needs more than {MAX_MEMORY_BYTES} bytes of memory"}
    except Exception as error:  # whatever the template made happen
        return {"error": str(error) or repr(error)}
    if len(text) > MAX_TEXT_CHARACTERS:
        return {"error": f"makes a text of {len(text)} characters, more than {MAX_TEXT_CHARACTERS}"}
    return {"text": text}


if __name__ == "__main__":
    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    json.dump(_answer(request), sys.stdout)
