"""Files that others wrote: they may be no files, damaged, or made to fill the memory.

What is wrong is an OSError or a ValueError with a short text, so that each reader says it in its own one line.
"""

import errno
import json
import logging
import os
import shutil
import stat
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 30  # of a file that is read whole, unless its reader says less
PART = 1 << 20  # bytes that are read at a time of a file that has more than its size
YAML_BYTES = 1 << 22  # of a YAML text, which takes seconds for a megabyte
YAML_NODES = 1 << 18  # of one, where each alias counts as all that it stands for
DAMAGED = ".damaged"  # the end of the name of what was set aside
log = logging.getLogger("kshot.files")


def check_regular(path: Path | str) -> os.stat_result:
    """The status of a file. Raises OSError where there is none, and for what is no regular file: a pipe, a device or a
    socket would be read for ever, and opening alone can wait or do something."""
    return _regular(os.stat(path), path)


def _regular(status: os.stat_result, path: Path | str) -> os.stat_result:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return status


def read_file(path: Path | str, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file that others wrote. Raises OSError as `check_regular` does, and for more than `most` bytes."""
    check_regular(path)
    # It may have become a pipe since: opening does not wait for that.
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        size = _regular(os.fstat(file.fileno()), path).st_size
        content = file.read(min(most, size) + 1)  # which takes so much memory, whatever is there
        while size < len(content) <= most and (part := file.read(min(PART, most + 1 - len(content)))):
            content += part  # it grows, or is one of /proc, whose size is 0
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
    return content


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text that others wrote. Raises ValueError, also where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_yaml(text: str) -> Any:
    """The content of a YAML text that others wrote. Raises ValueError for what is none or nested too deeply, and for
    more than YAML_NODES nodes once its aliases stand for what they repeat: a few of them make gigabytes."""
    import yaml

    if len(text) > YAML_BYTES:
        raise ValueError(f"it has more than {YAML_BYTES:,} characters")
    loader = yaml.SafeLoader(text)
    try:
        if (root := loader.get_single_node()) is None:
            return None
        pending, count = [root], 0
        while pending:
            node, count = pending.pop(), count + 1
            if count > YAML_NODES:
                raise ValueError(f"its aliases (*name) make it more than {YAML_NODES:,} values")
            if isinstance(node, yaml.MappingNode):
                pending += (part for pair in node.value for part in pair)
            elif isinstance(node, yaml.SequenceNode):
                pending += node.value
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (AttributeError, LookupError) as error:  # of PyYAML, where a tag such as !!bool is at another value
        raise ValueError(f"a value does not fit its tag ({type(error).__name__}: {error})") from error
    finally:
        loader.dispose()


def is_beside(folder: Path, name: str) -> bool:
    """Whether a name that one of a folder's files gives is a plain one, and no link that leads out of the folder. In a
    snapshot of the hub's cache files are links to its blobs."""
    path, inside = folder / name, [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    return name == path.name and name != ".." and path.resolve().parent in inside


def set_damaged_aside(path: Path, way_out: str = "it is computed again") -> None:
    """Rename a damaged file or folder to its name and DAMAGED, in place of one from before, and say so in the log: on
    stderr, unless a program sends it elsewhere. Another process may have done so already."""
    aside = path.with_name(f"{path.name}{DAMAGED}")
    try:
        if aside.is_dir():
            shutil.rmtree(aside)
        path.rename(aside)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s is damaged and cannot be set aside (%s)", path, error.strerror)
        return
    log.warning("%s is damaged; set aside as %s: %s", path, aside.name, way_out)
