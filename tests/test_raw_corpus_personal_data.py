"""Personal data is masked where it is, and nothing else is. Every number here is made up."""

from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seodang.corpus.raw.personal_data import mask


def resident_number(first12: str) -> str:
    """A made-up number with its check digit (Resident Registration Act, enforcement rules)."""
    weights = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)
    total = sum(int(d) * w for d, w in zip(first12, weights, strict=True))
    return first12 + str((11 - total % 11) % 10)


def card_number(digits: str) -> str:
    """The digits and the one that Luhn's formula adds (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return digits + str(-total % 10)


RESIDENT = resident_number("900101112345")
CARD = card_number("453201511283036")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("문의는 hong.gildong@seodang.kr로", "문의는 [EMAIL]로"),
        ("<a href='mailto:a@b.co.kr'>", "<a href='mailto:[EMAIL]'>"),
        ("연락처010-2345-6789와hong@seodang.kr을", "연락처[PHONE]와[EMAIL]을"),
        ("휴대전화 010-2345-6789입니다", "휴대전화 [PHONE]입니다"),
        ("전화 02-312-3456, 팩스 031)234-5678", "전화 [PHONE], 팩스 [PHONE]"),
        ("tel: 01023456789", "tel: [PHONE]"),
        ("call +82 10 2345 6789 or +1 650-253-0000", "call [PHONE] or [PHONE]"),
        (f"주민등록번호 {RESIDENT[:6]}-{RESIDENT[6:]}", "주민등록번호 [RESIDENT_NUMBER]"),
        (f"주민번호 {RESIDENT}", "주민번호 [RESIDENT_NUMBER]"),
        ("2021년생 210305-3123456", "2021년생 [RESIDENT_NUMBER]"),
        (f"카드 {CARD[:4]}-{CARD[4:8]}-{CARD[8:12]}-{CARD[12:]}", "카드 [CARD]"),
        (f"card {CARD}.", "card [CARD]."),
        ("접속 주소 93.184.216.34:53", "접속 주소 [IP]:53"),
    ],
)
def test_personal_data_is_masked(text: str, masked: str) -> None:
    assert mask(text).text == masked


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com and admin@host.invalid",  # reserved for examples (RFC 2606)
        "npm install left-pad@1.3.0 @types/node@26.6.6",
        "고객센터 1588-1234",  # not a person's
        "2026-11-22, 10:15-11:45, 1234-5678",
        "버전 v1.2.3.4, python==3.11.7.1, 127.0.0.1, 192.168.0.1, 10.0.0.1",
        "6.3.4.2절 참고, 방송 주소 224.0.0.114",
        "주민번호 모양 900101-1234567",  # wrong check digit
        "날짜가 아닌 991399-1234567",
        "주문 4532-0151-1283-0367",  # wrong check digit
        "0000-0000-0000-0000, 1234567890123456789",
        "0x4532015112830366 sha256 45320151128303664532015112830366",
        "3.14159265358979, 1e-10, 299792458",
        "전화번호를 입력하세요: 010-XXXX-XXXX",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    found = mask(text)
    assert found.text == text
    assert found.counts == {}


def test_findings_are_counted_and_shown_masked() -> None:
    found = mask("대표 a@b.kr, 담당 c@d.kr, 전화 010-2345-6789 (평일)", samples=1)
    assert found.counts == {"EMAIL": 2, "PHONE": 1}
    assert found.samples == [
        ("EMAIL", "대표 [EMAIL], 담당 [EMAIL], 전화 [PHONE] (평일)"),
        ("PHONE", "대표 [EMAIL], 담당 [EMAIL], 전화 [PHONE] (평일)"),
    ]


@given(st.text(alphabet="0123456789", min_size=11, max_size=11), st.sampled_from("- "))
def test_every_card_number_with_its_check_digit_and_none_without(rest: str, between: str) -> None:
    number = card_number("4000" + rest)
    parts = [number[start : start + 4] for start in range(0, 16, 4)]
    assert mask(f"번호 {between.join(parts)} 끝").text == "번호 [CARD] 끝"
    wrong = number[:15] + str((int(number[15]) + 1) % 10)
    assert mask(f"번호 {wrong} 끝").text == f"번호 {wrong} 끝"


@given(
    st.dates(min_value=date(1930, 1, 1), max_value=date(1999, 12, 31)),
    st.integers(0, 96999),  # from 97 on no place is coded
    st.integers(1, 2),
)
def test_every_resident_number_with_its_check_digit(day: date, serial: int, sex: int) -> None:
    number = resident_number(f"{day:%y%m%d}{sex}{serial:05d}")
    assert mask(f"{number[:6]}-{number[6:]}").text == "[RESIDENT_NUMBER]"
    wrong = number[:12] + str((int(number[12]) + 1) % 10)
    assert "[RESIDENT_NUMBER]" not in mask(f"{wrong[:6]}-{wrong[6:]}").text


@given(st.text(max_size=200))
def test_masking_twice_changes_nothing_more(text: str) -> None:
    once = mask(text).text
    assert mask(once).text == once
