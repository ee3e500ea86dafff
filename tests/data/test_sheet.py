"""A contact sheet has every clip where it belongs."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vdm.data.sheet import contact_sheet


@given(count=st.integers(1, 7), across=st.integers(1, 4))
def test_clips_stand_in_order_row_by_row(tmp_path_factory, count: int, across: int) -> None:
    file: Path = tmp_path_factory.mktemp("sheet") / "sheet.png"
    clips = [np.full((5, 16, 24, 3), 30 * number, np.uint8) for number in range(count)]
    captions = ["a word " * (1 + number) for number in range(count)]  # of one line or several
    contact_sheet(file, clips, captions=captions, columns_frames=2, across=across)
    sheet = cv2.imread(str(file))
    assert sheet.shape[1] == 48 * min(across, count)
    corners = [(y, x) for y in range(sheet.shape[0]) for x in range(0, sheet.shape[1], 48)]
    firsts = [sheet[y, x, 0] for y, x in corners if y == 0 or sheet[y - 1, x, 0] != sheet[y, x, 0]]
    seen = list(dict.fromkeys(int(value) for value in firsts if value % 30 == 0))
    assert seen == [30 * number for number in range(count)]
