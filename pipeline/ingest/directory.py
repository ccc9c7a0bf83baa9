"""What lies in a user's directory: its files, those that cannot be used, and those that are left out.

Nothing outside the directory is read, and no file is opened.
"""

import errno
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cache
from pathlib import Path

from pipeline.dataset.decoding import EXTENSIONS

TABLE = "labels.csv"
OPTIONAL = {"weight": "1", "group": "", "stratum": "", "subset": "", "split": ""}
# What file servers, desktops and programs put beside the files of their users, in lower case
SYSTEM = {
    *("@eadir", "@__thumb", "@recycle", "@recently-snapshot", "@tmp", "@sharebin", "#recycle", "#snapshot"),
    "~snapshot",
    *("$recycle.bin", "recycler", "system volume information", "thumbs.db", "thumbs.db:encryptable", "ehthumbs.db"),
    *("ehthumbs_vista.db", "desktop.ini", "picasa.ini", "zbthumbnail.info", "found.000", "lost+found", "icon\r"),
    *("__macosx", "network trash folder", "temporary items", "thevolumesettingsfolder", "__pycache__"),
}
UNREAD = {  # extensions of image formats that are not read: such a file was meant to be an image
    *(".heic", ".heif", ".jxl", ".jxr", ".wdp", ".svg", ".psd", ".psb", ".ico", ".icns", ".cur", ".tga", ".dds"),
    *(".exr", ".hdr", ".pcx", ".sgi", ".ras", ".xbm", ".xpm", ".xcf", ".kra", ".djvu", ".eps", ".ps", ".ai", ".fits"),
    *(".cr2", ".cr3", ".nef", ".nrw", ".arw", ".dng", ".orf", ".rw2", ".raf", ".raw", ".pef", ".srw", ".x3f", ".dcm"),
    *(".dicom", ".svs", ".ndpi", ".czi", ".lif", ".nd2", ".scn", ".mrxs"),
}
IMAGE_EXTENSIONS = {*sum(EXTENSIONS.values(), ()), *UNREAD}
# Of what is no file, or is left out, but no mistake
HIDDEN, EXCLUDED, FOLDER = "is hidden or of the system", "is left out by dataset.exclude", "is a directory"
# Kinds of files by the first letter of their mode, as `ls -l` shows it
KINDS = {"d": "a directory", "p": "a pipe", "s": "a socket", "b": "a device", "c": "a device"}
Row = dict[str, str]  # path, label and the columns of OPTIONAL
Entry = tuple[str, str | None]  # what lies in the directory: its path from there, and why it cannot be used
Check = Callable[[str], str | None]  # why a path is no file within the directory, None if it is one


@dataclass(frozen=True)
class Found:
    """What labels.csv or the directories of classes list; the fields are those of listing.Listing."""

    rows: list[Row]
    rejected: list[tuple[str, str]]
    warnings: list[str]
    skipped: dict[str, int] = field(default_factory=dict)
    layout: str = ""


def walk(directory: Path, exclude: Sequence[str]) -> Iterator[Entry]:
    """Each file below, by its path from there, and why it cannot be used, None if it can; FOLDER for a directory.

    Directories that are HIDDEN or EXCLUDED are not entered.

    Links to files are followed within the directory. Links to directories never are: they could run in circles.
    """
    check, folders = make_check(directory), [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(directory / folder))
        except OSError as error:
            yield folder, f"cannot be read: {error.strerror}"
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.endswith(".icloud"):
                yield path, "is a placeholder of iCloud for a file that is not on this machine; download it"
            elif is_system(entry.name):
                yield path, HIDDEN
            elif any(fits(path, pattern) for pattern in exclude):
                yield path, EXCLUDED
            elif entry.name.encode(errors="ignore").decode() != entry.name:
                yield path, "has a name that is not UTF-8"
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
                yield path, FOLDER
            else:
                yield path, None if entry.is_file(follow_symlinks=False) else check(entry.path)


def make_check(directory: Path) -> Check:
    """Make the function that says why a path is no file within `directory`. It remembers resolved directories."""
    inside = os.path.join(os.path.realpath(directory), "")
    resolve = cache(lambda folder: os.path.realpath(folder))

    def check(path: str) -> str | None:
        folder, name = os.path.split(path)
        target, is_link = os.path.join(resolve(folder), name), False
        try:
            if target.startswith(inside) and (is_link := stat.S_ISLNK(os.lstat(target).st_mode)):
                target = os.path.realpath(target)
            if not target.startswith(inside):
                return "is a link that leads out of the directory"
            kind = stat.filemode(os.stat(target).st_mode)[0]
        except (FileNotFoundError, NotADirectoryError):
            return "is a broken link" if is_link else "does not exist"
        except OSError as error:
            is_circle = error.errno == errno.ELOOP
            return "is a link that runs in a circle" if is_circle else f"cannot be read: {error.strerror}"
        if is_link and kind == "d":
            return "is a link to a directory, which is not followed"
        return None if kind == "-" else f"is {KINDS.get(kind, 'something else')}; expected a file"

    return check


