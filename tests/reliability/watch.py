"""What a long run may not spend: resident memory, file handles, threads, sampled beside it and summed up in JSON."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from statistics import median

import psutil

from omniforcing_lib import files
from series import origins

REPORTS = Path(__file__).resolve().parents[2] / "reports" / "reliability"
FLAT = 1.02  # memory at the end over memory once it has settled


class Watch:
    """Sample this process every `every` seconds, in a thread, from `with` to its end."""

    def __init__(self, every: float = 5.0) -> None:
        self.every, self.rows = every, []
        self._process, self._end = psutil.Process(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self.began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self.sample()

    def _run(self) -> None:
        while not self._end.wait(self.every):
            self.sample()

    def sample(self) -> None:
        """Note the time in seconds, the resident memory in MB, open files and threads."""
        process = self._process
        rss = process.memory_info().rss / 1e6
        self.rows.append((time.monotonic() - self.began, rss, process.num_fds(), process.num_threads()))

    def summary(self) -> dict[str, object]:
        """Compare the last tenth with the second tenth: by then everything that is made once has been made."""
        seconds, *columns = zip(*self.rows, strict=True)
        tenth = max(1, len(self.rows) // 10)
        rss, fds, threads = ((median(c[tenth : 2 * tenth] or c), median(c[-tenth:])) for c in columns)
        return {
            "wall_s": round(seconds[-1], 1),
            "readings": len(self.rows),
            "rss_mb": [round(v, 1) for v in rss],
            "rss_mb_peak": round(max(columns[0]), 1),
            "rss_ratio": round(rss[1] / rss[0], 4),
            "rss_flat": rss[1] <= FLAT * rss[0],
            "open_files": list(fds),
            "open_files_most": max(columns[1]),
            "threads": list(threads),
            "rss_mb_curve": [round(m, 1) for m in columns[0][:: max(1, len(self.rows) // 30)]],
        }


def write(name: str, out: str, found: dict[str, object]) -> bool:
    """Store what a run found, with the commit it ran on; say it in one line and whether nothing was lost."""
    path = Path(out) if out else REPORTS / f"{name}.json"
    files.write_json(path, {"git": origins.git_state(), **found})
    said = ", ".join(f"{key} {value}" for key, value in found.items() if not isinstance(value, (list, dict)))
    print(f"{path}: {said}")
    return bool(found["ok"])
