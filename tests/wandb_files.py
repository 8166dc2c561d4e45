"""What wandb wrote without a network, read back from its own files."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class WandbRun(NamedTuple):
    """One offline run."""

    project: str
    name: str
    group: str
    history: list[dict[str, Any]]
    """What each call of `log` gave."""


def read_run(log: Path) -> WandbRun:
    """The run in a .wandb file."""
    from wandb.proto import wandb_internal_pb2

    run, history = None, []
    for data in records(log.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run = record.run
        if record.HasField("history"):
            items = record.history.item
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert run is not None, log
    return WandbRun(run.project, run.display_name, run.run_group, history)


def records(log: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB) behind a header of 7 bytes."""
    at, record, block = 7, b"", 1 << 15
    while at + 7 <= len(log):
        if block - at % block < 7:  # no room for a record's own header: the next block
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            yield record
            record = b""
