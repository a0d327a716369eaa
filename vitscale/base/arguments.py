"""Command lines whose mistakes are one sentence."""

import argparse
from typing import NoReturn

from vitscale.base.errors import UsageError, nearest


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError with the nearest flag instead of printing its usage and leaving."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
            hint = nearest(word, self._option_string_actions)
        raise UsageError(f"{message}{hint} (--help lists what there is)")
