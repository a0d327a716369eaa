"""Every state in which a machine that loses its power may leave a directory, from the system calls of what wrote to it.

A file system keeps its promises here and nothing more (POSIX):

    what is written to a file          is there after a crash only if the file was flushed afterwards; else all, none, half
                                       of it, or zeros in its place
    what is changed in a directory     is there only if the directory was flushed afterwards; else each change for itself
                                       may be there or not; a rename is there as a whole or not at all

    recorded calls -> `Disk`, call by call -> `states()` after each call -> trees {path: content}

A process that is killed leaves what all calls up to then have made: the state with everything kept.
"""

import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from tests.helpers.strace import Call, texts_of

Tree = dict[str, bytes | None]
"""Paths below the directory with their contents; None: a directory."""

TRACED = (
    "open,openat,creat,close,lseek,mmap,write,pwrite64,writev,pwritev,pwritev2,sendfile,copy_file_range,fallocate,"
    "fsync,fdatasync,sync,syncfs,sync_file_range,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,link,linkat,"
    "symlink,symlinkat,truncate,ftruncate"
)
_PASSED_OVER = ("close", "mmap", "lseek")
_DESCRIPTOR = re.compile(r"^(\d+)<((?:\\x[0-9a-f]{2})+)>")
_RANDOM_STATES = 6


@dataclass
class File:
    """One inode of a file."""

    flushed: bytes = b""
    written: list[tuple[int, bytes]] = field(default_factory=list)
    """Not flushed yet, oldest first: content from an offset on. An empty one cuts the file there."""
    _known: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def content(self, how: str = "kept") -> bytes:
        """The bytes after a crash that leaves what was not flushed `how`: kept, dropped, half or zeros."""
        key = (how, len(self.written))
        if key not in self._known:
            self._known[key] = self._content(how)
        return self._known[key]

    def _content(self, how: str) -> bytes:
        total, done = sum(len(part) for _, part in self.written), 0
        content = bytearray(self.flushed)
        for offset, part in self.written:
            if how == "dropped":
                break
            room = total // 2 - done if how == "half" else len(part)
            part_kept, done = part[: max(0, room)], done + len(part)
            if not part:
                del content[offset:]
            elif part_kept:
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + len(part_kept)] = bytes(len(part_kept)) if how == "zeros" else part_kept
        return bytes(content)


Node = int
"""Number of an inode; that of the directory itself is 0."""
Change = tuple[tuple[Node, str, Node | None], ...]
"""What one call does to directories: (directory, name, what it names from now on, or None)."""


