"""At most n alerts in any hour. Pure: times come in, decisions go out."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

HOUR_S = 3600.0


class AlertLimit:
    """A sliding window of an hour, whatever the clock's origin. Times must not go backwards.

    One place of the window is kept for what is urgent, so that a flood of small things does not hide the run's end.
    With one place an hour everything shares it.
    """

    def __init__(self, per_hour: int) -> None:
        if per_hour < 1:
            raise ValueError(f"{per_hour} alerts an hour: set 1 or more, or name nobody to be told")
        self._per_hour = per_hour
        self._sent_s: deque[float] = deque()
        self._held: Counter[str] = Counter()

    @property
    def held(self) -> Mapping[str, int]:
        """What was held back and is in no summary yet: how often each kind."""
        return dict(self._held)

    def admit(self, now_s: float, kind: str, urgent: bool = False) -> bool:
        """Whether an alert may go out now. One that may not is held back, to be summed up."""
        if self._take_place(now_s, urgent):
            return True
        self._held[kind] += 1
        return False

    def summary(self, now_s: float) -> Mapping[str, int]:
        """What was held back, once there is a place for a message about it, which is then taken; else nothing."""
        return self.take_held() if self._held and self._take_place(now_s, urgent=False) else {}

    def take_held(self) -> Mapping[str, int]:
        """What was held back, to be told along with a message that goes out anyway."""
        held, self._held = dict(self._held), Counter()
        return held

    def _take_place(self, now_s: float, urgent: bool) -> bool:
        while self._sent_s and now_s - self._sent_s[0] >= HOUR_S:
            self._sent_s.popleft()
        places = self._per_hour if urgent or self._per_hour == 1 else self._per_hour - 1
        if len(self._sent_s) >= places:
            return False
        self._sent_s.append(now_s)
        return True
