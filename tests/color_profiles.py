"""Minimal ICC profiles, version 2, written by hand: what the tests of color need."""
import struct

IDENTITY_TABLE = bytes(range(256))


def fixed(*numbers) -> bytes:
    """Numbers as s15Fixed16."""
    return struct.pack(f">{len(numbers)}i", *[round(65536 * x) for x in numbers])


def xyz(*numbers) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(*numbers)


def gamma(exponent) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * exponent))


# The primaries of sRGB.
RED, GREEN, BLUE = xyz(0.4361, 0.2225, 0.0139), xyz(0.3851, 0.7169, 0.0971), xyz(0.1431, 0.0606, 0.7141)


def srgb_curve() -> bytes:
    """sRGB's curve, as a table of 1024 levels."""
    levels = [i / 1023 for i in range(1024)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels]
    return b"curv\0\0\0\0" + struct.pack(">I1024H", 1024, *[round(65535 * x) for x in linear])


def profile(space, tags, pcs=b"XYZ ") -> bytes:
    """The profile of a color space such as b"RGB ". tags: {signature: content}."""
    name = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"t\0" + bytes(78)
    tags = {b"desc": name, b"cprt": b"text\0\0\0\0x\0", b"wtpt": xyz(0.9642, 1, 0.8249), **tags}
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for signature, content in tags.items():
        table += struct.pack(">4sII", signature, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s12s4s", start + len(body), b"test", 0x02400000, kind, space, pcs,
                       bytes(12), b"acsp")
    head = head.ljust(68, b"\0") + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + body


def rgb_profile(red=RED, green=GREEN, blue=BLUE, curve=None) -> bytes:
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve or gamma(2.2))
    return profile(b"RGB ", {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, **curves})


def grey_profile(exponent) -> bytes:
    return profile(b"GRAY", {b"kTRC": gamma(exponent)})


def cmyk_profile() -> bytes:
    """All inks are grey: each of C, M and Y takes a quarter of the lightness."""
    levels = b""
    for i in range(16):                                         # the corners of the cube of inks
        black, inks = i & 1, (i >> 1).bit_count()
        levels += bytes([255 * (1 - black) * (4 - inks) // 4, 128, 128])
    head = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return profile(b"CMYK", {b"A2B0": head + 4 * IDENTITY_TABLE + levels + 3 * IDENTITY_TABLE}, b"Lab ")
