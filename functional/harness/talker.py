"""A guest of 512 bytes that says numbered lines on its first serial port, as fast as it can."""

from typing import Final

LINE_LENGTH: Final = 64

_DOTS: Final = LINE_LENGTH - 9


def disk(lines: int) -> bytes:
    """Return a disk whose boot sector says so many lines and then halts.

    A line is its number, eight hexadecimal digits written as A to P, then dots.
    """
    code = bytes.fromhex(
        "fa 66 31db"  # cli; xor ebx, ebx
        "b9 0800"  # line: mov cx, 8
        "66 89dd"  # mov ebp, ebx
        "66 c1c504"  # digit: rol ebp, 4
        "89e8 240f 0441"  # mov ax, bp; and al, 15; add al, 'A'
        "ba f803 ee"  # mov dx, 0x3f8; out dx, al
        "e2 f0"  # loop digit
        f"b02e b9 {_DOTS:02x}00"  # mov al, '.'; mov cx, dots
        "ee e2fd"  # dot: out dx, al; loop dot
        "b00a ee"  # mov al, newline; out dx, al
        "66 43"  # inc ebx
        f"66 81fb {lines.to_bytes(4, 'little').hex()}"  # cmp ebx, lines
        "75 d4"  # jne line
        "f4 ebfd"  # hlt: hlt; jmp hlt
    )
    return (code.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0")


def line(number: int) -> str:
    """Return what the guest says as its line of that number, from 0."""
    digits = "".join(chr(ord("A") + int(digit, 16)) for digit in f"{number:08x}")
    return digits + "." * _DOTS + "\n"
