"""What `--help` shows: laid out as all replies are, so that names are whole at any width."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from typer.core import TyperArgument, TyperCommand, TyperGroup
from typer.exceptions import TyperException

from quantkit.cli.console import Answered, Reply, render_plain
from quantkit.cli.layout import Cell, Line, Sentence, make_table
from quantkit.errors import nearest

_INDENT = "  "
_TITLE = "bold"


class HelpfulCommand(TyperCommand):
    """A command whose help is a reply."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; what is refused names this command, which the parser itself does not know."""
        try:
            return super().parse_args(ctx, args)
        except TyperException as error:
            if getattr(error, "ctx", self) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise

    def get_help(self, ctx: Any) -> str:
        """Answer with the help; raises `Answered`."""
        raise Answered(_reply(self, ctx))


class HelpfulGroup(TyperGroup):
    """A group of commands whose help is a reply."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuse what is no command, and name the one that is meant, if one is near."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            shown = (name for name, each in self.commands.items() if not each.hidden)
            ctx.fail(f"no such command {args[0]!r}{nearest(args[0], shown)}")
        return super().resolve_command(ctx, args)

    def get_help(self, ctx: Any) -> str:
        """Answer with the help; raises `Answered`."""
        raise Answered(_reply(self, ctx))


def _reply(command: TyperCommand | TyperGroup, context: Any) -> Reply:
    lines = list(_list_lines(command, context))
    return Reply({"help": render_plain(lines)}, lines)


def _list_lines(command: TyperCommand | TyperGroup, context: Any) -> Iterator[Line]:
    shown = [each for each in command.get_params(context) if not getattr(each, "hidden", False)]
    arguments = [each for each in shown if isinstance(each, TyperArgument)]
    options = [each for each in shown if not isinstance(each, TyperArgument)]
    commands = [each for each in getattr(command, "commands", {}).values() if not each.hidden]
    rest: list[str] = [
        str(each.metavar) if each.required else f"[{each.metavar}]" for each in arguments
    ]
    rest += ["COMMAND ..."] if commands else []
    yield Sentence("Usage: ", " ".join([context.command_path, "[OPTIONS]", *rest]))
    yield ""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield Sentence("", " ".join(paragraph.split()))
        yield ""
    sections = (
        ("Arguments", [(str(each.metavar), _describe(each)) for each in arguments]),
        ("Commands", [(each.name, _summarize(each.help)) for each in commands]),
        ("Options", [(_name_option(each), _describe(each)) for each in options]),
    )
    for title, rows in sections:
        if rows:
            yield Sentence("", "", Cell(f"{title}:", _TITLE))
            yield make_table(
                (Cell(f"{_INDENT}{name}", "bold", whole=True), words) for name, words in rows
            )
            yield ""
    yield str(command.epilog)


def _name_option(option: Any) -> str:
    names = [name.strip() for name in (*option.opts, *option.secondary_opts) if name.strip()]
    value = "" if option.is_flag else f" {option.metavar}"
    return f"{'/'.join(names)}{value}"


def _describe(parameter: Any) -> str:
    """What a parameter is for, and what is to be known about it besides."""
    more = []
    if parameter.required:
        more.append("required")
    if isinstance(parameter.default, str | int) and not isinstance(parameter.default, bool):
        more.append(f"default: {parameter.default}")
    if parameter.envvar:
        more.append(f"or ${parameter.envvar}")
    return " ".join(filter(None, (parameter.help, f"({'; '.join(more)})" if more else "")))


def _summarize(text: str | None) -> str:
    """The first paragraph in one line."""
    return " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())
