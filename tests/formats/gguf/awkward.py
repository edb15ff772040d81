"""Texts at which tokenizers go different ways."""

from __future__ import annotations

AWKWARD: tuple[str, ...] = (
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "Hello world",
    " Hello world",
    "Hello world ",
    "  two before,  two between, two after  ",
    "tabs\tand\t\ttabs \t mixed\t ",
    "lines\n\nand\r\nlines\r\n\r\n \n  \n\t\n end",
    "\n\n\n\n\n \n\n\n  \n",
    " " * 37 + "x" + " " * 64,
    "0 1 12 123 1234 12345 123456 1234567 12345678901234567890",
    "3.14159 -2,718.28 1e-9 0xDEADBEEF 1_000_000 50% \u00bd \u00b2 \u2167 \u0663\u0664\u0665",
    "I'm he's we're they've she'll I'd don't",
    "I'M HE'S WE'RE THEY'VE SHE'LL I'D DON'T 'Re 'vE 'lL",
    "It\u2019s a \u2018quoted\u2019 word, \u201ctwice\u201d \u2014 or so\u2026",
    '\'tis \'\'twas ```code``` """doc""" !!!??? ...,,, ---===+++',
    "def f(x):\n    return x**2  # square\n\n\tif x!=0 and y>=1:\n\t\tpass\n",
    "for(int i=0;i<n;++i){a[i]^=~b[i]<<3;} // \u00b5s \u00a7 \u00b6 $\u20ac\u00a3",
    '<div class="a-b">&nbsp;</div> https://example.org/a?b=c&d=%20#e me@example.org',
    "\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e\u3002\u3053\u3093\u306b\u3061\u306f\u4e16\u754c",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5 \u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u03ba\u03cc\u03c3\u03bc\u03b5! "
    "\u00c6\u00d8\u00c5 na\u00efve fa\u00e7ade",
    "\U0001f680 \U0001f636\u200d\U0001f32b\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467"
    " \U0001f1e9\U0001f1ea \u2705\U0001f999\U0001f999",
    "zero\u200bwidth\u200djoiner\ufeffmark\u00a0nbsp\u3000wide\u2028line\u0085next",
    "\u0000\u0001\u001f\u007f\ufffd\ufffe\U0010ffff",
    "under_score camelCase PascalCase SCREAMING_SNAKE kebab-case dotted.name x1y2z3",
    "a" * 130,
    "supercalifragilisticexpialidocious",
    "\u2581already\u2581marked \u0120like \u010aso",
)
"""Composed text: every character is in its NFC form."""

DECOMPOSED: tuple[str, ...] = ("cafe\u0301 n\u0303o", "\u1112\u1161\u11ab", "A\u030a\u0323 o\u0308")
"""Letters with their marks apart, which NFC would compose."""

INVALID_BYTES: tuple[bytes, ...] = (b"\xff\xfe", b"a\xc3", b"\xe4\xbd end", b"\x80\x80")
"""No UTF-8. A Hugging Face tokenizer takes only text, so these must just not abort."""


def with_specials(*specials: str) -> tuple[str, ...]:
    """Return texts with special tokens inside, alone, doubled, and next to blanks."""
    first, last = specials[0], specials[-1]
    return (
        first,
        f"{first}{first}",
        f"Hi{first}there{last}",
        f"{first} Hi {last} there",
        f"x {first}\n{last}\n\n y",
        *(f"a {token} b" for token in specials),
        f"{first[:-1]} broken {last[1:]}",
    )
