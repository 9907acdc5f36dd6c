"""Korean place names in Latin letters, by the Revised Romanization (Ministry of Culture 2000).

Where two syllables meet, sounds change: 종로 is Jongno, 신림 is Sillim, 왕십리 is Wangsimni.
"""

# ruff: noqa: SIM905
ONSETS = "g kk n d tt r m b pp s ss  j jj ch k t p h".split(" ")
VOWELS = "a ae ya yae eo e yeo ye o wa wae oe yo u wo we wi yu eu ui i".split()
# Final consonants as they sound before a consonant, and as they sound before a vowel.
CLOSED = " k k k n n n t l k m l l l p l m p p t t ng t t k t p t".split(" ")
LINKED = " g kk ks n nj n d r lg lm lb ls lt lp r m b ps s ss ng j ch k t p ".split(" ")
NASAL = {"k": "ng", "t": "n", "p": "m"}


def romanise(name: str) -> str:
    """A Korean name in Latin letters, with a capital; other characters stay as they are."""
    latin, coda = "", 0
    for character in name:
        code = ord(character) - 0xAC00
        if not 0 <= code < 11172:
            latin, coda = latin + CLOSED[coda] + character, 0
            continue
        onset, vowel, next_coda = code // 588, code // 28 % 21, code % 28
        latin += _meeting(coda, onset) if latin else ONSETS[onset]
        latin, coda = latin + VOWELS[vowel], next_coda
    latin += CLOSED[coda]
    return latin[:1].upper() + latin[1:]


def _meeting(coda: int, onset: int) -> str:
    """The end of one syllable and the beginning of the next."""
    closed, begins = CLOSED[coda], ONSETS[onset]
    if not begins:
        return LINKED[coda]
    if begins in ("n", "m"):
        closed = NASAL.get(closed, closed)
    if begins == "r" and closed:
        if closed in ("n", "l"):
            return "ll"
        return NASAL.get(closed, closed) + "n"
    if begins == "n" and closed == "l":
        return "ll"
    return closed + begins
