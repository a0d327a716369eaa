"""Command lines that answer a wrong word with one sentence and exit code 2."""

import argparse
from typing import NoReturn

from vitscale.base.errors import UsageError, nearest


class Parser(argparse.ArgumentParser):
    """ArgumentParser without abbreviations, whose errors are UsageError: `run_main` prints them."""

    def __init__(self, *, description: str, epilog: str = "", prog: str | None = None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, epilog=epilog, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        words = message.removeprefix("unrecognized arguments: ").split()
        hint = nearest(words[0].split("=")[0], self._option_string_actions) if message.startswith("unrecognized") else ""
        raise UsageError(f"{self.prog}: {message}{hint or '; see --help'}")
