"""The tasks: four things to do with a source file, and a late report on many of them.

Each run of a task is measured without a word about it here. Points of your own are sent by
``app.influx.send_data`` and by ``@celery_influx.timed``. ``tally`` is the demo's bookkeeping.
"""

import ast
import hashlib
import zlib
from collections import Counter
from pathlib import Path

import celery_influx
from example_project import tally
from example_project.app import app


@celery_influx.timed("read")
def read(path: str, encoding: str) -> str:
    """The text of a file; each call is a point, with how long it took and how it ended."""
    tally.add("point timed")
    return Path(path).read_text(encoding)


@app.task(base=tally.Task)
def parse(path: str) -> None:
    """Fails for the standard library's few samples of bad source code, where it has its tests."""
    tree = ast.parse(read(path, "utf-8"))
    kinds = Counter(type(node).__name__ for node in ast.walk(tree))
    fields = {"functions": kinds["FunctionDef"], "classes": kinds["ClassDef"]}
    tally.add("point source_file")
    app.influx.send_data({"measurement": "source_file", "fields": fields})


@app.task(base=tally.Task)
def count_words(path: str) -> None:
    """Fails for every file that is not plain ASCII: a mistake of the kind that metrics show."""
    words = Counter(read(path, "ascii").split())
    tally.add("point words")
    fields = {"total": words.total(), "different": len(words)}
    app.influx.send_data({"measurement": "words", "fields": fields})


@app.task(base=tally.Task, bind=True)
def compress(self: tally.Task, path: str) -> None:
    """Tries one file in ten again after half a second, as if its disk had been away."""
    data = Path(path).read_bytes()
    if zlib.crc32(path.encode()) % 10 == 0 and self.request.retries == 0:
        raise self.retry(exc=OSError(f"{path} is away"), countdown=0.5)
    with app.influx.timed("deflate", tags={"level": 9}):
        tally.add("point timed")
        small = len(zlib.compress(data, 9))
    tally.add("point compressed")
    fields = {"ratio": small / max(1, len(data)), "saved_bytes": len(data) - small}
    app.influx.send_data({"measurement": "compressed", "fields": fields})


@app.task(base=tally.Task)
def digest(path: str) -> None:
    """Sends no point of its own."""
    hashlib.sha256(Path(path).read_bytes()).hexdigest()


@app.task(base=tally.Task)
def report(paths: list[str]) -> None:
    """Is sent with a countdown of a second, which is not counted as waiting."""
    sizes = [Path(path).stat().st_size for path in paths]
    tally.add("point batch")
    fields = {"files": len(sizes), "largest_bytes": max(sizes)}
    app.influx.send_data({"measurement": "batch", "fields": fields})
