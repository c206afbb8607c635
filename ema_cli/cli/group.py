"""``ema-avg`` itself: what it is, its commands by what people want to do, and where to read on."""

from __future__ import annotations

import click

SECTIONS = {
    "Average": ("plan", "run", "watch"),
    "Look": ("inspect", "map", "diff"),
    "Write": ("rename", "export"),
    "Check": ("verify",),
}
EXAMPLES = (
    "ema-avg plan train_dir",
    "ema-avg run train_dir -o average.safetensors",
)
_MORE = {
    "Settings": "An option on the command line counts first, then the environment, such as "
    "EMA_AVG_RUN_DECAY=0.99, then a file that --config or EMA_AVG_CONFIG names, with a table for "
    "each command: [run] and below it decay = 0.99.",
}
_SHELLS = (
    ("bash", 'eval "$(_EMA_AVG_COMPLETE=bash_source ema-avg)"', "~/.bashrc"),
    ("zsh", 'eval "$(_EMA_AVG_COMPLETE=zsh_source ema-avg)"', "~/.zshrc, after compinit"),
    ("fish", "_EMA_AVG_COMPLETE=fish_source ema-avg | source", "~/.config/fish/config.fish"),
)


class Group(click.Group):
    """The commands under the headings of what people want to do.

    Alone it shows what it is and can do; its ``--help`` shows how to set it up besides.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does, having noted whether the answer is JSON."""
        ctx.meta["as_json"] = "--json" in args  # until the command says it
        return super().parse_args(ctx, args)

    def overview(self, ctx: click.Context) -> str:
        """Return the commands and how to learn more, without options and set-up."""
        formatter = ctx.make_formatter()
        self._write_head(ctx, formatter)
        self.format_commands(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text(
            "ema-avg COMMAND --help tells of a command, ema-avg --help of settings and of "
            "completion in the shell."
        )
        return formatter.getvalue().rstrip("\n")

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, the options, how to give settings, and how words are completed."""
        self._write_head(ctx, formatter)
        self.format_options(ctx, formatter)
        for title, text in _MORE.items():
            with formatter.section(title):
                formatter.write_text(text)
        with formatter.section("Completion"):
            formatter.write_text("Put the line of your shell into the file that it reads first.")
            for shell, line, place in _SHELLS:
                formatter.write(f"\n  {shell}, in {place}:\n    {line}\n")

    def _write_head(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "COMMAND [OPTIONS] ...")
        with formatter.section("Example"):
            formatter.write("".join(f"  {line}\n" for line in EXAMPLES))
        self.format_help_text(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their headings."""
        for title, names in SECTIONS.items():
            with formatter.section(title):
                commands = ((name, self.get_command(ctx, name)) for name in names)
                formatter.write_dl([(n, c.get_short_help_str(70)) for n, c in commands if c])