def fits(path: str, pattern: str) -> bool:
    """Whether a file or directory fits a pattern: by its name, or by its path if the pattern contains a slash.

    `*` fits any signs, slashes too. `**/` before a pattern: in any directory. `/*` behind one: all that lies in it.
    """
    regex, is_path = _compiled(pattern)
    text = unicodedata.normalize("NFC", path if is_path else path.rsplit("/", 1)[-1])
    return regex.match(f"/{text}") is not None


@cache
def _compiled(pattern: str) -> tuple[re.Pattern[str], bool]:
    start, plain = "*/" if pattern.startswith("**/") else "/", pattern.removeprefix("./").removeprefix("**/")
    is_path = "/" in plain.rstrip("/")
    plain = unicodedata.normalize("NFC", re.sub(r"(?<=[^/*])(/\*+)*/*$", "", plain).lstrip("/"))
    return re.compile(f"{re.escape(start + plain)}$|{translate(start + plain)}"), is_path


def is_system(name: str) -> bool:
    """Whether a file or directory is hidden, or of a file server, a desktop or a program."""
    return name.startswith((".", "~$")) or name.casefold() in SYSTEM or name.lower().endswith(("~", ".lrdata"))


def left_out(
    directory: Path, entries: Iterable[Entry], exclude: Sequence[str], listed: Collection[str] = ()
) -> tuple[dict[str, int], list[str]]:
    """Count the files that are hidden or of the system, and those left out by pattern; `listed` ones are not."""
    hidden, excluded = Counter(), Counter()
    for path, problem in entries:
        if problem == HIDDEN:
            name = path.rsplit("/", 1)[-1]
            hidden["._*" if name.startswith("._") else name] += count_files(directory / path)
        elif problem == EXCLUDED and path != TABLE:
            excluded[next(pattern for pattern in exclude if fits(path, pattern))] += count_files(directory / path)
    for path in listed:
        if system := [name for name in path.split("/") if is_system(name)]:
            hidden["._*" if system[0].startswith("._") else system[0]] -= 1
    skipped, warnings = {}, []
    if n := hidden.total():
        skipped["hidden or of the system"] = n
        warnings.append(f"{n} hidden or system files were left out: {counted(+hidden)}")
    if n := excluded.total():
        skipped["left out by dataset.exclude"] = n
        warnings.append(f"{n} files were left out by dataset.exclude: {counted(excluded)}")
    return skipped, warnings


def count_files(path: Path) -> int:
    """1 for a file; the number of files below a directory, as far as it can be read."""
    if path.is_symlink() or not path.is_dir():
        return 1
    return sum(
        len(files) + sum(os.path.islink(os.path.join(parent, name)) for name in folders)
        for parent, folders, files in os.walk(path)
    )


def describe(entries: Iterable[Entry]) -> str:
    """The first two levels of directories with their numbers of files, in a line: a/ (b/ 3 .jpg, 1 .txt), c/ (…)."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for path, problem in entries:
        first, second, *_ = [*(f"{name}/" for name in path.split("/")[:-1]), "", ""]
        if problem == FOLDER and "/" not in path:
            counts.setdefault(f"{path}/", {})
        elif problem is None:
            kind = os.path.splitext(path)[1].lower() or "files"
            counts.setdefault(first, {}).setdefault(second, Counter())[kind] += 1
    shown = []
    for first, inner in sorted(counts.items()):
        listed = []
        for second, kinds in sorted(inner.items()):
            n = shorten([f"{count} {kind}" for kind, count in kinds.most_common()], 2)
            listed.append(f"{second} {n}".strip())
        shown.append(f"{first} ({shorten(listed, 3) or 'no files'})" if first else shorten(listed, 3))
    return shorten(shown, 4)


def shorten(items: Sequence[str], n: int) -> str:
    """The first `n` items, and … if there are more."""
    return ", ".join([*items[:n], "…"] if len(items) > n else items)


def counted(counts: Mapping[str, int], n: int = 5) -> str:
    """The `n` largest of some counts as text."""
    return shorten([f"{name} ({count})" for name, count in sorted(counts.items(), key=lambda c: (-c[1], c[0]))], n)


def printable(text: str) -> str:
    """The text in one line: signs that do not print are escaped."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
