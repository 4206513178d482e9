"""How names from the outside are shown: never an absolute path, always a file name that every file system takes.

It does not know what a name means; a report or a figure asks here before it writes one down.
"""

import re
from hashlib import sha256

# A slash that begins a path: not after a word (Qwen/Qwen3), a dot (./runs), a tilde, a closing bracket or a scheme's ://
_PATH = re.compile(r"""(?:(?<![\w./~…)}\]])|(?<=file://))/(?:[^\s/'"]+/)*([^\s/'"]+)/?""")
_DRIVE = re.compile(r"""\b[A-Za-z]:\\(?:[^\s\\'"]+\\)*([^\s\\'"]+)""")
_WHOLE = re.compile(r"(\w*:)?/(?!/).*?([^/]+)/*", re.DOTALL)
_PLAIN = re.compile(r"[a-z0-9][a-z0-9_-]{0,59}")
TOGETHER = "together"  # the file of the figure of all data sets: no data set's


def without_paths(text: str) -> str:
    """Text with every absolute path in it cut to its last part: `--root /home/ada/photos` → `--root …/photos`."""
    return _DRIVE.sub(r"…/\1", _PATH.sub(r"…/\1", text))


def name(value: str) -> str:
    """A name or a setting without absolute paths, a path with spaces included: `folder:/a b/c` → `folder:…/c`."""
    whole = _WHOLE.fullmatch(value)
    return f"{whole[1] or ''}…/{whole[2]}" if whole else without_paths(value)


def file_stem(dataset: str) -> str:
    """A data set's file name without suffix, never TOGETHER; a hash keeps apart what the safe alphabet would merge."""
    if _PLAIN.fullmatch(dataset) and dataset != TOGETHER:
        return dataset
    safe = re.sub(r"[^a-z0-9_]+", "-", name(dataset).lower()).strip("-_")[:40]
    return f"{safe or 'dataset'}-{sha256(dataset.encode()).hexdigest()[:8]}"
