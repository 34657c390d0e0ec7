"""The base of all formats, and several files of one format as one source."""
import bisect
import hashlib
import itertools
from pathlib import Path

from harmonkit.data.records import skip_errors


class Format:
    """A source. `__init__` sets path and entries; `sample` makes a Sample of an entry or raises any error."""
    kind = ""                       # what it is, in a few words, for reports
    suffixes = ()                   # of its files, in lower case
    takes_patterns = False          # whether `__init__` opens all files of a pattern

    @classmethod
    def lies_at(cls, path):
        """Whether an existing file or folder is of this format."""
        return path.lower().endswith(cls.suffixes)

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        name = self.name(i)
        with skip_errors(name):
            return self.sample(name, self.entries[i])

    def name(self, i) -> str:
        """What messages call a sample."""
        return f"{self.path}:{i + 1}"

    def fingerprint(self) -> str:
        """16 hex digits over a source's kind, its samples' number, names and order, and its tables of words.

        They stay when the data are moved or touched. The contents of images do not count, nor those of files
        that hold the words of one sample.
        """
        text = getattr(self, "text", None)                      # the field with the words, an option
        about = f"{type(self).__name__} {self.kind} {len(self)} {text}"
        digest = hashlib.blake2b(about.encode(), digest_size=8)
        for part in self.parts():
            digest.update(f"\n{part!r}".encode())
        return digest.hexdigest()

    def parts(self):
        """What the fingerprint is made of, in order."""
        return self.entries


def folder_of(path, option=None) -> Path:
    """The folder that an option names, otherwise that of the file at a path. Raises FileNotFoundError."""
    folder = Path(option or Path(path).parent)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    return folder


class Joined(Format):
    """Several sources, one after the other."""

    def __init__(self, path, sources):
        self.path = path
        self.sources = sources
        self.kind = sources[0].kind
        self.ends = list(itertools.accumulate(map(len, sources)))

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i):
        number = bisect.bisect(self.ends, i)
        source = self.sources[number]
        return source[i - self.ends[number] + len(source)]

    def parts(self):
        return [source.fingerprint() for source in self.sources]
