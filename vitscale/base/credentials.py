"""Keep credentials out of what is written down: records, logs, messages.

They belong into the environment, which nothing here stores. A command that holds some all the same is stored without.
"""

import re
from collections.abc import Sequence

HIDDEN = "***"
_USER = re.compile(r"(?<=://)[^\s?#,'\"]*@")  # a secret may hold a slash
_QUERY = re.compile(r"(://[^\s?'\"]*\?)[^\s'\"]+")
# Not every token is a secret: model.class_token=true is none.
_NAME = (
    r"(?:(?<![a-z])(?:(?:hf|hub|api|auth|access|bearer|session|security|github|wandb)[_-]?)?token(?![a-z])"
    r"|secret|passw(?:or)?d|credential|api[_-]?key|access[_-]?key|account[_-]?key|private[_-]?key)[\w.-]*"
)
_NAMED = re.compile(rf"((?<!class_){_NAME}['\"]?\s*[=:]\s*['\"]?)[^\s,;&'\"]+", re.IGNORECASE)
_FLAG = re.compile(rf"--[\w-]*?(?<!class[_-]){_NAME}", re.IGNORECASE)


def masked(text: str) -> str:
    """The text with *** for user and password of a URL, its query, and the value of what is called a secret."""
    return _NAMED.sub(rf"\1{HIDDEN}", _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text)))


def masked_words(words: Sequence[str]) -> list[str]:
    """The words of a command; also what follows a flag such as --token."""
    return [
        HIDDEN if before is not None and _FLAG.fullmatch(before) else masked(word)
        for before, word in zip([None, *words], words, strict=False)
    ]
