"""The service with promises of an insert taken out, so that their price can be measured; good for nothing else.

Usage: python -m benchmarks.replay.stripped validation,idempotency serve --set ...
"""

import sys

from buffer import codec, redis_table
from buffer.quick import intact_group
from services.cli import main

_STRIP = {
    "validation": lambda: setattr(codec, "valid_group", intact_group),
    "idempotency": lambda: setattr(redis_table, "record_hash", lambda record: ""),
}

if __name__ == "__main__":
    for promise in sys.argv.pop(1).split(","):
        _STRIP[promise]()
    main()
