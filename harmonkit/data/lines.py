"""Text files by line or by row: where each begins is found once, and each is read when it is asked for."""
import csv
import io
import zlib
from array import array

from harmonkit.data.words import decode

DELIMITERS = ",\t;|"
MAX_LINES = 1000                    # of a row; more mean that a quote does not end
csv.field_size_limit(2 ** 31 - 1)                               # a cell may hold an image in base64


class Lines:
    """The lines of a file as bytes, without blank ones. Lines end at "\\n" alone: text may hold U+2028."""

    def __init__(self, path):
        self.path = path
        self.starts = array("q")                                # 20 bytes a line with these three
        self.ends = array("q")
        self.crcs = array("I")
        with open(path, "rb") as file:
            check_encoding(path, file)
            self.find_all(file)

    def find_all(self, file):
        """Find the lines of a file that is open at its start."""
        position = 0
        for line in file:
            if line.strip():
                self.add(position, position + len(line), zlib.crc32(line))
            position += len(line)

    def add(self, start, end, crc):
        self.starts.append(start)
        self.ends.append(end)
        self.crcs.append(crc)

    def drop_first(self):
        """Leave out the first line, which names the columns."""
        del self.starts[0], self.ends[0], self.crcs[0]

    @property
    def crc(self) -> int:
        """The CRC-32 of all lines."""
        return zlib.crc32(self.crcs.tobytes())

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.starts[i])
            line = file.read(self.ends[i] - self.starts[i])
        # Another program may write the file during a run; its lines then lie elsewhere.
        if zlib.crc32(line) != self.crcs[i]:
            raise ValueError("the file has changed since it was opened; start again")
        return line


class CSVRows(Lines):
    """The rows of a CSV file as lists of cells; a cell in quotes may hold line breaks and delimiters.

    A line with a quote that does not end is a broken row, and the next row begins in the next line.
    """

    def __init__(self, path, delimiter=","):
        self.delimiter = delimiter
        super().__init__(path)

    def find_all(self, file):
        position = 0
        while position is not None:
            position = self.find_rows(file, position)

    def find_rows(self, file, position):
        """Find the rows from a position on. Returns the position after a broken line, None at the end."""
        file.seek(position)
        ends = [position]                                       # of the lines of a row, after its start
        crcs = [0]                                              # of the row up to there

        def lines():
            for line in file:
                ends.append(ends[-1] + len(line))
                crcs.append(zlib.crc32(line, crcs[-1]))
                if len(ends) > MAX_LINES:
                    raise csv.Error("a quote that does not end")
                yield line.decode("latin-1")                    # delimiters and quotes are the same bytes

        try:
            for row in csv.reader(lines(), delimiter=self.delimiter, strict=True):
                if any(cell.strip() for cell in row):
                    self.add(ends[0], ends[-1], crcs[-1])
                del ends[:-1]
                crcs = [0]
        except csv.Error:
            self.add(ends[0], ends[1], crcs[1])
            return ends[1]
        return None

    def __getitem__(self, i) -> list:
        text = io.StringIO(decode(super().__getitem__(i)), newline="")
        try:
            row = next(csv.reader(text, delimiter=self.delimiter, strict=True))
        except csv.Error as error:
            raise ValueError(f"a broken row ({error})") from None
        return [cell.strip() for cell in row]


class TabRows(Lines):
    """The rows of a TSV file as lists of cells. Quotes are letters unless they are around a whole cell.

    Many such files are written without quoting, so a cell may begin with a quote that never ends.
    """

    def find_all(self, file):
        """A line goes on with a row whose last cell has an open quote, if either has too few cells."""
        position = tabs = wanted = 0
        is_open = False
        for line in file:
            found = line.count(b"\t")
            if is_open and (tabs < wanted or found < wanted):
                tabs += found
                self.ends[-1] = position + len(line)
                self.crcs[-1] = zlib.crc32(line, self.crcs[-1])
            elif line.strip():
                tabs = found
                is_open = False
                self.add(position, position + len(line), zlib.crc32(line))
            position += len(line)
            wanted = wanted or tabs                             # those of the first row, the header
            last = line.rpartition(b"\t")[2]
            has_odd_quotes = last.count(b'"') % 2 == 1
            if found or not is_open:                            # the last cell begins in this line
                is_open = last.startswith(b'"') and has_odd_quotes
            else:
                is_open = not has_odd_quotes
        self.columns = wanted + 1

    def __getitem__(self, i) -> list:
        row = decode(super().__getitem__(i)).rstrip("\r\n")
        cells = row.split("\t")
        if len(cells) > self.columns:                           # a tab inside quotes
            cells = next(csv.reader([row], delimiter="\t"))
        return [unquote(cell).strip() for cell in cells]


def unquote(cell) -> str:
    if len(cell) > 1 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell


def open_table(path):
    """The rows of a CSV or TSV file. The delimiter is the most frequent of DELIMITERS in the first line."""
    with open(path, "rb") as file:
        head = decode(file.readline())
    delimiter = max(DELIMITERS, key=head.count)
    if delimiter == "\t" or path.lower().endswith(".tsv"):
        return TabRows(path)
    return CSVRows(path, delimiter)


def check_encoding(path, file):
    """Raises ValueError for UTF-16, which has no lines to be found by bytes."""
    if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path}: text in UTF-16; convert it first: iconv -f UTF-16 -t UTF-8")
    file.seek(0)