class Disk:
    """The directory `root` as a file system holds it: what is flushed, and what is not yet."""

    def __init__(self, root: Path, before: Tree) -> None:
        self.root = str(root).encode()
        self._numbers = count(1)
        self.files: dict[Node, File] = {}
        self.flushed: dict[Node, dict[str, Node]] = {0: {}}
        self.now: dict[Node, dict[str, Node]] = {0: {}}
        self.pending: list[Change] = []
        self._opened: dict[bytes, tuple[Node, int]] = {}
        for path, content in sorted(before.items()):
            self._create(path, content)
        for node, file in self.files.items():
            self.files[node] = File(flushed=file.content())
        for directory in list(self.now):
            self._flush(directory)

    # ---- the calls ---------------------------------------------------------------------------------------------------

    def apply(self, call: Call) -> bool:
        """What a call does; False where it does nothing to this directory."""
        if call.result < 0 or not any(self._is_inside(text) for text in texts_of(call.arguments)):
            return False
        name = call.name.removesuffix("2").removesuffix("at") if call.name != "openat" else "open"
        act = getattr(self, f"_{name}", None)
        if act is not None:
            return bool(act(call))
        is_read_only = not ("MAP_SHARED" in call.arguments and "PROT_WRITE" in call.arguments)
        assert name in _PASSED_OVER and is_read_only, f"{call.name} is not modelled: {call.arguments[:200]}"
        return False

    def _open(self, call: Call) -> bool:
        path = self._paths(call)[0]
        descriptor = str(call.result).encode()
        existed = self._node(path) is not None
        if not existed and "O_CREAT" in call.arguments:
            self._create(path, b"")
        node = self._node(path)
        if node is None or node not in self.files:
            return False
        self._opened[descriptor + os.fsencode(path)] = (node, 0)
        if existed and "O_TRUNC" in call.arguments and self.files[node].content():
            self.files[node].written.append((0, b""))
            return True
        return not existed

    def _lseek(self, call: Call) -> bool:
        if self._key(call) in self._opened:  # reading a directory seeks too
            key, node, _ = self._descriptor(call)
            self._opened[key] = (node, call.result)
        return False

    def _write(self, call: Call) -> bool:
        key, node, at = self._descriptor(call)
        parts = re.findall(r'"((?:\\x[0-9a-f]{2})*)"', call.arguments)
        content = bytes.fromhex("".join(parts).replace("\\x", ""))[: call.result]
        assert len(content) == call.result, f"{call.name} of {call.result} bytes was recorded with {len(content)}"
        if call.name.startswith("p"):
            at = int(call.arguments.rsplit(",", 1)[1])
        else:
            self._opened[key] = (node, at + call.result)
        if content:
            self.files[node].written.append((at, content))
        return bool(content)

    _writev = _pwrite64 = _pwritev = _write

    def _sendfile(self, call: Call) -> bool:
        """Copies into the directory come from outside and are not looked at: their bytes count, not their values."""
        key, node, at = self._descriptor(call)
        self._opened[key] = (node, at + call.result)
        if call.result:
            self.files[node].written.append((at, b"\1" * call.result))
        return call.result > 0

    def _ftruncate(self, call: Call) -> bool:
        _, node, _ = self._descriptor(call)
        size, now = int(call.arguments.rsplit(",", 1)[1]), len(self.files[node].content())
        self.files[node].written.append((size, b"") if size < now else (now, bytes(size - now)))
        return size != now

    def _fsync(self, call: Call) -> bool:
        node = self._node(self._paths(call)[0])
        assert node is not None, call
        if node in self.files:
            self.files[node] = File(flushed=self.files[node].content())
        else:
            self._flush(node)
        return True

    _fdatasync = _fsync

    def _rename(self, call: Call) -> bool:
        (old, old_name), (new, new_name) = (self._place(path) for path in self._paths(call)[-2:])
        self._change(((old, old_name, None), (new, new_name, self.now[old][old_name])))
        return True

    def _unlink(self, call: Call) -> bool:
        directory, name = self._place("/".join(self._paths(call)))
        self._change(((directory, name, None),))
        return True

    _rmdir = _unlink

    def _mkdir(self, call: Call) -> bool:
        self._create(self._paths(call)[-1], None)
        return True

    # ---- inodes ------------------------------------------------------------------------------------------------------

    def _is_inside(self, text: bytes) -> bool:
        return text == self.root or text.startswith(self.root + b"/")

    def _paths(self, call: Call) -> list[str]:
        """Paths in the arguments, relative to the directory; one relative to a descriptor is in two parts."""
        found = [text for text in texts_of(call.arguments) if self._is_inside(text) or b"/" not in text]
        return [os.fsdecode(text.removeprefix(self.root).strip(b"/") if self._is_inside(text) else text) for text in found]

    def _key(self, call: Call) -> bytes:
        matched = _DESCRIPTOR.match(call.arguments)
        assert matched is not None, call.arguments[:200]
        return matched[1].encode() + os.fsencode(self._paths(call)[0])

    def _descriptor(self, call: Call) -> tuple[bytes, Node, int]:
        """(key in `_opened`, file, position) of the descriptor that is the first argument."""
        key = self._key(call)
        assert key in self._opened, f"{call.name} to a file that was not seen to be opened: {key!r}"
        return key, *self._opened[key]

    def _place(self, path: str) -> tuple[Node, str]:
        """(directory, name in it) of a path."""
        directory: Node = 0
        *folders, name = path.split("/")
        for folder in folders:
            directory = self.now[directory][folder]
        return directory, name

    def _node(self, path: str) -> Node | None:
        if not path:
            return 0
        directory, name = self._place(path)
        return self.now[directory].get(name)

    def _create(self, path: str, content: bytes | None) -> None:
        directory, name = self._place(path)
        node = next(self._numbers)
        if content is None:
            self.now[node], self.flushed[node] = {}, {}
        else:
            self.files[node] = File(written=[(0, content)] if content else [])
        self._change(((directory, name, node),))

    def _change(self, change: Change) -> None:
        _edit(self.now, change)
        self.pending.append(change)

    def _flush(self, directory: Node) -> None:
        """The directory is flushed: what its names are is sure from now on."""
        for change in self.pending:
            if any(changed == directory for changed, _, _ in change):
                _edit(self.flushed, change)
        self.pending = [change for change in self.pending if all(changed != directory for changed, _, _ in change)]

    # ---- after a crash -----------------------------------------------------------------------------------------------

    def states(self, generator: random.Random) -> Iterator[Tree]:
        """What may be there after a crash now; the first is what a kill leaves."""
        unsure = [node for node, file in self.files.items() if file.written]
        everything = self.pending
        yield self.tree(everything, {})
        if not unsure and not everything:
            return
        for how in ("kept", "dropped", "half", "zeros") if unsure else ("kept",):
            yield self.tree(everything, dict.fromkeys(unsure, how))
            yield self.tree([], dict.fromkeys(unsure, how))
        for left_out, change in enumerate(everything):
            yield self.tree(everything[:left_out] + everything[left_out + 1 :], {})
            yield self.tree([change], dict.fromkeys(unsure, "dropped"))
        for node in unsure:
            yield self.tree(everything, {node: "dropped"})
        for _ in range(_RANDOM_STATES):
            kept = [change for change in everything if generator.random() < 0.7]
            yield self.tree(kept, {node: generator.choice(("kept", "dropped", "half", "zeros")) for node in unsure})

    def tree(self, changes: list[Change], contents: dict[Node, str]) -> Tree:
        directories = {node: dict(names) for node, names in self.flushed.items()}
        for change in changes:
            _edit(directories, change)
        found: Tree = {}

        def walk(directory: Node, path: str) -> None:
            for name, node in directories[directory].items():
                if node in self.files:
                    found[path + name] = self.files[node].content(contents.get(node, "kept"))
                else:
                    found[path + name] = None
                    walk(node, f"{path}{name}/")

        walk(0, "")
        return found


def _edit(directories: dict[Node, dict[str, Node]], change: Change) -> None:
    for directory, name, node in change:
        if node is None:
            directories[directory].pop(name, None)
        else:
            directories[directory][name] = node


def read_tree(root: Path) -> Tree:
    return {str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))}
