"""Parse command lines with vLLM's own parser: ``parse.py < lists of arguments > results``.

Both are JSON; the last line printed holds one result for each list. No engine is started.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    ServeSubcommand().subparser_init(parser.add_subparsers())
    results: list[dict[str, Any]] = []
    for arguments in json.load(sys.stdin):
        taken = parser.parse_args(arguments)
        compilation = taken.compilation_config
        graphs = compilation.cudagraph_mode
        results.append(
            {
                "cudagraph_mode": graphs and graphs.name,
                "mode": compilation.mode,
                "sizes": compilation.cudagraph_capture_sizes,
                "limit_mm_per_prompt": taken.limit_mm_per_prompt,
                "dtype": taken.dtype,
                "block_size": taken.block_size,
                "additional_config": taken.additional_config,
            }
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
